"""A device of torch whose memory is apart from the CPU's, though its kernels are the CPU's.

`far` is a device like any other (`PrivateUse1`, the backend that torch leaves free, in Python): `device="far"` makes
tensors there, `to` moves them. Without a GPU it finds what else only a GPU would show:

- tensors of two devices in one operation, an error wherever it is one on a GPU;
- a host that waits for the device: noted in `waits`, an error within `no_waiting`.

It says nothing about speed, precision, streams or graphs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
MADE = ("empty", "empty_strided")
"""Operations that make tensors, and ask the device's backend for memory."""
CAST = ("linear", "matmul", "mm", "addmm", "bmm", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")
"""Operations that autocast runs in its type: those of them that are used here."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
COPYING = ("copy_", "_to_copy", "_copy_from")
NEEDED_BY_THE_HOST = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero", "repeat_interleave",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
"""Operations whose result, or its size, the host needs before it goes on."""
waits: list[str] = []
"""What the host waited for: operations, each with the line of flowrl that led to it."""
_forbidden = False
_has_float64 = True


class Far(torch.Tensor):
    """Tensor of the device, which holds one of the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Far:
        if held.dtype == torch.float64 and not _has_float64:
            raise TypeError("Cannot convert a tensor of this device to float64")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device="far:0")
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, *args, **(kwargs or {}))

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, given: Far) -> None:
        torch.Tensor.data.__set__(self, given)  # type: ignore[attr-defined]
        self.held = given.held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert far:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{repr(self.held).removesuffix(')')}, device='far:0')"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)


class Generator(torch.Generator):
    """Random numbers of either device, by the generator of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


Dummy: type = getattr(backend_registration, "_DummyBackendModule", object)


class Backend(Dummy):
    """`torch.far`."""

    def synchronize(self, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error when the host waits for the device, as `torch.cuda.set_sync_debug_mode("error")` does."""
    global _forbidden
    _forbidden = True
    try:
        yield
    finally:
        _forbidden = False


@contextlib.contextmanager
def no_float64() -> Iterator[None]:
    """Make float64 there an error, as it is on MPS."""
    global _has_float64
    _has_float64 = False
    try:
        yield
    finally:
        _has_float64 = True


def possible() -> bool:
    """Tell whether this version of torch can have such devices."""
    return Dummy is not object


def install() -> None:
    """Register the device; once a process, before flowrl is imported."""
    backend_registration._setup_privateuseone_for_python_backend("far", Backend())
    own, all_others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for name in MADE:
        packet = getattr(torch.ops.aten, name)
        for overload in (o for o in packet.overloads() if "out" not in o and "names" not in o):
            full = name if overload == "default" else f"{name}.{overload}"
            own.impl(full, _by(getattr(packet, overload)), "PrivateUse1")
    own.impl("_copy_from", _copy_from, "PrivateUse1")
    all_others.fallback(run, "PrivateUse1")
    all_others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in CAST:
        own.impl(name, _in_low_precision(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
    _kept.extend([own, all_others, torch.autograd.set_multithreading_enabled(False)])  # no threads of the device's own
    torch.Generator = Generator  # type: ignore[misc]
    read_file, write_file = safetensors.torch.load_file, safetensors.torch.save_file

    def load_file(filename: Any, device: Any = "cpu", **options: Any) -> dict[str, torch.Tensor]:
        is_far = torch.device(device).type == "far"
        tensors = read_file(filename, device="cpu" if is_far else device, **options)
        return {name: tensor.to("far") for name, tensor in tensors.items()} if is_far else tensors

    def save_file(tensors: dict[str, torch.Tensor], *args: Any, **options: Any) -> None:
        write_file({name: tensor.cpu() for name, tensor in tensors.items()}, *args, **options)

    safetensors.torch.load_file, safetensors.torch.save_file = load_file, save_file


_kept: list[Any] = []


def _by(operation: Any) -> Any:
    return lambda *args, **kwargs: run(operation, *args, **kwargs)


def _in_low_precision(operation: Any) -> Any:
    """Make an operation that autocast runs in its type."""

    def run_there(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("far")

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        with torch.autocast("far", enabled=False):
            args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
            return operation(*args, **kwargs)

    return run_there


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy between the devices where torch itself asks for it, as in `torch.tensor(..., device="far")`."""
    if not non_blocking:
        _wait("_copy_from")
    held = [tensor.held if isinstance(tensor, Far) else tensor for tensor in (source, target)]
    held[1].copy_(held[0])
    return target


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation by the CPU's kernel, and put its result where a device of its own would."""
    name = func._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    is_far = goes_far = any(isinstance(tensor, Far) for tensor in tensors)
    if kwargs.get("device") is not None:
        goes_far = torch.device(kwargs["device"]).type == "far"
        kwargs = {**kwargs, "device": CPU} if goes_far else kwargs
    _check_devices(func, name, tensors)
    if _waits(name, args, kwargs, is_far, goes_far):
        _wait(name)
    if name == "_fused_sdp_choice":
        return 0  # attention by its formula: fused kernels are a device's own
    near_args, near_kwargs = tree_map_only(Far, lambda tensor: tensor.held, (args, kwargs))
    result = func(*near_args, **near_kwargs)
    if name == "copy_":
        return args[0]
    return tree_map_only(torch.Tensor, lambda held: _far(held, tensors), result) if goes_far else result


def _far(held: torch.Tensor, given: list[torch.Tensor]) -> Far:
    """Give the tensor that holds this one: a new one, or that of an operation in place."""
    for tensor in given:
        if isinstance(tensor, Far) and tensor.held is held:
            if tensor.shape != held.shape:  # one that was given to hold the result
                torch.Tensor.data.__set__(tensor, Far(held))  # type: ignore[attr-defined]
            return tensor
    return Far(held)


def _check_devices(func: Any, name: str, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError for tensors of both devices where a GPU does."""
    near = [tensor for tensor in tensors if not isinstance(tensor, Far)]
    if not near or len(near) == len(tensors) or name in COPYING:
        return
    if name in INDEXING and isinstance(tensors[0], Far):  # by indices of the CPU, too
        near = [tensor for tensor in near if tensor.is_floating_point()]
    takes_numbers = torch.Tag.pointwise in func.tags or name.startswith(("_foreach_", "index_put", "masked_fill"))
    if near and not (takes_numbers and all(tensor.dim() == 0 for tensor in near)):
        found = ", ".join(f"{tuple(tensor.shape)} on {tensor.device.type}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {found}")


def _waits(name: str, args: Any, kwargs: Any, is_far: bool, goes_far: bool) -> bool:
    """Tell whether the host waits for this operation, of a GPU whose host memory is not pinned."""
    if not (is_far or goes_far):
        return False
    if name in INDEXING:
        return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "_to_copy":
        return is_far != goes_far and not kwargs.get("non_blocking")
    if name == "copy_":
        return isinstance(args[0], Far) != isinstance(args[1], Far) and not (args[2:] or kwargs.get("non_blocking"))
    return name in NEEDED_BY_THE_HOST


def _wait(name: str) -> None:
    """Note that the host waits, or raise RuntimeError where it must not."""
    if _forbidden:
        raise RuntimeError(f"the host waits for the device: {name}")
    frame: Any = sys._getframe(1)
    library = str(Path(sys.modules["flowrl"].__path__[0])) + "/" if "flowrl" in sys.modules else "no library"
    while frame is not None and not frame.f_code.co_filename.startswith(library):
        frame = frame.f_back
    place = "" if frame is None else f" {frame.f_code.co_filename.removeprefix(library)}:{frame.f_lineno}"
    waits.append(name + place)
