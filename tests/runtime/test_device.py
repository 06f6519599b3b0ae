"""Checks which errors mean that a device is out of memory, and how the device is recorded."""

from __future__ import annotations

import pytest
import torch

from ddpm.errors import InputError
from ddpm.provenance.run_record import _hardware
from ddpm.runtime.device import memory_errors


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_memory_that_ran_out_is_one_line(error: Exception) -> None:
    with pytest.raises(InputError) as found, memory_errors("sample", "lower sampling.batch"):
        raise error
    line = str(found.value)
    assert line.startswith("sample: out of memory: lower sampling.batch (") and "\n" not in line


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access was encountered", "shape '[2]' is invalid"])
def test_other_errors_stay_what_they_are(text: str) -> None:
    with pytest.raises(RuntimeError, match=text.replace("[", r"\[")), memory_errors("sample", "lower sampling.batch"):
        raise RuntimeError(text)


def test_the_record_names_a_gpu_only_where_it_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is recorded only if it was used. `compute.device: cpu`, and stages that compute nothing, may run beside a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    about = _hardware()
    assert about["device"] == "cpu" and "gpu" not in about["hardware"] and "gpu_peak_memory_bytes" not in about
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    about = _hardware()
    assert about["device"] == "cuda" and about["hardware"]["gpu"] == "a GPU" and about["gpu_peak_memory_bytes"] == 5
