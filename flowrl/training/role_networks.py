"""RoleNetworks: the velocity network in its roles (trained, reference, behaviour, moving average)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowrl.distributed.sharding import local_shard, reshard
from flowrl.errors import ConfigError, tell_whose
from flowrl.models.base import VelocityModel
from flowrl.models.compiling import compile_network
from flowrl.models.lora import LoRA, activate_in_copy, add_adapters, switched
from flowrl.training.graphs import SMALL
from flowrl.training.working_copies import CastCopy, MergedCopy, WorkingCopy, sharing_copy
from flowrl.types import Compile, Condition, Role, has_values, version_of

AS_IT_IS = nullcontext()
"""Context that changes nothing, one for all passes: small networks are called often."""
WITH_STATISTICS = nn.modules.batchnorm._NormBase
"""Layers that change their buffers in training: batch and instance normalisation."""


class RoleNetworks(nn.Module):
    """One flow, and a velocity network for each of its roles.

    Full fine-tuning keeps a network per role, made only for the roles asked for. With LoRA there is one base network:
    the reference is the adapter switched off, behaviour and ema are further adapters. Passes without gradients by the
    weights go through the plain base network, or a working copy with the adapter merged; without working copies,
    through the weights that are trained or kept, with the adapter beside them.

    Args:
        model: The flow; its network becomes the current role.
        copies: Roles to keep beside the current one.
        lora: Adapters instead of full fine-tuning.
        precision: Type that the networks compute in.
        with_working_copies: Whether passes without gradients may have copies of weights to compute with.

    Attributes:
        roles: Roles that have weights of their own.
        available: These, and the reference where it is kept.
        copies: Networks that are not trained, by role (full fine-tuning).
        spent: Network evaluations so far, in a list of one.
        compiled: What of the networks is compiled.
        asked: Roles that passes without gradients went through; whoever wants to know empties it first.
    """

    def __init__(
        self,
        model: VelocityModel,
        copies: Iterable[Role] = ("reference",),
        lora: LoRA | None = None,
        precision: torch.dtype = torch.float32,
        with_working_copies: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.lora, self.precision = model, lora, precision
        self.with_working_copies = with_working_copies
        lagged: list[Role] = [role for role in ("behaviour", "ema") if role in copies]
        self.roles: tuple[Role, ...] = ("current", *lagged)
        frozen: tuple[Role, ...] = ("reference",) if "reference" in copies or lora is not None else ()
        self.available: tuple[Role, ...] = (*self.roles, *frozen)
        self.spent = [0]  # network evaluations; in a list, as attributes of modules are slow to set
        self.copies = nn.ModuleDict()
        self._models: dict[Role, VelocityModel] = dict.fromkeys(self.available, model)
        self._working: dict[Role, WorkingCopy] = {}
        self._plain: tuple[
            VelocityModel, ...
        ] = ()  # around the base network without adapters; in a tuple: no submodule
        self._apart: dict[Role, VelocityModel] = {}  # structures with another adapter switched on; weights are shared
        self.asked: set[Role] = set()
        self.compiled: Compile = "off"
        if lora is None:
            for role in (*lagged, *frozen):
                self.copies[role] = copy.deepcopy(model.network).requires_grad_(False).eval()
                self._models[role] = model.with_network(self.copies[role])
        else:
            self._plain = (model.with_network(sharing_copy(model.network)),)
            self._adapted = add_adapters(model, list(self.roles), lora)
        self.train_through(model.network)
        self.set_training_mode(False)  # updates alone switch it on
        if not self._parameters_of["current"]:
            raise ConfigError("This flow has no trainable parameters.")

    def velocity(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition, role: Role, exact: bool = False
    ) -> torch.Tensor:
        """Compute the velocity (B, *latent_shape), float32, of a role's network: see `FlowPolicy.velocity`."""
        if role not in self.available:
            raise ConfigError(f"This policy keeps no '{role}' network; it has {', '.join(self.available)}.")
        with_grad = torch.is_grad_enabled() and (role == "current" or x_t.requires_grad)
        self.spent[0] += x_t.shape[0] * (3 if with_grad else 1)
        trains = with_grad and role == "current"
        by_weights = not (trains or exact or self.is_sharded)
        merges = by_weights and self.with_working_copies
        model = self._trained[0] if trains else self.working(role) if merges else self._exact(role, by_weights)
        in_own_type = self.precision == torch.float32 or (model.casts_inputs and (merges or self.lora is not None))
        switches = self.lora is not None and role != "current" and self.is_sharded
        with (
            torch.set_grad_enabled(False) if torch.is_grad_enabled() and not with_grad else AS_IT_IS,
            AS_IT_IS if in_own_type else torch.autocast(x_t.device.type, self.precision),
            switched(self._adapted.values(), role, lambda: self.weights_changed(role)) if switches else AS_IT_IS,
        ):
            before = version_of(x_t)
            may_split = x_t.device.type == "cpu" and not (with_grad or exact)  # pieces are rounded otherwise
            try:
                v = _in_pieces(model, x_t, t, cond) if may_split else model(x_t, t, cond)
            except Exception as error:
                network = type(self.model.network).__name__
                tell_whose(error, f"the flow ({type(model).__name__} with a {network}), asked for velocities")
                raise
            if not isinstance(v, torch.Tensor) or v.shape != x_t.shape or version_of(x_t) != before:
                raise ConfigError(_odd_flow(v, x_t))
            return v.float()

    def _exact(self, role: Role, by_weights: bool = False) -> VelocityModel:
        """Give the flow around the network that computes a role as the trained one does, with its adapter apart.

        `by_weights`: the trained role's too, without dropout.
        """
        if self.lora is None or (role == "current" and not by_weights) or self.is_sharded:
            return self._models[role]
        if role == "reference":
            return self.working(role)
        if role not in self._apart:
            self._apart[role] = self.model.with_network(sharing_copy(self.model.network))
            activate_in_copy(self._apart[role].network, role)
            compile_network(self._apart[role].network, self.compiled)
        return self._apart[role]

    def working(self, role: Role) -> VelocityModel:
        """Give the flow around the network that passes without gradients by the weights use for a role, up to date."""
        self.asked.add(role)
        if role not in self._working:
            made = self._made_working(role)
            if made is None:
                return self._models[role]
            if all(made.model is not other.model for other in self._working.values()):
                compile_network(made.model.network, self.compiled)
            self._working[role] = made
        return self._working[role].fresh()

    @property
    def working_bytes(self) -> int:
        """Size of the working copies so far, in bytes."""
        return sum(made.nbytes for made in self._working.values())

    def _made_working(self, role: Role) -> WorkingCopy | None:
        """Make the working copy of a role; None where its own network serves."""
        if self.lora is not None:
            plain = self._plain[0]
            if role == "reference":
                return WorkingCopy(plain, ())
            merged = (made for made in self._working.values() if isinstance(made, MergedCopy))
            is_large = sum(p.numel() for p in plain.network.parameters()) > SMALL  # a graph may need several at once
            other = next(merged, None) if is_large else None
            return MergedCopy(plain, self._adapted, role, list(self._parameters_of[role].values()), other)
        model = self._models[role]
        return CastCopy(model, self.precision) if model.casts_inputs and self.precision != torch.float32 else None

    def train_through(self, network: nn.Module, is_sharded: bool = False) -> None:
        """Compute gradients of the current role through `network`, which wraps its network.

        `is_sharded`: its weights and those of the copies have been sharded over ranks since they were made.
        """
        self._trained = (self.model.with_network(network),)  # in a tuple: no submodule of its own
        self.is_sharded = is_sharded
        if is_sharded:  # copies would hold on to the whole weights
            self._plain, self._working, self._apart = (), {}, {}
        self._parameters_of = {role: self._collect(role) for role in self.roles}

    def set_training_mode(self, mode: bool) -> None:
        """Put the current network into training or evaluation mode; copies stay in evaluation mode.

        With LoRA so do layers with running statistics, which are those of the base network: all roles share them.
        """
        modules = list(self.trained.modules())
        if any(type(module).train is not nn.Module.train for module in modules):
            self.trained.train(mode)
        else:
            for module in modules:  # what `train` does, without its walk over names
                module.training = mode
        if mode and self.lora is not None:
            for module in modules:
                if isinstance(module, WITH_STATISTICS):
                    module.training = False

    @property
    def trained(self) -> nn.Module:
        """The network that gradients of the current role are computed through."""
        return self._trained[0].network

    def model_of(self, role: Role) -> VelocityModel:
        """Give the flow around a role's own network; with LoRA all roles share one."""
        return self._models[role]

    def parameters_of(self, role: Role) -> dict[str, nn.Parameter]:
        """Give a role's own parameters by name: the whole network's, or the adapter's."""
        return self._parameters_of[role]

    def buffers_of(self, role: Role) -> dict[str, torch.Tensor]:
        """Give a role's own buffers by name (running statistics, say); none with LoRA, whose base stays as it is."""
        return {} if self.lora is not None else dict(self.model_of(role).network.named_buffers())

    def tensors_of(self, role: Role) -> dict[str, torch.Tensor]:
        """Give a role's own parameters and buffers by name."""
        return {**self.parameters_of(role), **self.buffers_of(role)}

    def frozen_state(self) -> dict[str, torch.Tensor]:
        """Give everything that no role trains: a flow from a factory cannot be loaded again.

        With LoRA the base network; in full fine-tuning the reference network, or what is not trained of the network.
        """
        if self.lora is None:
            return self.copies["reference"].state_dict() if "reference" in self.copies else self._untrained("current")
        markers = tuple(f".{role}." for role in self.roles)
        return {n: t for n, t in self.model.network.state_dict().items() if not any(m in n for m in markers)}

    @torch.no_grad()
    def share_frozen_state(self) -> None:
        """Give every role the untrained parameters of what `frozen_state` gives, after that was read from a file."""
        if self.lora is not None:
            return
        given = self._untrained("reference" if "reference" in self.copies else "current")
        for role in self.available:
            for name, parameter in self._untrained(role).items():
                parameter.copy_(given[name])
            self.weights_changed(role)

    def _untrained(self, role: Role) -> dict[str, torch.Tensor]:
        parameters = self.model_of(role).network.named_parameters()
        return {name: p.detach() for name, p in parameters if name not in self._parameters_of["current"]}

    @torch.no_grad()
    def update_copy(self, role: Role, decay: float = 0.0) -> None:
        """Set `copy <- decay copy + (1 - decay) current`; does nothing where the role is not kept.

        Raises:
            ConfigError: The decay is no share.
        """
        if not 0 <= decay <= 1:
            raise ConfigError(f"A refresh keeps a share of the {role} policy from 0 to 1, not {decay} (refresh_decay).")
        if role not in self.roles:
            return
        target, source = ([local_shard(p.data) for p in self._parameters_of[r].values()] for r in (role, "current"))
        torch._foreach_lerp_(target, source, 1 - decay)
        self.weights_changed(role)
        for copied, own in zip(self.buffers_of(role).values(), self.buffers_of("current").values()):
            copied.copy_(own)

    def weights_changed(self, role: Role) -> None:
        """Take note that a role's weights were changed from outside."""
        if role in self._working:
            self._working[role].expire()
        if self.is_sharded:
            reshard(self.model_of(role).network)

    def compile(self, kind: Compile) -> None:
        """Compile the networks, and every working copy that will be made: see `compile_network`."""
        self.compiled = kind
        for network in {id(model.network): model.network for model in (self.model, *self._models.values())}.values():
            compile_network(network, kind)

    def checkpoint_gradients(self) -> None:
        """Compute activations again in backward passes instead of keeping them."""
        for model in (self.model, *self._plain):
            model.checkpoint_gradients()

    def export(self, folder: Path, role: Role, adapter: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write a role's weights as the flow's own library loads them, where the flow can; see `VelocityModel.export`.

        `adapter`: LoRA weights to write in place of the role's own.
        """
        if self.lora is None:
            self.model_of(role).export(folder, None)
        else:
            scale = self.lora.alpha / self.lora.rank  # other libraries take it as 1: put it into the weights
            state = {
                name: (scale if ".lora_B." in name else 1.0) * weight.detach().cpu()
                for name, weight in (adapter or self._parameters_of[role]).items()
            }
            self.model.export(folder, state)

    def _collect(self, role: Role) -> dict[str, nn.Parameter]:
        if self.lora is None:
            trained = [n for n, p in self.model.network.named_parameters() if p.requires_grad]
            parameters = dict(self.model_of(role).network.named_parameters())
            return {name: parameters[name] for name in trained}
        marker = f".{role}."
        return {name.replace(marker, "."): p for name, p in self.model.network.named_parameters() if marker in name}


def _in_pieces(model: VelocityModel, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
    """Compute velocities (B, *latent_shape), as many at once as the flow says; in predictions, for GPUs too, all."""
    rows = model.rows_at_once()
    if not 0 < rows < len(x_t) or not has_values(x_t):
        return model(x_t, t, cond)
    pieces = zip(x_t.split(rows), t.split(rows), *(part.split(rows) for part in cond))
    return torch.cat([model(x, times, tuple(rest)) for x, times, *rest in pieces])


def _odd_flow(v: Any, x_t: torch.Tensor) -> str:
    """Say what a network did that no sampler or loss would notice: shapes are broadcast, points are moved."""
    if not isinstance(v, torch.Tensor):
        return f"The flow's network gave a {type(v).__name__}, not a tensor of velocities of shape {tuple(x_t.shape)}."
    if v.shape != x_t.shape:
        return (
            f"The flow's network gave velocities of shape {tuple(v.shape)} for points x_t of shape {tuple(x_t.shape)}: "
            "they must have the same."
        )
    return (
        "The flow's network changes the points x_t that it is given in place (an operation like x += ..., x.add_(...) "
        "or inplace=True): take x = x + ... there, or begin with x = x.clone()."
    )
