"""Where and in what precision to compute: the one place that tells CUDA, MPS and the CPU apart."""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from system.errors import UserError

# Dense bf16 peak in FLOP/s from NVIDIA's datasheets, by a part of the device's name.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def choose_device(name: str) -> torch.device:
    """Returns the named device; "auto" is CUDA, else MPS, else the CPU. Raises UserError where it does not exist."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less fragmentation
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name!r} here: try --device auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # whose streams and events are meant where no device is named
        torch.set_float32_matmul_precision("high")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the named precision; "auto" is bf16 on CUDA, fp16 on cards without bf16, fp32 elsewhere."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "float32" if device.type != "cuda" else "bfloat16" if has_bfloat16 else "float16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Returns the context in which a forward pass computes in `dtype`."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def peak_flops(device: torch.device) -> float | None:
    """Returns the datasheet's dense bf16 FLOP/s of a CUDA device, or None for one that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def fast_attention(on: bool = True) -> contextlib.AbstractContextManager:
    """Returns the context in which CUDA's attention is cuDNN's where it can be, the fastest on Hopper; else Flash's."""
    if not (on and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9):
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def peak_memory(device: torch.device) -> int:
    """Returns the most memory in bytes that this process has used: of the GPU, on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> None:
    """Gives back what is no longer used on a GPU, and counts its `peak_memory` anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()


def keep_memory() -> None:
    """Has this process keep the memory that it frees, for its next step; on Linux with glibc, else nothing happens.

    Unasked, glibc hands large blocks back to the kernel at every free and gets them again page by page, which took a
    tenth of a training step on the CPU (`python -m benchmarks.training`).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large allocation
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB free at the end of the heap


def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Starts copying a small tensor to the host; the returned function waits for it alone and gives its numbers."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait():
        event.synchronize()
        return host.tolist()

    return wait
