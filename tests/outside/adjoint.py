"""Adjoint Matching (Domingo-Enrich et al. 2025, arXiv 2409.08861) on the memoryless noise of a flow."""

from dataclasses import dataclass

import torch

import flowrl
from flowrl.functional.flow import drawn, expand
from flowrl.functional.losses import squared_error
from flowrl.functional.sde import SDE


@dataclass(frozen=True)
class AdjointConfig(flowrl.FlowConfig):
    """Settings of Adjoint Matching."""

    strength: float = 1.0
    """lambda: the optimum is q_ref e^(lambda r)."""


class AdjointMatching(flowrl.FlowAlgorithm):
    """Regression of the velocity on the lean adjoint of noisy paths."""

    Config = AdjointConfig

    def draw(self, context_ids):
        times, window = self.policy.times(), range(1, len(self.policy.times()) - 2)  # noise has no limit at t = 0
        x_1, states, _ = self.policy.sample_path(
            context_ids, SDE("flow", 2**0.5), role=self.behaviour_role, window=window, generator=self.generator
        )
        x = x_1.detach().requires_grad_()
        a = -self.config.strength * torch.autograd.grad(self.reward_of(x, context_ids).sum(), x)[0]
        a, adjoints = a + self._pulled(states[:, -1], -2, context_ids, a), []  # the last step has no noise
        for k in reversed(window):
            a = a * times[k] / times[k + 1] + 2 * self._pulled(states[:, k - 1], k, context_ids, a)
            adjoints.append(a)
        return x_1, {"states": states[:, :-1], "adjoints": torch.stack(adjoints[::-1], 1)}

    def _pulled(self, x, k, context_ids, a):
        """`h (grad v_ref)^T a` of step k."""
        times, x = self.policy.times(), x.detach().requires_grad_()
        cond, t = self.policy.condition(context_ids), times[k].expand(len(x))
        v = self.policy.velocity(x, t, cond, "reference")
        return (times[k + 1] - times[k]) * torch.autograd.grad(v, x, a)[0]

    def loss(self, batch):
        states, n = batch.extra["states"], len(batch.x_1)
        g, d = self.generator, self.device
        k = drawn(lambda m: torch.randint(states.shape[1], (m,), generator=g, device=d), n, g)
        rows, t, cond = torch.arange(n, device=d), self.policy.times()[k + 1], self.policy.condition(batch.context_ids)
        v, v_ref = (self.policy.velocity(states[rows, k], t, cond, role) for role in ("current", "reference"))
        eta = (1 - t) / t
        target = v_ref - expand(eta, v) * batch.extra["adjoints"][rows, k]
        return (squared_error(v, target) / eta).mean(), {}
