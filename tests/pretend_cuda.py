"""A CUDA device that computes on the CPU and refuses what CUDA refuses: tensors of two devices in one operation, and copies to NumPy.

Tensors on it are `OnCuda` around a CPU tensor; they say that they are on `cuda:0`. A `PretendCuda` mode sees every operator, asks where
its tensors are, and runs it on the CPU. So a whole run can be followed on a machine without a GPU, with numbers that are the CPU's.
What it does not model: memory, streams, speed, and kernels that exist on one device only.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)


class MixedDevicesError(RuntimeError):
    """What CUDA would have refused."""


def crossing(name: str, value: Any) -> Any:
    """A number that the host reads from the device."""
    PretendCuda.crossings.append(name)
    return value


class OnCuda(torch.Tensor):
    """A tensor of the device, around its CPU tensor `inner`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCuda":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def __repr__(self) -> str:
        return f"OnCuda({self.inner!r})"

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    # Answered here, since torch's own would ask for the device's guard, which a build for the CPU does not have.
    def tolist(self) -> Any:
        return crossing("tolist", self.inner.tolist())

    def item(self) -> Any:
        return crossing("item", self.inner.item())

    def __float__(self) -> float:
        return crossing("float", float(self.inner))

    def __int__(self) -> int:
        return crossing("int", int(self.inner))

    def __bool__(self) -> bool:
        return crossing("bool", bool(self.inner))

    def __index__(self) -> int:
        return crossing("index", self.inner.__index__())

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Generator(torch.Generator):
    """`torch.Generator`, also of the device; the numbers are the CPU's."""

    on_cuda: bool

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls)
        made.on_cuda = torch.device(device).type == "cuda"
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE if self.on_cuda else torch.device("cpu")


# Operators that take tensors of two devices: copies, and indexing, whose indices may lie on the CPU.
COPIES = (aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
# CUDA's attention operators, by the CPU's; what else they return is not looked at here.
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: where it runs, whether its tensors may go together, and its result on the device that it is on."""
    tensors = tensors_in(args) + tensors_in(kwargs)
    there = [x for x in tensors if isinstance(x, OnCuda)]
    check_devices(func, tensors, there)
    asked = kwargs.get("device")
    on_cuda = torch.device(asked).type == "cuda" if asked is not None else bool(there)
    if (func in COPIES and bool(there) != on_cuda) or (func is aten.copy_.default and len(there) == 1):
        PretendCuda.crossings.append(str(func))
    plain_args, plain_kwargs = unwrapped(args), unwrapped(kwargs)
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu") if on_cuda else asked
    if on_cuda and plain_kwargs.get("pin_memory"):
        raise MixedDevicesError(f"{func}: only dense CPU tensors can be pinned")
    plain_kwargs.pop("pin_memory", None)
    if func in ATTENTION:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*plain_args[:3])
        others = [OnCuda(torch.empty(0)) if "Tensor" in str(x.type) else 0 for x in func._schema.returns[2:]]
        return OnCuda(out), OnCuda(lse), *others
    if func is aten.bmm.dtype:  # of half precision with sums in fp32, which the CPU has no operator for
        out = torch.bmm(*(x.to(plain_args[2]) for x in plain_args[:2]))
    else:
        out = func(*plain_args, **plain_kwargs)
    made = mapped(out, Tensor, OnCuda) if on_cuda else out
    return return_and_correct_aliasing(func, args, kwargs, made) if there else made


def unwrapped(tree: Any) -> Any:
    """The CPU's tensors in place of the device's."""
    return mapped(tree, OnCuda, attrgetter("inner"))


def mapped(tree: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """Arguments or results of an operator with `change` of every value of a kind; torch's `tree_map` takes longer than the operator."""
    if isinstance(tree, kind):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)([mapped(x, kind, change) for x in tree])
    if isinstance(tree, tuple):  # a named one of torch, which is made of an iterable, or Python's own
        items = [mapped(x, kind, change) for x in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {name: mapped(x, kind, change) for name, x in tree.items()}
    return tree


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among arguments, in order."""
    found: list[Tensor] = []
    mapped(tree, Tensor, found.append)
    return found


def check_devices(func: Any, tensors: list[Tensor], there: list[Tensor]) -> None:
    """Raise MixedDevicesError where CUDA would."""
    here = [x for x in tensors if not isinstance(x, OnCuda) and x.device.type == "cpu"]
    if func.namespace == "c10d" and here and PretendCuda.nccl:
        raise MixedDevicesError(f"{func}: No backend type associated with device type cpu")
    if not there or not here or func in COPIES:
        return
    scalars = torch.Tag.pointwise in func.tags or func in (aten.fill_.Tensor, aten.masked_fill.Tensor)
    if scalars and all(x.dim() == 0 for x in here):
        return
    shapes = [tuple(x.shape) for x in here]
    raise MixedDevicesError(
        f"{func}: expected all tensors on one device, found cuda:0 and cpu; those on the CPU have shapes {shapes}"
    )


class PretendCuda(TorchDispatchMode):
    """While it is on, `cuda` is the pretended device."""

    crossings: ClassVar[list[str]] = []  # copies between host and device, for each of which CUDA makes the host wait
    nccl = False  # whether the process group is to be NCCL's, which moves tensors of the device only

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


# Bindings that take the device's guard before they dispatch, by the operator behind them.
GUARDED = {
    torch.Tensor.contiguous: aten.contiguous,
    torch.Tensor.copy_: aten.copy_,
    torch.Tensor.nonzero: aten.nonzero,
    torch.Tensor.__invert__: aten.bitwise_not,
    torch.Tensor.float: lambda x: x.to(torch.float32),
    torch.Tensor.double: lambda x: x.to(torch.float64),
    torch.Tensor.bfloat16: lambda x: x.to(torch.bfloat16),
    torch.Tensor.half: lambda x: x.to(torch.float16),
    torch.Tensor.long: lambda x: x.to(torch.int64),
    torch.Tensor.int: lambda x: x.to(torch.int32),
    torch.Tensor.bool: lambda x: x.to(torch.bool),
    torch.Tensor.new_tensor: lambda x, data: crossing("new_tensor", OnCuda(x.inner.new_tensor(data))),
}


class NoDriver(TorchFunctionMode):
    """Answers what torch's bindings would ask the driver: which GPU `cuda` is, and the guard under which they index."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        args, kwargs = mapped((args, kwargs or {}), (str, torch.device), lambda x: DEVICE if str(x) == "cuda" else x)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnCuda):
            return OnCuda(args[0].inner[unwrapped(args[1])])
        if func is torch.Tensor.__setitem__ and isinstance(args[0], OnCuda):
            args[0].inner[unwrapped(args[1])] = unwrapped(args[2])
            return None
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "on_cuda", False) != (kwargs.get("device") == DEVICE):
            raise MixedDevicesError(f"{func}: the generator is of another device than the numbers")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if func in GUARDED and isinstance(args[0], OnCuda):
            return GUARDED[func](*args, **kwargs)
        return func(*args, **kwargs)


class Event:
    """A CUDA event whose work is done."""

    def record(self, stream: Any = None) -> None:
        """Nothing is queued here."""

    def query(self) -> bool:
        return True


class Stream:
    """A CUDA stream on which everything is done at once; a class, as diffusers names it in annotations."""

    def __init__(self, *_args: Any) -> None:
        """Of any device."""


@contextmanager
def pretend_cuda(*, nccl: bool = False) -> Iterator[None]:
    """A process that sees one GPU; with `nccl` its process group refuses tensors of the CPU, as NCCL does."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30, major=9, minor=0)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "current_stream": None,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "mem_get_info": (40 * 2**30, 80 * 2**30),
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "set_device": None,
    }
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_args, answer=answer: answer))
        stack.enter_context(mock.patch.object(torch.cuda, "default_generators", (torch.default_generator,)))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(torch.backends.cudnn, "version", lambda: 92000))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        if nccl:
            stack.enter_context(mock.patch.object(PretendCuda, "nccl", True))
            stack.enter_context(mock.patch.object(torch.distributed, "get_backend", lambda _group=None: "nccl"))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", Event))
        stack.enter_context(mock.patch.object(torch.cuda, "Stream", Stream))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", lambda _stream: nullcontext()))
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapped)
        stack.enter_context(torch.no_grad())  # torch's autograd would ask for the device's guard
        stack.enter_context(PretendCuda())
        stack.enter_context(NoDriver())
        yield
