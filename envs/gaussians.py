"""Gaussian mixtures in any dimension, rewards whose tilted answer is known, and the 2-D toy environments.

Everything here is exact: fields, densities and tilts are closed forms (docs/algorithms.md, C5 to C7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError
from flowrl.registry import EnvSpec
from flowrl.types import Contexts, RewardOutput


class GaussianMixture:
    """`q = sum_k pi_k N(mu_k, S_k)` in dimension D.

    Args:
        means: (K, D).
        covariances: (K, D, D), symmetric positive definite; or (D, D), shared.
        weights: (K,) positive, normalised here; equal when None.

    Raises:
        ConfigError: Shapes do not fit or a covariance is not positive definite.
    """

    def __init__(self, means: Any, covariances: Any, weights: Any = None) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float32)
        if self.means.dim() != 2:
            raise ConfigError(f"means must have shape (K, D), not {tuple(self.means.shape)}.")
        k, d = self.means.shape
        covariances = torch.as_tensor(covariances, dtype=torch.float32, device=self.means.device)
        if covariances.shape not in ((k, d, d), (d, d)):
            raise ConfigError(f"covariances must have shape {(k, d, d)} or {(d, d)}, not {tuple(covariances.shape)}.")
        self.covariances = covariances.expand(k, d, d).clone()
        self._check_covariances()
        weights = torch.as_tensor([1.0] * k if weights is None else weights).to(self.means)
        self._check_weights(weights)
        self.weights = weights / weights.sum()
        self._scale, self._axes = torch.linalg.eigh(self.covariances)  # (K, D), (K, D, D)

    def _check_covariances(self) -> None:
        symmetric = torch.allclose(self.covariances, self.covariances.mT, rtol=1e-4, atol=1e-6)
        if not symmetric or bool(torch.linalg.cholesky_ex(self.covariances).info.any()):
            raise ConfigError("Every covariance must be symmetric and positive definite.")

    def _check_weights(self, weights: torch.Tensor) -> None:
        k = len(self.means)
        if weights.shape != (k,) or not bool((weights >= 0).all() and weights.sum() > 0):
            raise ConfigError(f"weights must be {k} numbers, none negative, not all zero.")

    @property
    def dim(self) -> int:
        """Dimension D of a sample."""
        return self.means.shape[1]

    def to(self, device: torch.device | str) -> GaussianMixture:
        """Copy the mixture to `device`."""
        return GaussianMixture(self.means.to(device), self.covariances.to(device), self.weights.to(device))

    def velocity(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute the marginal velocity field of the straight path from N(0, I) to the mixture (C5).

        Args:
            t: (B,) or a scalar, in [0, 1].
            x: (B, D).

        Returns:
            E[x_1 - x_0 | x_t = x], (B, D), in the dtype of x.
        """
        means, weights, scale, axes = (p.to(x) for p in (self.means, self.weights, self._scale, self._axes))
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))[:, None]  # (B, 1)
        variance = t[..., None] ** 2 * scale + (1 - t[..., None]) ** 2  # (B, K, D) of C_k in its own axes
        offset = torch.einsum("kde,bkd->bke", axes, x[:, None] - t[..., None] * means)
        log_density = weights.log() - 0.5 * (offset**2 / variance + variance.log()).sum(-1)
        responsibility = log_density.softmax(dim=1)  # (B, K)
        gain = (t[..., None] * scale - (1 - t[..., None])) / variance
        shift = torch.einsum("kde,bke->bkd", axes, gain * offset)
        return (responsibility[..., None] * (means + shift)).sum(1)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the log density (B,) at `x` (B, D)."""
        components = torch.distributions.MultivariateNormal(self.means.to(x), self.covariances.to(x))
        return torch.logsumexp(self.weights.to(x).log() + components.log_prob(x[:, None]), dim=1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw `n` samples (n, D), on the generator's device; on the mixture's without one."""
        device = self.means.device if generator is None else generator.device
        means, weights, covariances = (p.to(device) for p in (self.means, self.weights, self.covariances))
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, device=device)
        factor = torch.linalg.cholesky(covariances)
        return means[k] + torch.einsum("bde,be->bd", factor[k], noise)

    def tilt(
        self,
        tau: float,
        linear: Any = None,
        quadratic: tuple[Any, Any] | None = None,
    ) -> GaussianMixture:
        """Tilt: the mixture `q e^{tau r} / Z` for `r = a.x - 1/2 (x - c)^T A (x - c)` (C6).

        Args:
            tau: Inverse temperature.
            linear: a, (D,).
            quadratic: (A, c) with shapes (D, D) and (D,).

        Raises:
            ConfigError: The tilted density cannot be normalised (P_k + tau A not positive definite).
        """
        d = self.dim
        means = self.means.double()
        a = means.new_zeros(d) if linear is None else torch.as_tensor(linear).to(means)
        curvature, centre = means.new_zeros(d, d), means.new_zeros(d)
        if quadratic is not None:
            curvature, centre = (torch.as_tensor(q).to(means) for q in quadratic)
        if a.shape != (d,) or curvature.shape != (d, d) or centre.shape != (d,):
            raise ConfigError(f"A tilt in dimension {d} takes shapes a ({d},), A ({d}, {d}) and c ({d},).")
        curvature = (curvature + curvature.mT) / 2  # only the symmetric part shows in the reward
        precision = torch.linalg.inv(self.covariances.double())  # P_k
        tilted_precision = precision + tau * curvature
        if bool(torch.linalg.cholesky_ex(tilted_precision).info.any()):
            raise ConfigError(f"The density tilted by tau = {tau:g} cannot be normalised: P + tau A is not positive.")
        covariances = torch.linalg.inv(tilted_precision)
        h = torch.einsum("kde,ke->kd", precision, means) + tau * (curvature @ centre + a)
        tilted_means = torch.einsum("kde,ke->kd", covariances, h)
        quadratic_form = torch.einsum("kd,kde,ke->k", means, precision, means)
        log_z = 0.5 * (torch.logdet(precision) - torch.logdet(tilted_precision)) - 0.5 * (
            quadratic_form + tau * centre @ curvature @ centre - (h * tilted_means).sum(1)
        )
        weights = (self.weights.double().log() + log_z).softmax(0)
        return GaussianMixture(tilted_means.float(), covariances.float(), weights.float())


class TiltableReward(Protocol):
    """A reward of points, `(B, D) -> (B,)`, that can draw from its own tilted mixture."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """Reward each point."""

    def sample_tilted(
        self, mixture: GaussianMixture, tau: float, n: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Draw `n` exact samples (n, D) of `q e^{tau r} / Z`."""


@dataclass(frozen=True)
class LinearReward:
    """`r = a.x + b`."""

    a: tuple[float, ...]
    b: float = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Reward points (B, D)."""
        return x @ torch.tensor(self.a, dtype=x.dtype, device=x.device) + self.b

    def tilt(self, mixture: GaussianMixture, tau: float) -> GaussianMixture:
        """Tilt a mixture by the reward, in closed form."""
        return mixture.tilt(tau, linear=self.a)

    def sample_tilted(
        self, mixture: GaussianMixture, tau: float, n: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Draw `n` exact samples of the tilted mixture."""
        return self.tilt(mixture, tau).sample(n, generator)


@dataclass(frozen=True)
class QuadraticReward:
    """`r = -1/2 (x - c)^T A (x - c)`, with A given as its rows."""

    A: tuple[tuple[float, ...], ...]
    c: tuple[float, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Reward points (B, D)."""
        offset = x - torch.tensor(self.c, dtype=x.dtype, device=x.device)
        curvature = torch.tensor(self.A, dtype=x.dtype, device=x.device)
        return -0.5 * torch.einsum("bd,de,be->b", offset, curvature, offset)

    def tilt(self, mixture: GaussianMixture, tau: float) -> GaussianMixture:
        """Tilt a mixture by the reward, in closed form."""
        return mixture.tilt(tau, quadratic=(self.A, self.c))

    def sample_tilted(
        self, mixture: GaussianMixture, tau: float, n: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Draw `n` exact samples of the tilted mixture."""
        return self.tilt(mixture, tau).sample(n, generator)


MOST_ROUNDS = 2_000
"""Rounds of rejection after which a ring's optimum is given up."""


@dataclass(frozen=True)
class RingReward:
    """`r = -1/2 ((|x - c| - radius) / width)^2`: best on a circle, which no Gaussian tilt can express."""

    radius: float
    width: float
    c: tuple[float, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Reward points (B, D)."""
        centre = torch.tensor(self.c, dtype=x.dtype, device=x.device)
        return -0.5 * (((x - centre).norm(dim=1) - self.radius) / self.width) ** 2

    def sample_tilted(
        self, mixture: GaussianMixture, tau: float, n: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Draw `n` exact samples by rejection: r <= 0, so `e^{tau r}` is a probability of acceptance.

        Raises:
            ConfigError: tau is negative: then it is none; or so large, or the ring so far off, that hardly a point of
                the mixture is accepted.
        """
        if not 0 <= tau < math.inf:
            raise ConfigError(f"The optimum of a ring is known for a finite tau of 0 or more, not {tau:g}.")
        accepted: list[torch.Tensor] = []
        for _ in range(MOST_ROUNDS):
            x = mixture.sample(8 * n, generator)
            u = torch.rand(len(x), generator=generator, device=x.device)
            accepted.append(x[u < (tau * self(x)).exp()])
            if sum(map(len, accepted)) >= n:
                return torch.cat(accepted)[:n]
        raise ConfigError(
            f"The optimum of this ring at tau = {tau:g} cannot be drawn: hardly any of {8 * n * MOST_ROUNDS} points of "
            "the mixture are on it. Take a smaller tau, or a ring nearer to the mixture."
        )


@dataclass(frozen=True)
class Oracle:
    """The exact answers of a Gaussian environment.

    Attributes:
        base: The reference mixture q_ref.
        reward: Its reward.
        tau: Inverse temperature of the optimum that evaluation compares with, `q_ref e^{tau r} / Z`.
    """

    base: GaussianMixture
    reward: TiltableReward
    tau: float = 1.0

    def sample(self, n: int, generator: torch.Generator | None = None, tau: float | None = None) -> torch.Tensor:
        """Draw `n` exact samples (n, D) of the optimum (or of the tilt by another tau)."""
        return self.reward.sample_tilted(self.base, self.tau if tau is None else tau, n, generator)


class GaussiansEnv(GenerationEnv):
    """One-step environment: the sample is a point, the reward any function of points.

    Args:
        mixture: Distribution of the pre-trained flow.
        reward: `(B, D) -> (B,)`; with a `sample_tilted` method (as `LinearReward`) the environment has an `oracle`.
        flow: Source of the flow (name, folder, or factory); None takes the mixture's exact field with a
            trainable correction.
        tau: Inverse temperature of the oracle's optimum.
        bound: The action space is [-bound, bound]^D.

    Raises:
        ConfigError: There is no optimum for that tau, or the flow is of another dimension.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        reward: Callable[[torch.Tensor], torch.Tensor],
        flow: Any = None,
        *,
        tau: float = 1.0,
        bound: float = 10.0,
        name: str = "gaussians",
        render_mode: str | None = None,
    ) -> None:
        from flowrl.models.loading import source_of
        from flowrl.models.mlp import FieldFlow

        if flow is None:
            flow = lambda: FieldFlow(mixture.velocity, mixture.dim)  # noqa: E731
        source = source_of(flow, sample_shape=(mixture.dim,))
        if source.sample_shape != (mixture.dim,):
            raise ConfigError(
                f"'{name}' needs a flow of samples of shape ({mixture.dim},), not {tuple(source.sample_shape)}."
            )
        super().__init__(source, contexts=[None], low=-bound, high=bound, name=name, render_mode=render_mode)
        self.mixture = mixture
        self.reward_function = reward
        self.oracle = Oracle(mixture, cast(TiltableReward, reward), tau) if hasattr(reward, "sample_tilted") else None
        if self.oracle is not None:
            self.oracle.sample(64, torch.Generator(mixture.means.device).manual_seed(0))  # now, not after the training

    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Reward points (B, D)."""
        return RewardOutput(self.reward_function(samples))


def eight_gaussians(radius: float = 2.0, std: float = 0.25) -> GaussianMixture:
    """Place eight equal Gaussians on a circle in the plane."""
    angle = torch.arange(8) * (math.pi / 4)
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std**2 * torch.eye(2))


@dataclass(frozen=True)
class GaussiansConfig:
    """Settings of the `gaussians-*` environments."""

    flow: str = "gaussians"
    """Flow to fine-tune: "gaussians" (the shipped MLP), "exact" (the exact field plus a trainable
    correction), or a folder that `MLPFlow` saved."""
    tau: float = 1.0
    """Inverse temperature of the exact optimum that evaluation compares with."""


REWARDS: dict[str, tuple[TiltableReward, str]] = {
    "linear": (LinearReward((1.0, 0.0)), "reward grows to the right"),
    "quadratic": (QuadraticReward(((1.0, 0.0), (0.0, 1.0)), (1.0, 1.0)), "reward is nearness to a point"),
    "ring": (RingReward(1.5, 0.5, (1.0, 0.0)), "reward is nearness to a circle"),
}


def _factory(kind: str) -> Callable[[GaussiansConfig], GaussiansEnv]:
    def make(config: GaussiansConfig) -> GaussiansEnv:
        flow = None if config.flow == "exact" else config.flow
        return GaussiansEnv(eight_gaussians(), REWARDS[kind][0], flow, tau=config.tau, name=f"gaussians-{kind}")

    return make


RECOMMENDED = {  # chosen by the exact W2 to the optimum, with benchmarks/tuning/toy.toml
    "target_lambda": 1.0,  # of the exact optimum that evaluation compares with
    "endpoint.tau": 0.5,
    "endpoint.alpha": 0.2,
    "endpoint.baseline": "local",
    "endpoint.learning_rate": 5e-4,
    "advantages.critic_learning_rate": 2e-3,  # without it errors of the field grow, see docs/algorithms.md
    "advantages.beta_ref": 1.0,  # where the method has one; target_lambda sets it
    "advantages.decay_rate": 0.0,
    "advantages.ema_decay": 0.9,
    "advantages.learning_rate": 1e-3,
    "endpoint-kl.tau": 1.0,
    "endpoint-kl.alpha": 0.3,
    "endpoint-kl.learning_rate": 5e-4,
    "endpoint-free.tau": 0.03,
    "offline.tau": 1.0,
    "offline.learning_rate": 1e-3,
    "likelihood.learning_rate": 1e-3,
    "selection.group_size": 2,
    "selection.learning_rate": 1e-4,
    "mixture.n_samples": 256,
    "mixture.batch_size": 128,
    "mixture.n_epochs": 4,
    "mixture.learning_rate": 1e-3,
    "mixture.lr_schedule": "linear",
    "mixture.ema_decay": 0.998,
    "steps-free.learning_rate": 3e-5,
    "steps-free.clip_range": 0.02,
    "steps-free.batch_size": 512,
    "steps.learning_rate": 1e-3,
    "steps.clip_range": 0.1,  # log-probabilities here are means over two dimensions only
    "steps.batch_size": 512,
}
SPECS = [
    EnvSpec(
        name=f"gaussians-{kind}",
        differentiable=True,
        factory=_factory(kind),
        config=GaussiansConfig(),
        recommended=lambda config: {**RECOMMENDED, "target_lambda": max(config.tau, 0.0)},
        total_timesteps=50_000,
        summary=f"eight Gaussians in the plane; {what}; the exact optimum is known",
    )
    for kind, (_, what) in REWARDS.items()
]
