"""A pretended GPU: tensors that say they are on "cuda:0" or "mps:0", and compute real numbers on the CPU.

Inside `with PretendedGpu() as gpu`, everything that asks for the device runs as it would there. A tensor of the device
beside one of the host raises. For "cuda", autocast casts as the documentation of torch.amp says, a copy to pinned
memory arrives when somebody waits for it, a captured graph repeats its operations on the same memory, and `gpu.waits`
names the operations for which the host would have waited. `torch.compile` returns what it gets.

It imitates a device, through private interfaces of PyTorch 2.11 to 2.13, and nothing of this project.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
LOW_PRECISION = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}
FLOAT32 = {"layer_norm", "log_softmax", "softmax", "cross_entropy", "nll_loss", "norm", "sum", "exp", "log", "pow"}
"""Functions that autocast computes in the low precision, and in float32."""
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten.is_nonzero}
COPYING = {aten.copy_, aten._to_copy}
ACROSS = {*COPYING, aten.index, aten.index_put_, aten.set_}
"""Operations that take tensors of the host and of the device."""
MEMORY = 80 * 10**9

pinned = WeakTensorKeyDictionary()
run_thread = threading.Thread.run


class DeviceTensor(torch.Tensor):
    """A tensor of the device. Python sees its device, C++ sees "meta", and `host` holds the numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device="meta"
            )
        self.host = host
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: PretendedGpu.current.device)
    is_cuda = property(lambda self: self.device.type == "cuda")
    is_mps = property(lambda self: self.device.type == "mps")

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendedGpu.current.run(operation, args, kwargs or {})

    def tolist(self) -> Any:
        PretendedGpu.current.wait("tolist")
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.host!r})"


class HostGenerator(torch.Generator):
    """The generator of the device draws the numbers of the CPU's."""

    def __new__(cls, device: Any = None) -> HostGenerator:
        return super().__new__(cls, "cpu")


class Event:
    """Marks a place in the queue of copies."""

    place = 0

    def record(self, stream: Any = None) -> None:
        self.place = PretendedGpu.current.n_copies

    def synchronize(self) -> None:
        PretendedGpu.current.finish_copies(self.place)


class Graph:
    """The operations of a capture."""

    def __init__(self) -> None:
        self.recorded: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def replay(self) -> None:
        for operation, args, kwargs, outputs in self.recorded:
            for old, new in zip(tensors_in(outputs), tensors_in(operation(*args, **kwargs)), strict=True):
                if old is not new:
                    old.copy_(new)


class Functions(TorchFunctionMode):
    """Calls `gpu.faults` instead of the functions that they name, and casts as autocast does on the device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs, name = PretendedGpu.current, kwargs or {}, getattr(function, "__name__", "")
        if function is torch.device:
            return function(*args, **kwargs)
        # C++ would ask a driver for the index.
        args = [gpu.device if isinstance(x, str | torch.device) and str(x) == gpu.device.type else x for x in args]
        if isinstance(device := kwargs.get("device"), str | torch.device) and str(device) == gpu.device.type:
            kwargs = {**kwargs, "device": gpu.device}
        if name == "backward":
            return self.backward(*args, **kwargs)
        if name in gpu.faults and gpu.device in [getattr(x, "device", x) for x in (*args, *kwargs.values())]:
            function = gpu.faults[name]
        is_cast = name in LOW_PRECISION | FLOAT32 and "out" not in kwargs
        if not is_cast or not torch.is_autocast_enabled(gpu.device.type):
            return function(*args, **kwargs)
        dtype = torch.float32 if name in FLOAT32 else torch.get_autocast_dtype(gpu.device.type)
        cast: Callable[[Any], Any] = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
        args, kwargs = mapped(args, DeviceTensor, cast), mapped(kwargs, DeviceTensor, cast)
        with torch.autocast(gpu.device.type, enabled=False):
            return function(*args, **kwargs)

    def backward(self, loss: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
        """Runs the backward pass inside this mode, since `checkpoint` computes a layer again there."""
        with self:
            gradient = torch.ones_like(loss) if gradient is None else gradient
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,), (gradient,), bool(options.get("retain_graph")), False, (), True, accumulate_grad=True
            )


class PretendedGpu(TorchDispatchMode):
    """The device. `faults` name the functions that it computes wrongly, and what it computes instead."""

    current: PretendedGpu

    def __init__(self, kind: str = "cuda", capability: tuple[int, int] = (9, 0)):
        super().__init__()
        self.device, self.capability = torch.device(kind, 0), capability
        self.faults: dict[str, Callable[..., Any]] = {}
        self.waits: list[str] = []
        self.graph: Graph | None = None
        self.n_copies = self.largest_pinned = 0
        self.copies: list[tuple[int, Tensor, Tensor]] = []

    def __enter__(self) -> PretendedGpu:
        PretendedGpu.current = self
        self.stack = contextlib.ExitStack()
        for owner, name, value in self.replacements():
            self.stack.enter_context(patch.object(owner, name, value))
        lifts, swaps = torch._C._only_lift_cpu_tensors(), torch.__future__.get_swap_module_params_on_conversion()
        self.stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        self.stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` copies where we see it
        torch.__future__.set_swap_module_params_on_conversion(True)  # `Module.to` keeps tied weights tied
        self.stack.enter_context(Functions())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def replacements(self) -> Iterator[tuple[Any, str, Any]]:
        """Yields what the device is asked for: the owner of a function, its name, and the function."""
        yield torch, "Generator", HostGenerator
        yield threading.Thread, "run", lambda thread: self.run_thread(thread)
        yield torch, "compile", lambda function=None, **options: function or (lambda function: function)
        if self.device.type == "mps":
            yield torch.backends.mps, "is_available", lambda: True
            yield torch.mps, "recommended_max_memory", lambda: MEMORY
            yield torch.mps, "driver_allocated_memory", lambda: 0
            yield torch.mps, "empty_cache", lambda: None
            return
        answers = {
            "is_available": True,
            "current_device": 0,
            "max_memory_allocated": 0,
            "get_device_capability": self.capability,
            "get_device_name": "NVIDIA H100 80GB HBM3",
            "get_device_properties": types.SimpleNamespace(total_memory=MEMORY),
            "is_bf16_supported": self.capability >= (8, 0),
            "is_current_stream_capturing": False,
            "device": contextlib.nullcontext(),
            "_lazy_init": None,
            **dict.fromkeys(("set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed_all")),
        }
        for name, answer in answers.items():
            yield torch.cuda, name, lambda *args, answer=answer, **kwargs: answer
        yield torch.cuda, "synchronize", lambda device=None: self.finish_copies(self.n_copies)
        yield torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()
        yield torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)
        yield torch.cuda, "Event", Event
        yield torch.cuda, "CUDAGraph", Graph
        yield torch.cuda, "graph", self.capture
        yield torch.Tensor, "pin_memory", lambda tensor: pin(tensor.clone())
        join = dist.init_process_group
        yield dist, "init_process_group", lambda backend, device_id: join("gloo")

    def run_thread(self, thread: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # of this thread
        with Functions(), PretendedThread():
            run_thread(thread)

    @contextlib.contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(operation, args, kwargs or {})

    def wait(self, operation: Any) -> None:
        """The host waits here for the device."""
        if self.graph:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {operation}")
        self.waits.append(str(operation))
        self.finish_copies(self.n_copies)

    def finish_copies(self, place: int) -> None:
        while self.copies and self.copies[0][0] < place:
            _, target, values = self.copies.pop(0)
            with _disable_current_modes():
                target.copy_(values)

    def run(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operation of ATen on the host, and returns tensors of the device if it has any."""
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
            operation.name(), "CompositeImplicitAutograd"
        ):  # without autograd, nothing has taken the operation apart yet
            with contextlib.ExitStack() as stack:
                TorchDispatchMode.__enter__(self)
                stack.callback(TorchDispatchMode.__exit__, self, None, None, None)
                return operation.decompose(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        was_here = bool(tensors) and isinstance(tensors[0], DeviceTensor)
        is_from_here = stays = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        if (device := kwargs.get("device")) is not None:
            if str(torch.utils._device.CURRENT_DEVICE) == "meta":
                return operation(*args, **kwargs)
            stays, kwargs = torch.device(device).type != "cpu", {**kwargs, "device": torch.device("cpu")}
        is_pinned = bool(kwargs.pop("pin_memory", False))
        if not stays and not was_here:
            result = operation(*args, **kwargs)
            return pin(result) if is_pinned else result
        self.check(operation.overloadpacket, args, kwargs, tensors, was_here, stays)
        if operation.overloadpacket is aten.copy_ and not isinstance(args[0], DeviceTensor):
            return self.copy_to_host(*args, **kwargs)
        host_args, host_kwargs = (mapped(x, DeviceTensor, lambda tensor: tensor.host) for x in (args, kwargs))
        on_host = addmm_in_float32 if operation is aten.addmm.dtype_out else operation
        result = on_host(*host_args, **host_kwargs)
        if self.graph:
            self.graph.recorded.append((on_host, host_args, host_kwargs, result))
        if not stays:
            return pin(result) if is_pinned else result
        wrapped = mapped(result, Tensor, DeviceTensor)
        return return_and_correct_aliasing(operation, args, kwargs, wrapped) if is_from_here else wrapped

    def check(self, packet: Any, args: Any, kwargs: Any, tensors: list[Tensor], was_here: bool, stays: bool) -> None:
        """Raises what the device would raise, and notes where the host would wait."""
        if was_here and packet not in ACROSS and any(t.dim() and not isinstance(t, DeviceTensor) for t in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, {self.device} and cpu, in {packet}")
        is_float64 = torch.float64 in (kwargs.get("dtype"), *(t.dtype for t in tensors if isinstance(t, DeviceTensor)))
        if self.device.type == "mps" and stays and is_float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        source = args[1] if packet is aten.copy_ else args[0] if packet is aten._to_copy else None
        crosses = source is not None and isinstance(source, DeviceTensor) != (
            was_here if packet is aten.copy_ else stays
        )
        is_async = crosses and (kwargs.get("non_blocking") or args[2:3] == (True,))
        to_host = packet is aten.copy_ and not was_here
        if packet in WAITING or (crosses and not (is_async and (args[0] if to_host else source) in pinned)):
            self.wait(packet)

    def copy_to_host(self, target: Tensor, source: DeviceTensor, non_blocking: bool = False) -> Tensor:
        """Copies to the host; without waiting, the numbers arrive later, and until then the target is nonsense."""
        if not (non_blocking and target in pinned):
            return target.copy_(source.host)
        self.copies.append((self.n_copies, target, source.host.clone()))
        self.n_copies += 1
        return target.fill_(float("nan") if target.is_floating_point() else torch.iinfo(target.dtype).max)


class PretendedThread(TorchDispatchMode):
    """The device in another thread: modes belong to a thread."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendedGpu.current.run(operation, args, kwargs or {})


def mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Applies a function to everything of a kind in nested lists, tuples and dicts; faster than PyTorch's trees."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(x, kind, function) for x in value)
    return {name: mapped(x, kind, function) for name, x in value.items()} if isinstance(value, dict) else value


def tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, Tensor, found.append)
    return found


def pin(tensor: Tensor) -> Tensor:
    pinned[tensor] = True
    PretendedGpu.current.largest_pinned = max(PretendedGpu.current.largest_pinned, tensor.nbytes)
    return tensor


def addmm_in_float32(c: Tensor, a: Tensor, b: Tensor, out_dtype: Any, *, out: Tensor) -> Tensor:
    """The overload of `addmm` that only CUDA has, with its checks."""
    assert a.dtype == b.dtype, f"mat1 and mat2 must have the same dtype, but got {a.dtype} and {b.dtype}"
    assert out_dtype == a.dtype or (out_dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16))
    assert out_dtype == out.dtype and c.dtype in (out_dtype, a.dtype)
    return torch.addmm(c.to(out_dtype), a.to(out_dtype), b.to(out_dtype), out=out)
