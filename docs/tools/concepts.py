"""Draws the pictures of docs/concepts.md, on `gaussians-quadratic`; a minute on one core.

python docs/tools/concepts.py
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

import flowrl
from flowrl.functional.losses import effective_sample_size, reward_weights
from flowrl.functional.solvers import time_grid

IMAGES = Path(__file__).resolve().parents[1] / "images"
ENVIRONMENT = "gaussians-quadratic"
TAUS = (0.3, 1.0, 3.0)
ALPHAS = (1.0, 0.0)


def model(**settings: Any) -> flowrl.ORWCFMW2:
    return flowrl.ORWCFMW2("FlowPolicy", ENVIRONMENT, seed=0, **settings)


def noise(n: int) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def paths(reference: flowrl.ORWCFMW2) -> Figure:
    """Noise, the way of some points, and what they become, under the shipped flow."""
    times = time_grid(40)
    x = noise(1200)
    states = [x]
    for t, t_next in pairwise(times):
        with torch.no_grad():
            x = x + (t_next - t) * reference.policy.velocity(x, t.expand(len(x)), ())
        states.append(x)
    way = torch.stack(states)  # (41, n, 2)
    figure, panels = panels_of(3)
    for axes, title, points in ((panels[0], "noise, t = 0", way[0]), (panels[2], "samples, t = 1", way[-1])):
        axes.plot(*points.T, ".", markersize=2, color="C0")
        axes.set_title(title)
    for i in range(80):
        panels[1].plot(*way[:, i].T, linewidth=0.5, color="C7")
    panels[1].plot(*way[0, :80].T, ".", markersize=3, color="C1")
    panels[1].plot(*way[-1, :80].T, ".", markersize=3, color="C0")
    panels[1].set_title("paths of 80 of them")
    return figure


def weights(reference: flowrl.ORWCFMW2) -> Figure:
    """Samples of the reference, as large as their weights exp(tau r)."""
    samples = reference.policy.sample_latents(torch.zeros(400, dtype=torch.long), x_0=noise(400))
    groups = torch.zeros(len(samples), dtype=torch.long)
    reward = reference.env.core.evaluate(samples, groups).reward
    figure, panels = panels_of(len(TAUS))
    for axes, tau in zip(panels, TAUS):
        weight = reward_weights(reward, tau, "batch", groups, 1)
        share = effective_sample_size(weight).item() / len(weight)
        axes.scatter(*samples.T, s=6 * weight.clamp_max(40), color="C0", alpha=0.5, linewidths=0)
        axes.plot(1, 1, "x", color="black")
        axes.set_title(f"tau = {tau:g}: worth {100 * share:.0f} %")
    return figure


def alphas(reference: flowrl.ORWCFMW2, tell: Callable[[str], None]) -> Figure:
    """Samples before, and after fine-tuning with and without the regulariser."""
    trained = {"before": reference}
    for alpha in ALPHAS:
        settings = {"tau": 1.0, "learning_rate": 5e-4, "n_samples": 512}
        trained[f"alpha = {alpha:g}"] = model(alpha=alpha, **settings).learn(total_timesteps=30_720)
    figure, panels = panels_of(len(trained))
    for axes, (name, trained_model) in zip(panels, trained.items()):
        result = flowrl.evaluate(trained_model, n_samples=1024)
        axes.plot(*result.samples[:1024].T, ".", markersize=2, color="C0")
        axes.plot(1, 1, "x", color="black")
        axes.set_title(f"{name}\nreward {result.reward_mean:.2f}, diversity {result.diversity:.2f}")
        tell(f"{name}: reward {result.reward_mean:.3f}, diversity {result.diversity:.3f}, drift {result.drift:.3f}")
    return figure


def panels_of(n: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(3 * n, 3.4), layout="constrained")
    panels = [figure.add_subplot(1, n, i + 1) for i in range(n)]
    for axes in panels:
        axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        axes.title.set_fontsize(10)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """PNG of 32 colours, a few kB."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90)
    Image.open(stream).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    reference = model()
    for name, figure in (
        ("paths", paths(reference)),
        ("weights", weights(reference)),
        ("alpha", alphas(reference, print)),
    ):
        save(figure, out / f"concepts-{name}.png")


if __name__ == "__main__":
    main()
