"""The device and the precision to compute in: CUDA, MPS and the CPU are told apart here only."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from system.cli import shorten
from system.errors import UserError

# Dense bf16 peak in FLOP/s from NVIDIA's datasheets, by a part of the device name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def choose_device(name: str) -> torch.device:
    """Returns the named device; "auto" is CUDA, else MPS, else the CPU. Raises UserError if there is no such device."""
    if name == "auto":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(candidate for candidate, is_available in available.items() if is_available)
    try:
        device = torch.device(name)
        torch.ones(1, device=device) + 1  # a GPU that this PyTorch has no kernels for fails here
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"no device {name!r} on this machine ({shorten(str(error), 200)}): try --device auto, or cpu"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # the default device for streams and events
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length: see `fast_attention`
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the named precision; "auto" is bf16 on CUDA, fp16 on GPUs without bf16, fp32 on other devices.

    Training on the CPU chooses with `multiplies_faster_in_bfloat16`.
    """
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        name = "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def multiplies_faster_in_bfloat16(width: int) -> bool:
    """Whether this CPU multiplies the matrices of a model of this width faster in bfloat16 than in float32.

    Measures it in milliseconds. Processors without bfloat16 are more than ten times as slow, those with it two to six
    times as fast. Below a width of 128 the products are too small to matter.
    """
    if width < 128:
        return False
    x, weight = torch.randn(2**17 // width, width), torch.randn(4 * width, width)
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(4):
        for dtype, seconds in times.items():
            a, b = x.to(dtype), weight.to(dtype)
            start = time.perf_counter()
            a @ b.t()
            seconds.append(time.perf_counter() - start)
    return 1.5 * min(times[torch.bfloat16]) < min(times[torch.float32])


def uses_compile(mode: str, device: torch.device) -> bool:
    """Whether `--compile` asks for `torch.compile` on a device: "on", or "auto" on CUDA."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Returns the context in which a forward pass computes in `dtype`."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


@dataclass(frozen=True)
class Probe:
    """What a model computes for a short text."""

    logits: torch.Tensor
    """float32 (T, n_tokens), on the CPU; the mean of each row is 0, as the loss does not depend on it"""
    loss: float
    """nats per token"""
    grad_norm: float
    """0 if no gradient was asked for"""
    next_token: int
    """the likeliest, as the device finds it"""

    @classmethod
    def of(cls, model: Any, precision: contextlib.AbstractContextManager, gradient: bool = False) -> Probe:
        """Runs a GPT where it lies, uncompiled and without dropout, over at most 64 seeded random tokens."""
        device, config, was_training = model.lm_head.weight.device, model.config, model.training
        n = config.n_classes or config.n_tokens
        generator, length = torch.Generator().manual_seed(0), min(64, config.block_size)
        tokens = torch.randint(config.n_tokens, (1, length), generator=generator).to(device)
        model.eval()
        with torch.set_grad_enabled(gradient), precision:
            hidden = model.hidden(tokens)[0]
            loss = model(tokens, tokens % n) / length
        trained = [p for p in model.parameters() if p.requires_grad] if gradient else []
        norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, trained)) if trained else torch.zeros(())
        model.train(was_training)
        # In float32: a head in bfloat16 rounds logits near -100, such as GPT-2's, by up to 0.25.
        logits = hidden.detach().float() @ model.lm_head.weight.detach().float().t()[:, :n]
        centered = (logits - logits.mean(dim=-1, keepdim=True)).cpu()
        return cls(centered, loss.item(), norm.item(), int(logits[-1].argmax()))

    def agrees(self, device: torch.device, dtype: torch.dtype, expected: Probe, is_chosen: bool) -> bool:
        """Whether a device computed in `dtype` what the CPU computed in float32. If not, it says so, and raises
        UserError if the user chose the device.

        The tolerances lie between rounding and faults. With random and with trained weights, bfloat16 changed logits by
        1.1% at most, float16 by 0.2%; a missing mask or one transposed matrix changed them by 21% and more.
        """
        error = (self.logits - expected.logits).norm() / expected.logits.norm().clamp(min=1e-9)
        gap = expected.logits[-1].max() - expected.logits[-1, self.next_token]
        errors = (
            error.item(),
            10 * abs(self.loss - expected.loss) / max(expected.loss, 1e-9),  # rounding changed it by 0.12% at most
            abs(self.grad_norm - expected.grad_norm) / max(expected.grad_norm, 1e-9),
            (gap / expected.logits[-1].std().clamp(min=1e-9)).item(),
        )
        tolerance = 0.05 if dtype == torch.bfloat16 else 0.02
        if all(error < tolerance for error in errors):  # NaN is not
            return True
        problem = (
            f"{device} does not compute what the CPU computes: loss {self.loss:.4g} instead of {expected.loss:.4g}, "
            f"gradient norm {self.grad_norm:.4g} instead of {expected.grad_norm:.4g}, next token {self.next_token} "
            f"instead of {int(expected.logits[-1].argmax())}, logits off by {errors[0]:.1%}"
        )
        if is_chosen:
            raise UserError(f"{problem}: update PyTorch, use --device cpu, or --no-device-check at your own risk")
        print(f"{problem}; going on on the CPU", file=sys.stderr)
        return False


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 FLOP/s of a CUDA device by its datasheet, or None for an unknown device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def fast_attention(on: bool = True) -> contextlib.AbstractContextManager:
    """Returns the context in which attention prefers cuDNN's kernel, the fastest on Hopper, to Flash attention.

    Only for fixed shapes without dropout: cuDNN plans for tens of milliseconds for each new shape, once per thread.
    With `on` false, on other GPUs than Hopper and on other devices, the context changes nothing.
    """
    if not (on and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: of the GPU, or on other devices the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # what it keeps, which is about the peak
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory(device: torch.device) -> int:
    """Returns how many bytes of memory this process can have at most: of the GPU, or of the machine or container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # not on Windows
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def machine(device: torch.device) -> str:
    """Returns the processor, the GPU if it is used, and the versions of the software, in one line."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return f"{gpu}{processor}, {os.cpu_count()} cores; torch {torch.__version__}, Python {platform.python_version()}"


def free_memory(device: torch.device) -> None:
    """Returns unused cached memory of a GPU to the driver, and resets its `peak_memory`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()


def keep_memory() -> None:
    """Makes this process keep freed memory for its next allocations. Does nothing except on Linux with glibc.

    By default glibc returns large blocks to the kernel at every free and gets new ones page by page. That took a tenth
    of a training step on the CPU (`python -m benchmarks.training`).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks on the heap too
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB of free heap


def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Starts to copy a small tensor (n,) to the host. The returned function waits for the copy and returns the numbers.

    The wait does not include work that was queued on the GPU after this call.
    """
    host, wait = copy_to_host(values)

    def read() -> list[float]:
        wait()
        return host.tolist()

    return read


def copy_to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """Copies a small tensor to the host; returns the copy, and a function that waits for it, on the same thread.

    Work that comes later on the tensor does not change the copy. On CUDA the copy, to pinned memory, is only queued.
    """
    if tensor.device.type != "cuda":
        return copied(tensor), lambda: None
    host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a tensor on the host, for large tensors: pinned memory is rounded up and never given back."""
    return tensor.to("cpu", copy=True)
