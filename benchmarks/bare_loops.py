"""ORW-CFM-W2 by hand: the same arithmetic as flowrl's, without classes around it, checks, metrics or logs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch

Parts = tuple[torch.Tensor, ...]
ALL: dict[str, Any] = {
    "trained_parameters": (),
    "max_time": 1.0,
    "draw_steps": 0,
    "lr_schedule": "constant",
    "target": "residual",
    "baseline": "clipped",
    "ema_decay": 0.0,
    "priority": 0.0,
    "max_own_loss": 0.0,
    "max_drift": 0.0,
}
"""Settings of flowrl that these loops know no others of, whatever environments recommend: all weights, all times, as
many steps in every rollout."""


class BareLoop:
    """Whole iterations with the residual target and full fine-tuning, on the device of the network."""

    def __init__(self, model: Any, call: Callable, reward: Callable, decode: Callable) -> None:
        for name, value in ALL.items():
            if (given := getattr(model.config, name)) != value:
                raise ValueError(
                    f"flowrl's {name} is {given!r}, and this loop's {value!r}: the two cannot be compared."
                )
        self.config, self.call, self.reward, self.decode = model.config, call, reward, decode
        self.network = copy.deepcopy(model.policy.model.network).train()
        self.v_ref = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.v_old = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=model.config.learning_rate, weight_decay=0.0, fused=True
        )
        self.shape = model.policy.model.latent_shape
        self.times = model.policy.model.times(model.config.rollout_steps).to(self.device)
        every = model.policy.condition(torch.arange(len(model.env.core.contexts), device=self.device))
        index = torch.arange(self.config.n_samples, device=self.device) // self.config.group_size
        self.cond = tuple(part[index % len(part)] for part in every)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def draw(self, mode: Callable[[], Any] = torch.inference_mode) -> torch.Tensor:
        n = self.config.n_samples
        with mode():
            x = torch.randn(n, *self.shape, device=self.device)
            for k in range(self.config.rollout_steps):
                t, dt = self.times[k].expand(n), self.times[k + 1] - self.times[k]
                x = x + dt * self.call(self.v_old, x, t, self.cond)
        return x

    def score(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.reward(self.decode(x))

    def train(self, x_1: torch.Tensor, reward: torch.Tensor) -> None:
        c, n = self.config, self.config.n_samples
        weight = (c.tau * (reward - reward.max())).exp()
        weight = weight / weight.mean()
        for _ in range(c.n_epochs):
            for i in torch.randperm(n, device=self.device).split(c.batch_size):
                t = torch.rand(len(i), device=self.device)
                x_0, t_ = torch.randn(len(i), *self.shape, device=self.device), t.view(-1, *[1] * len(self.shape))
                u = x_1[i] - x_0
                x_t, part = x_0 + t_ * u, tuple(p[i] for p in self.cond)
                v = self.call(self.network, x_t, t, part)
                with torch.no_grad():
                    ref, old = self.call(self.v_ref, x_t, t, part), self.call(self.v_old, x_t, t, part)
                loss = residual_loss(v, u, old, ref, weight[i], c.alpha)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), c.max_grad_norm)
                self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self.v_old.parameters()), list(self.network.parameters()))

    def iteration(self) -> None:
        x = self.draw()
        reward = self.score(x)
        self.train(x.clone(), reward.clone())


class BareLoRA:
    """Gradient steps on adapters of a transformer of Stable Diffusion 3, as one writes them with diffusers and peft.

    Frozen weights stay in their type. With `autocast` adapters are in float32 and networks compute in bfloat16, as
    diffusers' own training scripts do it; without, adapters have the type of the frozen weights.
    """

    def __init__(
        self, network: Any, targets: Iterable[str], rank: int, alpha: float = 1.0, autocast: bool = True
    ) -> None:
        from peft import LoraConfig

        self.network, self.alpha, self.autocast = network, alpha, autocast
        network.requires_grad_(False)
        for name in ("old", "current"):
            network.add_adapter(
                LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), init_lora_weights="gaussian"),
                adapter_name=name,
            )
        self.trained = [p for name, p in network.named_parameters() if ".lora_" in name and ".current." in name]
        if autocast:
            for name, parameter in network.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, weight_decay=0.0, fused=True)

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: Parts) -> torch.Tensor:
        return -self.network(
            hidden_states=x_t.to(cond[0].dtype),
            timestep=1000 * (1 - t),
            encoder_hidden_states=cond[0],
            pooled_projections=cond[1],
            return_dict=False,
        )[0].float()

    def step(self, x_1: torch.Tensor, weight: torch.Tensor, cond: Parts) -> None:
        x_0, t = torch.randn_like(x_1), torch.rand(len(x_1), device=x_1.device)
        u = x_1 - x_0
        x_t = x_0 + t.view(-1, 1, 1, 1) * u
        with torch.autocast(x_1.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                self.network.set_adapter("old")
                old = self.velocity(x_t, t, cond)
                self.network.disable_adapters()
                ref = self.velocity(x_t, t, cond)
                self.network.enable_adapters()
            self.network.set_adapter("current")
            v = self.velocity(x_t, t, cond)
        loss = residual_loss(v, u, old, ref, weight, self.alpha)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def update(self, x_1: torch.Tensor, weight: torch.Tensor, cond: Parts, batch_size: int) -> None:
        self.network.train()
        for i in torch.randperm(len(x_1), device=x_1.device).split(batch_size):
            self.step(x_1[i], weight[i], tuple(part[i] for part in cond))


def residual_loss(
    v: torch.Tensor, u: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, weight: torch.Tensor, alpha: float
) -> torch.Tensor:
    fit, keep, drift = ((v - other).square().flatten(1).mean(1) for other in (u, old, ref))
    return ((weight - 1) * fit + keep + alpha * drift).mean()
