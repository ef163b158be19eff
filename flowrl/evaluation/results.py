"""Results of an evaluation: figures of the trained flow beside its reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flowrl.checks import in_all
from flowrl.errors import ConfigError


@dataclass(frozen=True)
class SampleStatistics:
    """Figures of a set of samples.

    Attributes:
        reward_mean: Mean reward.
        reward_ci: 95 % confidence interval of the mean over all prompts, also where only some of them were drawn.
        reward_std: Standard deviation over samples.
        components: Mean of each component of the reward.
        diversity: Mean Euclidean distance of two samples of the same context (flattened).
        w2_to_optimum: Exact W2 to equally many exact samples of the environment's optimum; NaN without an oracle.
        side: Means of what was measured beside the reward: held-out rewards, looks of images, and errors by the
            environment's judges.
    """

    reward_mean: float
    reward_ci: tuple[float, float]
    reward_std: float
    components: dict[str, float]
    diversity: float
    w2_to_optimum: float = math.nan
    side: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult(SampleStatistics):
    """Statistics of the trained flow beside those of the reference.

    Attributes:
        drift: `E|v - v_ref|^2` over flow time, mean over dimensions.
        velocity_ratio: `E|v| / E|v_ref|` over flow time, norms over all dimensions.
        win_rates: Share of the contexts and noises (of steered samples: contexts) at which the trained flow's sample
            has more reward than the reference's, ties counting half, by name: "reward", and held-out rewards. Of those
            that compare the samples of a call, "winrate(NAME)" and pairwise ones have one.
        win_rate_cis: Their 95 % confidence intervals, within 0 and 1 (`metrics.share_interval`).
        warnings: What fell while the reward rose (signs of a reward that is exploited), and signs of a flow that has
            diverged or collapsed.
        ess: Effective share of the samples under the weights of training's last iteration, in (0, 1]; NaN for methods
            without weights, flows that no algorithm trains, and prompts that training does not draw.
        n_samples: Samples of each flow.
        trained_samples: Samples that the flow had been trained on; None of a policy that no algorithm trains.
        prompts: Source of their prompts: "train", "held_out", a file or set, or "given".
        n_prompts: Number of prompts; 0 for an unconditional flow.
        sampling: Settings of the sampler that are not those of training, by name; empty when all are.
        evaluations_per_sample: Network evaluations that a sample of the trained flow cost.
        per_prompt: For each prompt drawn, its picture if it has one, the number of samples and the mean rewards of the
            reference and of the trained flow; empty for an unconditional flow.
        reference: The same statistics of the reference, at the same noise and contexts.
        w2_floor: W2 of two independent sets of exact samples of that size: the least that `w2_to_optimum` can reach.
        samples: A few samples of the trained flow (for grids), decoded, on the CPU.
        reference_samples: The reference's samples at the same noise.
        sample_contexts: Their contexts.
    """

    drift: float = math.nan
    velocity_ratio: float = math.nan
    win_rates: dict[str, float] = field(default_factory=dict)
    win_rate_cis: dict[str, tuple[float, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    ess: float = math.nan
    n_samples: int = 0
    trained_samples: int | None = None
    prompts: str = "train"
    n_prompts: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    evaluations_per_sample: float = math.nan
    per_prompt: list[dict[str, Any]] = field(default_factory=list, repr=False)
    reference: SampleStatistics | None = None
    w2_floor: float = math.nan
    samples: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    reference_samples: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    sample_contexts: list[Any] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers for JSON; samples are left out."""
        numbers = asdict(self)
        for key in ("samples", "reference_samples", "sample_contexts"):
            del numbers[key]
        return numbers

    def table(self) -> str:
        """Format a small table: reference, trained, change."""
        before = self.reference
        if before is None:
            raise ConfigError("This result holds no reference to compare with.")
        rows = [("reward", before.reward_mean, self.reward_mean)]
        parts = before.components, self.components
        rows += [(name, parts[0][name], parts[1][name]) for name in in_all(parts)]
        rows += [("diversity", before.diversity, self.diversity)]
        rows += [(name, before.side[name], value) for name, value in self.side.items()]
        if not math.isnan(self.w2_to_optimum):
            rows += [("W2 to optimum", before.w2_to_optimum, self.w2_to_optimum)]
        rows = [(str(name), a, b) for name, a, b in rows]  # components may be named by numbers
        width = max(16, *(len(name) + 1 for name, _, _ in rows))
        lines = [f"{'':{width}s}{'reference':>12s}{'trained':>12s}{'change':>12s}"]
        lines += [f"{name:{width}s}{a:12.4g}{b:12.4g}{b - a:+12.4g}" for name, a, b in rows]
        low, high = self.reward_ci
        interval = "none" if math.isnan(low) else f"{low:.4g} to {high:.4g}"
        lines.append(f"reward of trained, 95 % interval: {interval} ({self.n_samples} samples)")
        if self.win_rates:
            each = [f"{name} {rate:.3g}{within(self.win_rate_cis[name])}" for name, rate in self.win_rates.items()]
            lines.append(f"win rate over the reference: {', '.join(each)}")
        share = "" if math.isnan(self.ess) else f"effective sample share: {self.ess:.3f}"
        drift = "" if math.isnan(self.drift) else f"drift E|v - v_ref|^2: {self.drift:.4g}"  # none of steered samples
        lines += ["    ".join(filter(None, (drift, share)))] if drift or share else []
        if self.n_prompts:
            lines.append(asked(self.prompts, self.n_prompts, len(self.per_prompt)))
        if self.sampling:
            lines.append(f"sampled with {listed(self.sampling)}, otherwise as in training")
        if not math.isnan(self.w2_floor):
            lines.append(f"W2 floor (exact samples against each other): {self.w2_floor:.4g}")
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def asked(source: str, n: int, n_drawn: int) -> str:
    """Say which prompts an evaluation drew: "prompts: train (30)", or "(16 of 30)"."""
    return f"prompts: {source} ({f'{n_drawn} of {n}' if 0 < n_drawn < n else n})"


def listed(sampling: Mapping[str, Any]) -> str:
    """List settings of a sampler: "steps = 4, solver = heun"."""
    return ", ".join(f"{name} = {value}" for name, value in sampling.items())


def within(interval: tuple[float, float]) -> str:
    """Write an interval, " (LOW to HIGH)"; nothing where there is none."""
    return "" if math.isnan(interval[0]) else f" ({interval[0]:.3g} to {interval[1]:.3g})"
