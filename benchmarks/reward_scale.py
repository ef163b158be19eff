"""What becomes of a run when its reward is scaled or shifted: weights as they are, of mean one, standardised rewards.

    python benchmarks/reward_scale.py

ORW-CFM-W2 on gaussians-linear, the same seed throughout, with r, 100 r and r + 5 in place of the reward r. Prints a
Markdown table of what is won of r itself, and of the diversity kept.
"""

from __future__ import annotations

import argparse

import torch

import flowrl
from flowrl.envs.gaussians import REWARDS, GaussiansEnv, eight_gaussians
from flowrl.errors import FlowRLError

REWARD = REWARDS["linear"][0]
CHANGED = {"r": (1.0, 0.0), "100 r": (100.0, 0.0), "r + 5": (1.0, 5.0)}
WAYS = {
    "raw weights": {"weight_normalisation": "none"},
    "weights of mean one": {},
    "standardised rewards": {"standardise": "batch"},
}


def run(factor: float, shift: float, tau: float, samples: int, seed: int, **settings: str) -> tuple[float, float]:
    """Gain of r, and share of the reference's diversity."""
    env = GaussiansEnv(eight_gaussians(), lambda x: factor * REWARD(x) + shift, "gaussians")
    model = flowrl.ORWCFMW2(
        "FlowPolicy", env, seed=seed, device="cpu", tau=tau, alpha=0.3, learning_rate=1e-3, **settings
    )
    model.learn(samples)
    result = flowrl.evaluate(model, n_samples=512, seed=seed)
    assert result.reference is not None
    gain = (result.reward_mean - result.reference.reward_mean) / factor
    return gain, result.diversity / result.reference.diversity


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tau", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = [(name, args.tau) for name in CHANGED]
    columns.insert(2, ("100 r", args.tau / 100))
    print(f"| alpha 0.3 | {' | '.join(f'{name}, tau {tau:g}' for name, tau in columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for way, settings in WAYS.items():
        shown = []
        for name, tau in columns:
            try:
                gain, kept = run(*CHANGED[name], tau, args.samples, args.seed, **settings)
                shown.append(f"{gain:.3f}, {100 * kept:.1f} %")
            except FlowRLError as error:
                shown.append(type(error).__name__)
        print(f"| {way} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
