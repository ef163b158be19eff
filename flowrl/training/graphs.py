"""CUDA graphs: work on small networks, whose kernels take longer to launch than to run, is captured and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from flowrl.types import Role

if TYPE_CHECKING:
    from flowrl.training.role_networks import RoleNetworks

Tensors = tuple[torch.Tensor, ...]
Work = Callable[..., Tensors]

SMALL = 100_000_000
"""Parameters up to which a network is worth it; kernels of larger ones keep a GPU busy by themselves."""
MOST = 16
"""Graphs that are kept, each with the memory of its work."""
SEEN = 256
"""Pieces of work that are remembered."""


class Graphs:
    """Pieces of work on one device, each captured at its third call and replayed from then on.

    The first call may set things up; the second tells whether the host waits for the device in it, which cannot be
    captured. Work of which a piece cannot be captured is not captured any more, with a warning.

    Args:
        networks: What the work goes through: its count of evaluations and its working copies are kept up to date.
        device: Device of the work.
        wanted: Whether anything is to be captured, on CUDA and for a small network.

    Attributes:
        is_on: Whether anything is captured.
        generators: Sources of random numbers of the work, beside the device's own.
    """

    def __init__(self, networks: RoleNetworks, device: torch.device | str, wanted: bool = True) -> None:
        size = sum(p.numel() for p in networks.model.network.parameters())
        self.is_on = wanted and torch.device(device).type == "cuda" and size <= SMALL
        self.networks, self.device = networks, torch.device(device)
        self.generators: list[torch.Generator] = []
        self._calls: dict[Hashable, int] = {}
        self._captured: dict[Hashable, _Captured] = {}
        self._roles: dict[Hashable, set[Role]] = {}  # whose working copies a piece of work uses
        self._given_up: set[str] = set()

    def run(
        self, kind: str, key: Hashable, work: Work, *inputs: torch.Tensor, gradients: Sequence[nn.Parameter] = ()
    ) -> Tensors:
        """Do work on tensors, or replay it.

        Args:
            kind: What it is, for messages.
            key: Everything else that the work depends on: it is the same work when kind, key, shapes and types of the
                inputs and the addresses of the weights are the same.
            work: Gives tensors for the inputs. Other tensors that it reads must keep their addresses.
            inputs: Its inputs.
            gradients: Parameters whose gradients it makes; they are those of the newest call.
        """
        if not self.is_on or kind in self._given_up:
            return work(*inputs)
        whole = (kind, key, self._address(), tuple((i.shape, i.dtype) for i in inputs))
        if whole in self._captured:
            return self._captured[whole].replay(inputs)
        calls = self._calls[whole] = self._calls.pop(whole, 0) + 1
        if len(self._calls) > SEEN:
            oldest = next(iter(self._calls))
            del self._calls[oldest]
            self._roles.pop(oldest, None)
        if calls == 1 or len(self._captured) >= MOST:
            return work(*inputs)
        if calls > 2:
            return self._capture(kind, whole, work, inputs, gradients)
        return self._checked(kind, whole, work, inputs)

    def forget(self) -> None:
        """Forget what was captured."""
        for kept in (self._captured, self._calls, self._roles):
            kept.clear()

    def _address(self) -> int:
        return next(self.networks.model.network.parameters()).data_ptr()

    def _checked(self, kind: str, whole: Hashable, work: Work, inputs: Tensors) -> Tensors:
        """Do the work where waiting for the device is an error, or give up."""
        with self._or_given_up(kind), CudaGraph.strict():
            self.networks.asked = set()
            result = work(*inputs)
            self._roles[whole] = self.networks.asked
            return result
        return work(*inputs)

    def _capture(
        self, kind: str, whole: Hashable, work: Work, inputs: Tensors, gradients: Sequence[nn.Parameter]
    ) -> Tensors:
        with self._or_given_up(kind):
            self._captured[whole] = _Captured(self, work, inputs, gradients, self._roles[whole])
            return self._captured[whole].replay(inputs)
        return work(*inputs)

    @contextmanager
    def _or_given_up(self, kind: str) -> Iterator[None]:
        """Go on where work cannot be captured, as if it had not been tried."""
        generators = (CudaGraph.default_generator(self.device), *self.generators)
        states = [(generator, generator.get_state()) for generator in generators]
        spent = self.networks.spent[0]
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._given_up.add(kind)
            for generator, state in states:
                generator.set_state(state)
            self.networks.spent[0] = spent
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"{kind} runs without CUDA graphs, which cannot hold it: {text}", stacklevel=4)


class _Captured:
    """Work in a CUDA graph, and what happens around it on the host."""

    def __init__(
        self, graphs: Graphs, work: Work, inputs: Tensors, gradients: Sequence[nn.Parameter], roles: set[Role]
    ) -> None:
        self.networks, self.roles = graphs.networks, roles
        self.work = work  # whatever it reads stays alive
        self.inputs = [i.clone() for i in inputs]
        self.graph = CudaGraph(graphs.generators)
        spent = self.networks.spent[0]
        self._freshen()  # outside of the graph
        with self.graph.capturing():
            self.outputs = work(*self.inputs)
        self.cost, self.networks.spent[0] = self.networks.spent[0] - spent, spent
        self.gradients = [(parameter, parameter.grad) for parameter in gradients]

    def replay(self, inputs: Sequence[torch.Tensor]) -> Tensors:
        self._freshen()
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        self.networks.spent[0] += self.cost
        return tuple(output.clone() for output in self.outputs)

    def _freshen(self) -> None:
        for role in self.roles:
            self.networks.working(role)


class CudaGraph:
    """A CUDA graph, of work that draws from these generators and the device's own."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)

    def capturing(self) -> AbstractContextManager[None]:
        """Make a context whose work is captured, not done."""
        return torch.cuda.graph(self.graph)

    def replay(self) -> None:
        """Do the work, on the addresses that it was captured with."""
        self.graph.replay()

    @staticmethod
    @contextmanager
    def strict() -> Iterator[None]:
        """Make a context where waiting for the device is an error, on a stream of its own, as captures are."""
        here, stream, mode = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        stream.wait_stream(here)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            here.wait_stream(stream)

    @staticmethod
    def default_generator(device: torch.device) -> torch.Generator:
        """Give the device's own generator."""
        return torch.cuda.default_generators[device.index or 0]
