"""Pictures of samples that are no images: dots where their points are, matplotlib where an environment draws by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flowrl
from flowrl.runs.pictures import save_picture
from flowrl.runs.scatter import LEFT, SIDE, SIZE, TOP, scatter


def inked(picture: Image.Image) -> np.ndarray:
    """Blueness within the frame, (SIDE, SIDE) in [0, 1]."""
    inside = np.asarray(picture, dtype=float)[TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    return ((inside[..., 2] - inside[..., 0]) / 255)[1:-1, 1:-1]


@pytest.mark.parametrize("point", [(0.0, 0.0), (3.0, -1.0), (-2.5, 2.0)])
def test_a_dot_is_where_its_point_is(point: tuple[float, float]) -> None:
    ink = inked(scatter(np.array([point]), "one"))
    rows, columns = np.indices(ink.shape)
    x, y = (
        ((columns * ink).sum() / ink.sum() + 1.5) / SIDE * 8 - 4,
        4 - ((rows * ink).sum() / ink.sum() + 1.5) / SIDE * 8,
    )
    assert (x, y) == pytest.approx(point, abs=0.01)
    assert 2 < (ink > 0).sum() < 20


def test_dots_let_others_show_through() -> None:
    one, two = (inked(scatter(np.zeros((n, 2)), "")).max() for n in (1, 2))
    assert one < two < (180 - 31) / 255 + 0.01
    assert one == pytest.approx(0.6 * (180 - 31) / 255, abs=0.01)


@pytest.mark.parametrize("point", [(np.nan, 0.0), (np.inf, 0.0), (5.0, 0.0), (0.0, -1e30)])
def test_what_is_outside_is_left_out(point: tuple[float, float]) -> None:
    assert inked(scatter(np.array([point]), "none")).max() == 0


def test_half_a_dot_is_at_the_edge() -> None:
    assert 0 < inked(scatter(np.array([(4.0, 0.0)]), "edge")).sum() < inked(scatter(np.zeros((1, 2)), "whole")).sum()


def test_the_frame_has_ticks_and_a_title() -> None:
    picture = np.asarray(scatter(np.zeros((0, 2)), "title").convert("L"))
    assert picture.shape == (SIZE, SIZE)
    for part in (picture[:TOP], picture[TOP + SIDE :], picture[:, :LEFT]):
        assert (part < 128).sum() > 50
    assert not np.array_equal(picture, np.asarray(scatter(np.zeros((0, 2)), "other").convert("L")))


class Drawn(flowrl.GenerationEnv):
    """An environment that draws by matplotlib."""

    def plot(self, axes: object, samples: torch.Tensor) -> None:
        axes.axhline(float(samples.mean()), color="red")


def test_an_environment_draws_as_it_says(tmp_path: Path) -> None:
    env = flowrl.make("gaussians-linear")
    save_picture(torch.zeros(4, 2), [None] * 4, env, tmp_path / "dots.png")
    env.__class__ = Drawn
    save_picture(torch.zeros(4, 2), [None] * 4, env, tmp_path / "line.png")
    assert Image.open(tmp_path / "dots.png").size == (SIZE, SIZE)
    red = np.asarray(Image.open(tmp_path / "line.png").convert("RGB"), dtype=int)
    assert ((red[..., 0] > 200) & (red[..., 1] < 50)).sum() > 100


def test_a_toy_run_does_without_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys; from flowrl.run import main; main(sys.argv[1:]);"
        "print([m for m in ('matplotlib', 'diffusers', 'torch._dynamo', 'sklearn') if m in sys.modules])"
    )
    options = ["--algo", "orw_w2", "--env", "gaussians-linear", "--algo.n-samples", "32", "--algo.batch-size", "32"]
    options += ["--total-timesteps", "64", "--eval-samples", "32", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in (folder / "samples").iterdir()} == {"0000-reference.png", "0002.png"}
    assert (folder / "before_after.png").exists()
