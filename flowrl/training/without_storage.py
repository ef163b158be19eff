"""Tensors that have shapes and types but no storage, and a count of the bytes that they would take."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch._subclasses.fake_tensor import op_implementations_checks as own_rules
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
DEVICE_OF, LIFTED = torch.ops.prim.device.default, torch.ops.aten.lift_fresh.default


class WithoutStorage(FakeTensorMode):
    """Mode in which tensors have no storage, and the bytes that are alive are counted.

    torch finds out about an operation in many steps. A plain one needs few of them: its kernel for the meta device
    gives the shapes, once for each kind of arguments. Any other goes torch's own way.

    Attributes:
        live: Bytes that are alive.
        peak: The most that was alive at once in the current phase.
        phases: The most that was alive at once in each phase.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what keeps the compiler out of this mode would import it

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.results: dict[tuple[Any, ...], Any] = {}
        self.sizes: dict[int, int] = {}
        self.live = self.peak = self.depth = 0
        self.phases: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the most that is alive at once."""
        gc.collect()
        self.peak = self.live
        yield
        self.phases[name] = max(self.peak, self.phases.get(name, 0))

    def within(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Give the same work, as part of a phase."""

        def noted(*args: Any) -> Any:
            with self.phase(name):
                return work(*args)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            return args[0].fake_device
        self.depth += 1  # torch takes some operations apart in this mode: what lives within them is not counted
        try:
            result = self._plain(func, args, kwargs or {})
            if result is NotImplemented:
                result = self.dispatch(func, types, args, kwargs or {})
        finally:
            self.depth -= 1
        if not self.depth:
            for leaf in (result,) if isinstance(result, torch.Tensor | torch.device) else tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._note(leaf.untyped_storage())
        return result

    def _plain(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation by its kernel for shapes alone, once for each kind of arguments; else `NotImplemented`."""
        if func is LIFTED and type(args[0]) is torch.Tensor:
            return self._lifted(args[0])
        kind = _kind_of(func)
        if kind is None:
            return NotImplemented
        key: list[Any] = [func, *kwargs]
        for arg in (*args, *kwargs.values()):
            for item in arg if isinstance(arg, list | tuple) else (arg,):
                if not isinstance(item, torch.Tensor):
                    key.append((type(item), item))
                elif type(item) is not FakeTensor or item.constant is not None or item.fake_device != CPU:
                    return NotImplemented
                else:
                    key.append(_layout(item))
            key.append(None)
        known = None if kind.writes else self.results.get(tuple(key))
        if known is None:
            result = self._run(func, kind.rules, args, kwargs)
            if not kind.writes and _is_known_by_layout(result, args, kind.is_view):
                self.results[tuple(key)] = tree_map_only(torch.Tensor, _layout, result)
            return result
        if kind.is_view:
            with in_kernel_invocation_manager(self):
                result = torch.ops.aten.as_strided.default(args[0], known[0], known[1], known[3])
            return FakeTensor(self, result, CPU)
        return tree_map_only(_Layout, self._made, known)

    def _lifted(self, real: torch.Tensor) -> Any:
        """Stand in for a tensor made of Python's numbers; a single one keeps its value."""
        if real.device != CPU or real.layout != torch.strided:
            return NotImplemented
        constant = real.clone() if self.may_turn_const(real) else None
        empty = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
        made = FakeTensor(self, empty, CPU, constant=constant)
        if constant is not None:
            self.fake_tensor_converter.add_constant_storage_mapping(made)
        return made

    def _run(self, func: Any, rules: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for rule in rules:
            result = rule(self, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if kwargs.get("device") is not None:
            return NotImplemented
        with in_kernel_invocation_manager(self):
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            return self._own(result)
        return type(result)(map(self._own, result)) if type(result) in (list, tuple) else result

    def _own(self, result: Any) -> Any:
        if isinstance(result, torch.Tensor) and not isinstance(result, FakeTensor):
            return FakeTensor(self, result, CPU)
        return result

    def _made(self, layout: _Layout) -> Any:
        empty = torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
        return FakeTensor(self, empty, CPU)

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class _Layout(tuple[Any, ...]):
    """Shape, strides, type, and offset in its storage of a tensor."""

    __slots__ = ()


def _layout(tensor: torch.Tensor) -> _Layout:
    return _Layout((tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset()))


def _is_known_by_layout(result: Any, args: tuple[Any, ...], is_view: bool) -> bool:
    """Tell whether results can be made of their layouts: one is a view, or they are on the CPU and share nothing."""
    storages = [item.untyped_storage()._cdata for item in tree_leaves(args) if isinstance(item, torch.Tensor)]
    if is_view:
        same = isinstance(result, torch.Tensor) and [result.untyped_storage()._cdata] == storages
        return same and result.dtype == args[0].dtype  # not complex numbers as pairs of real ones
    for item in tree_leaves(result):
        if not isinstance(item, torch.Tensor):
            continue
        storage = item.untyped_storage()
        if storage._cdata in storages or storage.nbytes() != item.numel() * item.element_size():
            return False
        if item.device != CPU or item.layout != torch.strided or item.storage_offset():
            return False
        storages.append(storage._cdata)
    return True


@dataclass(frozen=True)
class _Kind:
    """Operation whose results have layouts that follow from those of its arguments.

    Attributes:
        rules: torch's own rules for it, to be tried first.
        writes: It changes its arguments, or its results are not tensors.
        is_view: Its result is a view of its first argument.
    """

    rules: list[Any]
    writes: bool
    is_view: bool


@cache
def _kind_of(func: Any) -> _Kind | None:
    """Find what kind of operation it is; None for one that is not torch's own, or that it takes apart."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return None
    name, schema = func.name(), func._schema
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "Meta"):
        return None
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
        return None
    aliases = [part.alias_info for part in (*schema.arguments, *schema.returns) if part.alias_info]
    tensors = all(str(part.type) in ("Tensor", "List[Tensor]") for part in schema.returns)
    is_view = bool(aliases) and not any(alias.is_write for alias in aliases)
    rules = [rule for applies, rule in own_rules if applies(func)]
    return _Kind(rules, not tensors or (bool(aliases) and not is_view), is_view)


def _replace_tensors(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """Put new tensors into a module, as `Module._apply` does; torch's own swaps fake ones in place, or refuses to."""
    for child in module.children() if recurse else ():
        _replace_tensors(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                converted = fn(parameter)
            if converted is not parameter:
                module._parameters[name] = torch.nn.Parameter(converted, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


def _copy_of(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """Copy a tensor without storage, as `deepcopy` does; torch's own reads the storage that is not there."""
    copied = torch.empty_like(tensor, requires_grad=False)
    if isinstance(tensor, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied, tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


@contextlib.contextmanager
def without_storage() -> Iterator[WithoutStorage]:
    """Make tensors without storage; modules can be converted and copied all the same."""
    with (
        mock.patch("torch.nn.Module._apply", _replace_tensors),
        mock.patch.object(FakeTensor, "__deepcopy__", _copy_of),
        WithoutStorage() as mode,
    ):
        yield mode
