"""FlowPolicy: the trainable velocity network, its copies, and sampling from any of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from flowrl.distributed.sharding import local_shard, reshard
from flowrl.errors import ConfigError
from flowrl.functional.flow import normal
from flowrl.functional.solvers import (
    SDE,
    GaussianStep,
    Guidance,
    Solver,
    evaluations_per_sample,
    guided_velocity,
    ode_sample,
    sde_sample,
)
from flowrl.models.base import VelocityModel
from flowrl.models.lora import LoRA, add_adapters, switched
from flowrl.types import Condition, Field, Role, Transitions


class FlowPolicy(BasePolicy):
    """A flow as a stable-baselines3 policy: the observation is a context, the action a generated sample.

    Full fine-tuning keeps a network per role, made only for the roles asked for. With LoRA there is one base
    network: the reference is the adapter switched off, behaviour and ema are further adapters.

    Args:
        observation_space: Indices of contexts.
        action_space: Samples.
        lr_schedule: Unused; stable-baselines3 passes it.
        model: The flow to fine-tune; becomes the current role.
        contexts: All contexts; encoded once, here.
        copies: Roles to keep beside the current one.
        lora: Adapters instead of full fine-tuning.
        steps: Default number of solver steps when sampling.
        solver: Default solver.
        guidance_scale: Default guidance; 1 is none.
        guidance: Kind of classifier-free guidance.
        precision: Type that the networks compute in.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        compile: Compile the networks.
        device: Where everything lives.
        seed: Seed of the generator that `sample` and `predict` draw noise from.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Any = None,
        *,
        model: VelocityModel,
        contexts: Sequence[Any],
        copies: Iterable[Role] = ("reference",),
        lora: LoRA | None = None,
        steps: int = 16,
        solver: Solver = "euler",
        guidance_scale: float = 1.0,
        guidance: Guidance = "cfg",
        precision: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__(observation_space, action_space)
        self.steps, self.solver = steps, solver
        self.guidance_scale, self.guidance = guidance_scale, guidance
        self.contexts = list(contexts)
        self.lora = lora
        self._times: torch.Tensor | None = None
        self.evaluations = 0  # network evaluations so far: a forward is 1 per sample, a backward 2
        device = torch.device(device)
        model.move_frozen(device)
        self.model = model  # submodules of `model` are the current network
        self.precision = precision
        self._null = model.null_condition() if guidance_scale != 1 and not model.distilled_guidance else None
        self._condition = self.encode(self.contexts)
        model.network.to(device)  # now: text encoders can be as large as the network
        self.generator = torch.Generator(device)
        self.generator.manual_seed(torch.seed() if seed is None else seed)
        roles: list[Role] = [role for role in ("behaviour", "ema") if role in copies]
        self.networks = nn.ModuleDict()
        if lora is None:
            self._models = self._full_copies(model, roles, "reference" in copies)
        else:
            self._models = {}
            self._adapters = add_adapters(model, ["current", *roles], lora)
        self.roles: tuple[Role, ...] = ("current", *roles)
        self.train_through(model.network)
        if not self._parameters_of["current"]:
            raise ConfigError("This flow has no trainable parameters.")
        if gradient_checkpointing:
            model.checkpoint_gradients()
        if compile:
            for network in {id(m.network): m.network for m in (model, *self._models.values())}.values():
                network.compile(dynamic=True)

    def _full_copies(self, model: VelocityModel, roles: list[Role], reference: bool) -> dict[Role, VelocityModel]:
        models: dict[Role, VelocityModel] = {"current": model}
        for role in [*roles, *(["reference"] if reference else [])]:
            network = copy.deepcopy(model.network).requires_grad_(False).eval()
            self.networks[role] = network
            models[role] = model.with_network(network)  # type: ignore[index]
        return models

    def _collect(self, role: Role) -> dict[str, nn.Parameter]:
        """Names and tensors of a role's own parameters, those that are trained."""
        if self.lora is None:
            trained = [n for n, p in self.model.network.named_parameters() if p.requires_grad]
            parameters = dict(self._models[role].network.named_parameters())
            return {name: parameters[name] for name in trained}
        marker = f".{role}."
        return {name.replace(marker, "."): p for name, p in self.model.network.named_parameters() if marker in name}

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition, role: Role = "current") -> torch.Tensor:
        """Velocity (B, *latent_shape) of a role's network.

        Only the current role's weights carry gradients; for `x_t` that asks for its own, every role gives them.

        Raises:
            ConfigError: The role was not asked for when the policy was made.
        """
        with_grad = torch.is_grad_enabled() and (role == "current" or x_t.requires_grad)
        self.evaluations += len(x_t) * (3 if with_grad else 1)
        known = self._models if self.lora is None else (*self.roles, "reference")
        if role not in known:
            raise ConfigError(f"This policy keeps no '{role}' network; it has {', '.join(known)}.")
        low = self.precision != torch.float32
        with (
            torch.set_grad_enabled(with_grad),
            torch.autocast(x_t.device.type, self.precision) if low else nullcontext(),
            nullcontext() if self.lora is None or role == "current" else self._switched(role),
        ):
            model = self._trained[0] if with_grad and role == "current" else self._models.get(role, self.model)
            return model(x_t, t, cond).float()

    def train_through(self, network: nn.Module, is_sharded: bool = False) -> None:
        """Compute gradients of the current role through `network`, which wraps its network.

        `is_sharded`: its weights and those of the copies have been divided among ranks since they were made.
        """
        self._trained = (self.model.with_network(network),)  # in a tuple: no submodule of its own
        self.is_sharded = is_sharded
        self._parameters_of = {role: self._collect(role) for role in self.roles}

    def _switched(self, role: Role) -> switched:
        return switched(self._adapters, role, lambda: self.weights_changed(role))

    def weights_changed(self, role: Role) -> None:
        """Say that a role's weights were changed from outside."""
        if self.is_sharded:
            reshard(self.model_of(role).network)

    def inference(self) -> AbstractContextManager[Any]:
        """Context without gradients; weights that are gathered for a pass must not become inference tensors."""
        return torch.no_grad() if self.is_sharded else torch.inference_mode()

    @property
    def trained(self) -> nn.Module:
        """What gradients of the current role are computed through."""
        return self._trained[0].network

    def encode(self, contexts: Sequence[Any]) -> Condition:
        """Encoded contexts, with the default scale where guidance is distilled; what encodes them does not stay."""
        encoded = self.model.encode(contexts)
        self.model.release_encoders()
        return self.model.with_guidance(encoded, self.guidance_scale)

    def condition(self, contexts: torch.Tensor) -> Condition:
        """Encoded contexts for indices (B,)."""
        return tuple(part[contexts] for part in self._condition)

    def field(self, cond: Condition, n: int, role: Role = "current", guidance_scale: float | None = None) -> Field:
        """Velocity field of `n` samples with their condition bound, with guidance.

        Classifier-free guidance takes both halves in one forward pass; see `guided_velocity`.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if self.model.distilled_guidance:
            cond, scale = self.model.with_guidance(cond, scale), 1.0
        if scale == 1:
            return lambda x, t: self.velocity(x, t, cond, role)
        if self._null is None:
            self._null = self.model.null_condition()
            self.model.release_encoders()
        both = tuple(torch.cat([part, null.expand(n, *null.shape[1:])]) for part, null in zip(cond, self._null))

        def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            v, v_null = self.velocity(torch.cat([x, x]), torch.cat([t, t]), both, role).chunk(2)
            return guided_velocity(v, v_null, scale, t, self.guidance)

        return guided

    @property
    def sampling_role(self) -> Role:
        """What `sample` and `predict` use: the moving average where there is one."""
        return "ema" if "ema" in self.roles else "current"

    def noise(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Standard normal latents (n, *latent_shape)."""
        return normal(n, self.model.latent_shape, generator or self.generator)

    def sample_latents(
        self,
        contexts: torch.Tensor,
        *,
        role: Role | None = None,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        x_0: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents `x_1` (B, *latent_shape) by the ODE for context indices (B,), from `x_0` or fresh noise."""
        x_0 = self.noise(len(contexts), generator) if x_0 is None else x_0
        times = self.model.times(steps or self.steps).to(x_0.device)
        role = role or self.sampling_role
        with self.inference():
            field = self.field(self.condition(contexts.to(x_0.device)), len(contexts), role, guidance_scale)
            return ode_sample(field, x_0, times, solver or self.solver)

    def sample_path(
        self,
        contexts: torch.Tensor,
        sde: SDE,
        *,
        role: Role = "current",
        window: range | None = None,
        generator: torch.Generator | None = None,
        x_0: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents by the SDE, the states of its noisy steps, and their log-probabilities: see `sde_sample`."""
        generator = generator or self.generator
        x_0 = self.noise(len(contexts), generator) if x_0 is None else x_0
        with self.inference():
            field = self.field(self.condition(contexts), len(contexts), role)
            return sde_sample(field, x_0, self.times(), sde, generator, window)

    def times(self) -> torch.Tensor:
        """The sampler's own times (steps + 1,), on the device."""
        if self._times is None:
            self._times = self.model.times(self.steps).to(self.device)
        return self._times

    def transition(self, steps: Transitions, contexts: torch.Tensor, sde: SDE, role: Role = "current") -> GaussianStep:
        """The law of recorded steps under a role's network now, with the sampler's own times and guidance."""
        times = self.times()
        t, t_next = times[steps.k], times[steps.k + 1]
        v = self.field(self.condition(contexts), len(contexts), role)(steps.x_k, t)
        return sde.step(v, steps.x_k, t, t_next)

    def sample(self, contexts: torch.Tensor | Sequence[Any] | None = None, n: int = 1, **kwargs: Any) -> torch.Tensor:
        """Samples (B, *sample_shape), decoded.

        Args:
            contexts: Indices of the environment's contexts (B,), or contexts themselves (any prompts); None
                draws `n` samples of the first context.
            n: How many samples, when `contexts` is None.
            **kwargs: As in `sample_latents`: steps, solver, guidance_scale, role, generator, x_0.
        """
        if contexts is None:
            contexts = torch.zeros(n, dtype=torch.long)
        if not isinstance(contexts, torch.Tensor):
            known = {_key(c): i for i, c in enumerate(self.contexts)}
            new = [c for c in dict.fromkeys(contexts) if _key(c) not in known]
            if new:
                encoded = self.encode(new)
                self._condition = tuple(torch.cat(pair) for pair in zip(self._condition, encoded))
                self.contexts += new
                known = {_key(c): i for i, c in enumerate(self.contexts)}
            contexts = torch.tensor([known[_key(c)] for c in contexts])
        return self.decode(self.sample_latents(contexts, **kwargs))

    @torch.inference_mode()
    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Latents -> samples (B, *sample_shape)."""
        return self.model.decode(x_1)

    def evaluations_per_sample(self) -> int:
        """Network evaluations that one sample costs with the default settings."""
        halves = 1 if self.guidance_scale == 1 or self.model.distilled_guidance else 2
        return evaluations_per_sample(self.solver, self.steps) * halves

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Samples for observed contexts, as arrays: stable-baselines3's interface.

        A flow is random through its noise; `deterministic` has no meaning here and is ignored.
        """
        index = np.asarray(observation)
        samples = self.sample(torch.from_numpy(np.atleast_1d(index).astype(np.int64).reshape(-1)))
        actions = samples.cpu().numpy()
        return (actions if index.ndim else actions[0]), state

    def _predict(self, observation: Any, deterministic: bool = False) -> torch.Tensor:
        return self.sample(observation.reshape(-1).long())

    def set_training_mode(self, mode: bool) -> None:
        """Training or evaluation mode of the current network; copies stay in evaluation mode."""
        self.trained.train(mode)

    def parameters_of(self, role: Role) -> dict[str, nn.Parameter]:
        """A role's own parameters by name: the whole network, or the adapter."""
        return self._parameters_of[role]

    def model_of(self, role: Role) -> VelocityModel:
        """The flow around a role's own network; with LoRA all roles share one."""
        return self.model if self.lora is not None else self._models[role]

    def frozen_state(self) -> dict[str, torch.Tensor]:
        """Everything of the velocity network that no role trains: what a flow from a factory cannot give again.

        With LoRA the base network; in full fine-tuning the reference network.
        """
        if self.lora is None:
            return self.networks["reference"].state_dict() if "reference" in self.networks else {}
        markers = tuple(f".{role}." for role in self.roles)
        return {n: t for n, t in self.model.network.state_dict().items() if not any(m in n for m in markers)}

    def buffers_of(self, role: Role) -> dict[str, torch.Tensor]:
        """A role's own buffers by name (running statistics, say); none with LoRA, whose base stays as it is."""
        return {} if self.lora is not None else dict(self._models[role].network.named_buffers())

    @torch.no_grad()
    def update_copy(self, role: Role, decay: float = 0.0) -> None:
        """`copy <- decay copy + (1 - decay) current`; does nothing where the role is not kept."""
        if role not in self.roles:
            return
        target, source = ([local_shard(p.data) for p in self._parameters_of[r].values()] for r in (role, "current"))
        torch._foreach_lerp_(target, source, 1 - decay)
        self.weights_changed(role)
        for copied, own in zip(self.buffers_of(role).values(), self.buffers_of("current").values()):
            copied.copy_(own)

    def export(self, folder: Path, adapter: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the weights that `sample` uses as the flow's own library loads them, where the flow can.

        See `VelocityModel.export`. `adapter`: LoRA weights to write in place of its own.
        """
        if self.lora is None:
            self._models[self.sampling_role].export(folder, None)
        else:
            adapter = adapter or self._parameters_of[self.sampling_role]
            scale = self.lora.alpha / self.lora.rank  # other libraries take it as 1: put it into the weights
            state = {n: (scale if ".lora_B." in n else 1.0) * p.detach().cpu() for n, p in adapter.items()}
            self.model.export(folder, state)


def _key(context: Any) -> Any:
    return repr(context)
