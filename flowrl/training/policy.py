"""FlowPolicy: a flow in its roles, and sampling from any of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.utils import get_device

from flowrl.checks import counted
from flowrl.config import FlowConfig
from flowrl.envs.base import GenerationEnv, in_range
from flowrl.envs.prompts import positions_of, wanted
from flowrl.functional.flow import normal
from flowrl.functional.guidance import guided_field
from flowrl.functional.sde import SDE, sde_sample
from flowrl.functional.solver_steps import Solver, evaluations_per_sample
from flowrl.functional.solvers import ode_sample
from flowrl.models.attention import set_attention_backend
from flowrl.models.base import VelocityModel
from flowrl.models.init_lora import started_from
from flowrl.models.lora import LoRA, freeze_others
from flowrl.training import flow_checks
from flowrl.training.construction import (
    as_generation_env,
    check_device,
    check_noise,
    fresh_seed,
    sampling_config,
    weight_dtypes,
)
from flowrl.training.graphs import Graphs
from flowrl.training.role_networks import RoleNetworks
from flowrl.training.sb3_policy import SB3Policy
from flowrl.types import Condition, Field, Role

MOST_DRAWN = 256
"""Samples that pictures and evaluations draw at once, at most."""


class FlowPolicy(SB3Policy):
    """A flow as a stable-baselines3 policy: the observation is a context, the action a generated sample.

    Args:
        observation_space: Indices of contexts.
        action_space: Samples.
        lr_schedule: Unused; stable-baselines3 passes it.
        model: The flow to fine-tune; becomes the current role.
        contexts: All contexts; encoded once, here.
        copies: Roles to keep beside the current one.
        config: How it samples, its precision and its adapters; None takes the defaults.
        device: Where everything lives.
        seed: Seed of the generator that `sample` and `predict` draw noise from.

    Attributes:
        networks: The velocity network in its roles.
        most_drawn: Samples that whoever only looks at them draws at once: no more than a rollout, which fits.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Any = None,
        *,
        model: VelocityModel,
        contexts: Sequence[Any],
        config: FlowConfig | None = None,
        copies: Iterable[Role] = ("reference",),
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__(observation_space, action_space)
        config = FlowConfig() if config is None else config
        self.steps, self.solver = config.rollout_steps, config.solver
        self.guidance_scale, self.guidance = config.guidance_scale, config.guidance
        self.most_drawn = min(config.rollout_batch_size or MOST_DRAWN, MOST_DRAWN)
        self.contexts, self.lora = list(contexts), LoRA.of(config)
        self._times: dict[int, torch.Tensor] = {}
        self._home = device = torch.device(device)
        model.move_frozen(device)
        self.model = model
        guided = self.guidance_scale != 1 and not model.distilled_guidance
        self._null = flow_checks.condition(model, model.null_condition(), device) if guided else None
        self._condition = self.encode(self.contexts)
        freeze_others(model.network, config.trained_parameters)
        model.network.to(device)  # now: text encoders can be as large as the network
        self.generator = torch.Generator(device).manual_seed(fresh_seed() if seed is None else seed)
        precision, has_copies = getattr(torch, config.precision), config.working_copies != "off"
        set_attention_backend(model.network, config.attention_backend, device, precision)
        self.networks = RoleNetworks(model, copies, self.lora, precision, has_copies)
        self.graphs = Graphs(self.networks, device, config.cuda_graphs)
        if config.gradient_checkpointing:
            self.networks.checkpoint_gradients()
        if config.compile != "auto":
            self.networks.compile(config.compile)

    @classmethod
    def of(
        cls,
        env: str | GenerationEnv,
        config: FlowConfig | None = None,
        *,
        copies: Iterable[Role] = ("reference",),
        device: torch.device | str = "auto",
        seed: int | None = None,
        env_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> FlowPolicy:
        """Load the flow of an environment as a policy that no algorithm trains: to sample, evaluate and steer.

        Args:
            env: Name of an environment, or one.
            config: How it samples, its precision and its adapters; None takes the environment's recommendations.
            copies: Roles to keep beside the current one.
            device: "auto", "cpu", "cuda", "mps", ...
            seed: Seed of its noise.
            env_settings: Settings of a named environment.
            **kwargs: What a subclass takes besides.
        """
        check_device(device)
        core = as_generation_env(env, env_settings)
        config = sampling_config(core) if config is None else config
        return cls(
            core.observation_space,
            core.action_space,
            model=started_from(core.flow.load(*weight_dtypes(config)), config.init_lora),
            contexts=core.contexts,
            config=config,
            copies=copies,
            device=get_device(device),
            seed=seed,
            **kwargs,
        )

    def velocity(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition, role: Role = "current", exact: bool = False
    ) -> torch.Tensor:
        """Compute the velocity (B, *latent_shape) of a role's network.

        Only the current role's weights carry gradients; for `x_t` that asks for its own, every role gives them.
        Without gradients adapters are merged into the weights, which rounds otherwise; `exact` leaves them apart, as in
        the pass that is trained.

        Raises:
            ConfigError: The role was not asked for when the policy was made.
        """
        return self.networks.velocity(x_t, t, cond, role, exact)

    def encode(self, contexts: Sequence[Any]) -> Condition:
        """Encode contexts, with the default scale where guidance is distilled; what encodes them does not stay."""
        encoded = flow_checks.encoded(self.model, contexts, self._home)
        self.model.release_encoders()
        return self.model.with_guidance(encoded, self.guidance_scale)

    def condition(self, context_ids: torch.Tensor) -> Condition:
        """Look up encoded contexts by their indices (B,)."""
        return tuple(part[context_ids] for part in self._condition)

    def conditioned_on(self, contexts: Sequence[Any]) -> FlowPolicy:
        """Give a view of the policy with these contexts in place of its own; networks are shared."""
        view = copy.copy(self)
        view.contexts, view._condition = list(contexts), self.encode(contexts)
        return view

    def field(
        self,
        cond: Condition,
        n: int,
        role: Role = "current",
        guidance_scale: float | None = None,
        exact: bool = False,
    ) -> Field:
        """Make the velocity field of `n` samples with their condition bound, with guidance.

        Classifier-free guidance takes both halves in one forward pass; see `guided_velocity`. `exact`: see `velocity`.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if self.model.distilled_guidance:
            cond, scale = self.model.with_guidance(cond, scale), 1.0
        if scale == 1:
            return lambda x, t: self.velocity(x, t, cond, role, exact)
        if self._null is None:
            self._null = flow_checks.condition(self.model, self.model.null_condition(), self._home)
            self.model.release_encoders()
        both = tuple(torch.cat(halves) for halves in zip(cond, self.model.null_like(self._null, cond)))
        return guided_field(lambda x, t: self.velocity(x, t, both, role, exact), scale, self.guidance, self.model.guide)

    def noise(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw standard normal latents (n, *latent_shape)."""
        return normal(n, self.model.latent_shape, generator or self.generator)

    def sample_latents(
        self,
        context_ids: torch.Tensor,
        *,
        role: Role | None = None,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        x_0: torch.Tensor | None = None,
        grad_steps: int = 0,
    ) -> torch.Tensor:
        """Draw latents `x_1` (B, *latent_shape) by the ODE for context indices (B,), from `x_0` or fresh noise.

        `grad_steps`: the last steps of the solver that gradients flow through.
        """
        x = self.noise(len(context_ids), generator) if x_0 is None else x_0.float()
        check_noise(x, len(context_ids), self.model.latent_shape)
        times, solver = self.times(steps), solver or self.solver
        cond, role = self.condition(context_ids.to(x.device)), role or self.sampling_role

        def solve(x: torch.Tensor, *cond: torch.Tensor) -> tuple[torch.Tensor]:
            field = self.field(cond, len(x), role, guidance_scale)
            return (self.model.arrived(ode_sample(field, x, times, solver, grad_steps), cond),)

        if grad_steps:
            return solve(x, *cond)[0]
        key = role, solver, len(times), self.guidance_scale if guidance_scale is None else guidance_scale
        with torch.no_grad():
            return self.graphs.run("Sampling", key, solve, x, *cond)[0]

    @torch.no_grad()
    def sample_path(
        self,
        context_ids: torch.Tensor,
        sde: SDE,
        *,
        role: Role = "current",
        window: range | None = None,
        generator: torch.Generator | None = None,
        x_0: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw latents by the SDE, with the states of its noisy steps and their log-probabilities: see `sde_sample`.

        Velocities are `exact`: log-probabilities are compared with those of the network in training.
        """
        generator = generator or self.generator
        x_0 = self.noise(len(context_ids), generator) if x_0 is None else x_0
        field = self.field(self.condition(context_ids), len(context_ids), role, exact=True)
        return sde_sample(field, x_0, self.times(), sde, generator, window)

    def times(self, steps: int | None = None) -> torch.Tensor:
        """Give the times (steps + 1,) of the solver, on the device; by default with its own number of steps."""
        if steps is not None and (steps := counted("steps (of a sampler)", steps)) != self.steps:
            return flow_checks.times(self.model, steps, self.device)
        if self.steps not in self._times:
            self._times[self.steps] = flow_checks.times(self.model, self.steps, self.device)
        return self._times[self.steps]

    def sample(self, contexts: Any = None, n: int = 1, **kwargs: Any) -> torch.Tensor:
        """Draw samples (B, *sample_shape), decoded.

        Args:
            contexts: Indices of the environment's contexts (B,), or contexts themselves (any prompts; a string is one
                prompt); None draws `n` samples of the first context.
            n: How many samples of the first context, or of the one prompt.
            **kwargs: As in `sample_latents`: steps, solver, guidance_scale, role, generator, x_0.
        """
        contexts = wanted(contexts, n)
        if not isinstance(contexts, torch.Tensor):
            contexts = self._indices(contexts)
        return self.decode(self.sample_latents(in_range(contexts, len(self.contexts)), **kwargs))

    def _indices(self, contexts: Sequence[Any]) -> torch.Tensor:
        """Give the indices (B,) of contexts; new ones are encoded and kept."""
        positions, new = positions_of(contexts, self.contexts, takes_new=bool(self._condition))
        if new:
            self._condition = tuple(torch.cat(pair) for pair in zip(self._condition, self.encode(new)))
            self.graphs.forget()
            self.contexts += new
        return torch.tensor(positions)

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode latents to samples (B, *sample_shape); gradients by the latents flow through."""
        return flow_checks.samples(self.model, x_1)

    def evaluations_per_sample(self) -> int:
        """Count the network evaluations that one sample costs with the default settings."""
        halves = 1 if self.guidance_scale == 1 or self.model.distilled_guidance else 2
        return evaluations_per_sample(self.solver, self.steps) * halves
