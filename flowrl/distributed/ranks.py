"""Ranks: the processes of a job that train one flow together, each on a device of its own, through accelerate.

Settings count over all ranks: with twice the ranks each does half of every batch, and the run is the same run. Every
rank draws the same random numbers (`SharedGenerator`), for the rows of all, and keeps its own. Rows of a batch are
sharded in consecutive parts, one a rank.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flowrl.checks import in_all
from flowrl.distributed.sharding import is_sharded, shard
from flowrl.errors import ConfigError


class Ranks:
    """This process among those that train together. Alone, every method gives its argument back.

    Args:
        accelerator: The `Accelerator` of accelerate, where there are several ranks.

    Attributes:
        rank: Number of this rank, from 0.
        world_size: Number of ranks.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.world_size: int = 1 if accelerator is None else accelerator.num_processes

    @property
    def device(self) -> torch.device | None:
        """The device of this rank; None for a single process, which may choose."""
        device = None if self.accelerator is None else self.accelerator.device
        return torch.device("cpu") if device is not None and device.type == "cpu" else device  # not "cpu:0"

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def shard(self, rows: torch.Tensor, group: int = 1) -> torch.Tensor:
        """Take this rank's rows (m, ...) of those of all (n, ...): consecutive ones, in whole groups of `group`."""
        if self.world_size == 1:
            return rows
        sizes = self._sizes(len(rows), group)
        start = sum(sizes[: self.rank])
        return rows[start : start + sizes[self.rank]]

    def all_gather(self, rows: torch.Tensor, n: int, group: int = 1) -> torch.Tensor:
        """All-gather, the inverse of `shard`: each rank passes its rows, every rank gets all `n` (n, ...)."""
        if self.world_size == 1:
            return rows
        sizes = self._sizes(n, group)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes)])

    def gather_uneven(self, rows: torch.Tensor) -> torch.Tensor:
        """Gather rows (n, ...) of every rank, of which each may have another number: all of them, on every rank."""
        if self.world_size == 1:
            return rows
        sizes = torch.zeros(self.world_size, dtype=torch.long, device=rows.device)
        sizes[self.rank] = len(rows)
        counts = self.all_reduce_(sizes).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:n] for part, n in zip(gathered, counts)])

    def _sizes(self, n: int, group: int) -> list[int]:
        """Count the rows of each rank: whole groups, as evenly as possible; the remainder goes to the last."""
        groups = n // group
        sizes = [group * (groups // self.world_size + (i < groups % self.world_size)) for i in range(self.world_size)]
        sizes[-1] += n - sum(sizes)
        return sizes

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce: sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce: average over all ranks, in place."""
        return self.all_reduce_(tensor).div_(self.world_size) if self.world_size > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is set on any rank."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce_(torch.tensor(float(flag), device=self.device)).item())

    def broadcast(self, text: str) -> str:
        """Broadcast the main rank's text."""
        if self.world_size == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = self.all_reduce_(torch.tensor(len(content) if self.is_main else 0, device=self.device))
        content = content if self.is_main else content.new_zeros(int(length))
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def in_all(self, named: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """Take what every rank has a name for, in the order of the main one: of rewards each call names components."""
        if self.world_size == 1:
            return dict(named)
        own = {str(name): (name, value) for name, value in named.items()}
        line = torch.tensor(list(f"{json.dumps(list(own))}\n".encode()), dtype=torch.uint8, device=self.device)
        everyones = bytes(self.gather_uneven(line).tolist()).splitlines()
        return dict(own[name] for name in in_all([dict.fromkeys(json.loads(part)) for part in everyones]))

    def all_to_all(self, rows: torch.Tensor, given: list[int], received: list[int]) -> torch.Tensor:
        """Send consecutive rows to the ranks, `given[i]` of them to rank i, and get `received[i]` from rank i."""
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, given)
        return result

    def exchange(
        self, named: Mapping[str, torch.Tensor], given: list[int], received: list[int]
    ) -> dict[str, torch.Tensor]:
        """Send rows (n, ...) of any types as `all_to_all` does, all names in one message."""
        message = torch.cat([_bytes(rows.contiguous()) for rows in named.values()], dim=1)
        answer, n = self.all_to_all(message, given, received), sum(received)
        found = {name: rows.new_empty(n, *rows.shape[1:]) for name, rows in named.items()}
        places = [_bytes(rows) for rows in found.values()]
        for place, part in zip(places, answer.split([place.shape[1] for place in places], dim=1)):
            place.copy_(part)
        return found

    def main_first(self) -> AbstractContextManager[Any]:
        """Let the first rank of each machine through a context before the others: what it fetches is then there."""
        return nullcontext() if self.world_size == 1 else self.accelerator.local_main_process_first()

    @property
    def is_sharded(self) -> bool:
        """Whether weights are sharded over ranks (FSDP), not replicated."""
        return self.world_size > 1 and self.accelerator.distributed_type.name == "FSDP"

    def prepare(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        copies: Iterable[nn.Module] = (),
        blocks: Iterable[str] = (),
    ) -> nn.Module:
        """Wrap the network to train through: gradients of its backward pass are means over all ranks.

        With FSDP the network and its copies (further networks that are not trained) are sharded over the ranks, in
        place; their parameters, and the optimizer's, are new objects then. A pass gathers a block of the classes of
        these names at a time, unless accelerate was configured for others.

        Raises:
            ConfigError: accelerate was configured for a way of training that is not supported.
        """
        if self.world_size == 1:
            return network
        kind = self.accelerator.distributed_type.name
        if kind not in SUPPORTED or (self.is_sharded and not self.accelerator.is_fsdp2):
            raise ConfigError(
                f"accelerate is configured for {kind.replace('FSDP', 'FSDP version 1')}; flowrl trains with DDP and "
                "FSDP version 2. Give one of the files in docs/accelerate/ to `accelerate launch --config_file`."
            )
        if self.is_sharded:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.cpu_ram_efficient_loading = False  # every rank has read the weights
            if "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
                plugin.transformer_cls_names_to_wrap = list(blocks)
            for copied in copies:
                shard(self.accelerator, copied)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # its successor is not in all versions
            prepared: nn.Module = self.accelerator.prepare(network, optimizer)[0]
        return prepared if prepared is network else seen_through(prepared)

    def no_sync(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Make a context whose backward passes leave gradients to each rank."""
        return nullcontext() if self.world_size == 1 or self.is_sharded else self.accelerator.no_sync(network)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over all ranks, after backward passes within `no_sync`; many small ones in one call."""
        if self.world_size == 1:
            return
        buckets: dict[torch.dtype, list[torch.Tensor]] = {}
        for gradient in (parameter.grad for parameter in parameters):
            if gradient is None or is_sharded(gradient):
                continue
            if gradient.nbytes > SMALL_GRADIENT:  # latency is nothing beside its transfer
                self.mean_(gradient)
            else:
                buckets.setdefault(gradient.dtype, []).append(gradient)
        for bucket in buckets.values():
            means = self.mean_(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, mean in zip(bucket, means.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(mean.view_as(gradient))

    def leave(self) -> None:
        """Say good-bye to the others, at the end."""
        if self.world_size > 1:
            self.accelerator.end_training()


def seen_through(wrapper: nn.Module) -> nn.Module:
    """Let a wrapper, such as DDP's, give attributes of the network in it, such as `config`, as if they were its own."""
    kind: Any = type(wrapper)

    class SeenThrough(kind):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

    wrapper.__class__ = SeenThrough
    return wrapper


SUPPORTED = ("MULTI_GPU", "MULTI_CPU", "FSDP")
SMALL_GRADIENT = 2**20
"""Bytes up to which gradients are averaged together."""


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """View contiguous rows (n, ...) as bytes (n, K)."""
    return rows[:, None].flatten(1).view(torch.uint8)


class SharedGenerator(torch.Generator):
    """Random numbers that are the same on every rank: a batch is drawn for all ranks at once, see `shard`."""

    ranks: Ranks

    def __new__(cls, device: torch.device | str, ranks: Ranks) -> SharedGenerator:
        """A generator on `device`."""
        self = super().__new__(cls, device)  # type: ignore[call-arg]
        self.ranks = ranks
        return self

    def shard(self, draw: Callable[[int], torch.Tensor], n: int) -> torch.Tensor:
        """Draw the rows of all ranks by `draw(n * world size)`, and keep this rank's `n`."""
        return self.ranks.shard(draw(n * self.ranks.world_size))


def is_launched() -> bool:
    """Tell whether a launcher (`accelerate launch`, `torchrun`) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_joined: list[Ranks] = []


def join(device: torch.device | str = "auto") -> Ranks:
    """Join the processes that a launcher started together; without one, be alone.

    Args:
        device: "cpu", or "auto" or a type of device for the one that accelerate gives this rank.

    Raises:
        ConfigError: A numbered device was asked for, or one on which accelerate joins no processes.
    """
    if not is_launched():
        return Ranks()
    kind, _, number = str(device).partition(":")
    if number and (not _joined or str(_joined[0].device) != str(device)):
        raise ConfigError(f"With several processes each gets a device of its own: take --device {kind}, not {device}.")
    if not _joined:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        settings = DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
        )
        on_cpu = kind == "cpu" or (kind == "auto" and not torch.accelerator.is_available())  # it joins none unasked
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[settings])
        if accelerator.num_processes == 1:  # each would train all of it by itself
            raise ConfigError(
                f"accelerate does not join the {os.environ['WORLD_SIZE']} processes that were started on a device "
                f"'{kind}' here: take --device cpu, or start one process."
            )
        _joined.append(Ranks(accelerator))  # precision is the policy's own
    return _joined[0]


def place_in_job() -> str:
    """Describe this process's place for messages, " (process 3 of 8)"; empty for a single process."""
    return f" (process {int(os.environ.get('RANK', '0')) + 1} of {os.environ['WORLD_SIZE']})" if is_launched() else ""


def is_lost(error: BaseException) -> bool:
    """Tell whether an error says that another rank is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return is_launched() and (isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs))
