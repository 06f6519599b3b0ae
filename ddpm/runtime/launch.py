"""Runs a command, such as `train`, in several processes of this machine with torchrun's launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from ddpm.errors import InputError
from ddpm.runtime import ranks, watchdog
from ddpm.runtime.stopping import Stopped

LOOPBACK = {"linux": "lo", "darwin": "lo0"}.get(sys.platform, "")


def launch(processes: int, arguments: list[str]) -> None:
    """Runs `ddpm ARGUMENTS` in several processes and waits for them. Forwards SIGTERM and Ctrl-C.

    The output of process 0 is shown. If another process fails, its last line of output is shown. The processes find each other
    through a file and communicate over loopback.

    Raises:
        SystemExit: process 0 failed and has printed why, or SIGTERM or Ctrl-C ended the processes.
        Stopped: a signal killed one of the processes.
        InputError: another process failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the processes report their errors themselves
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # otherwise the launcher's store listens on all addresses
    os.environ[watchdog.VARIABLE] = str(os.getpid())  # the processes watch this process and exit with it
    for backend in ("GLOO", "NCCL") if LOOPBACK else ():
        os.environ.setdefault(f"{backend}_SOCKET_IFNAME", LOOPBACK)
    with TemporaryDirectory(prefix="ddpm-ranks-") as folder:
        os.environ[ranks.MEETING] = str(Path(folder) / "meeting")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(folder) / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            run_id="ddpm",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, processes), Std.ALL)),
        )
        try:
            elastic_launch(config, sys.executable)("-B", "-m", "ddpm", *arguments)
        except SignalException as stopped:
            sys.exit(128 + stopped.sigval)
        except ChildFailedError as error:
            _fail({rank: failure.exitcode for rank, failure in error.failures.items()}, Path(folder))


def _fail(codes: dict[int, int], folder: Path) -> NoReturn:
    """Raises the error of the process that most likely failed first.

    `codes` has exit codes by rank, negative for signals. The launcher ends the other processes with SIGTERM, so a process
    that ended by SIGTERM is the least likely cause.
    """

    def order(code: int) -> int:
        """Returns a sort key of an exit code: the lower the key, the more likely the process with this code failed first.

        The keys are 0 for any signal but SIGTERM, 1 for a user error, 2 for another error, and 3 for SIGTERM.
        """
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return 3
        return 0 if code < 0 else 1 if code == 2 else 2

    rank, code = min(codes.items(), key=lambda item: (order(item[1]), item[0]))
    if order(code) == 0:
        cause = f"process {rank} of the training was killed by signal {-code}"
        raise Stopped(f"{cause}; the next run resumes from the last saved state", -code)
    if rank == 0 or order(code) == 3:
        sys.exit(code if code > 0 else 128 - code)
    log = next(folder.glob(f"*/*/{rank}/stderr.log"), None)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log else []
    raise InputError(f"process {rank}: " + (lines[-1].removeprefix("ddpm: ") if lines else f"exit code {code}"))
