"""Videos of Kandinsky 5: what their declaration takes from sizes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Kandinsky5I2VPipeline, Kandinsky5T2VPipeline
from families import kandinsky5_image_to_video, kandinsky5_video

from flowrl.errors import ConfigError
from flowrl.models.families import DECLARED
from flowrl.models.families.kandinsky5_image_to_video import levelled
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineOptions, Shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kandinsky5_video.build(tmp_path_factory.mktemp("kandinsky5"))


def shapes(
    folder: Path, *, kind: str = "T2V", resolution: Any = None, frames: int | None = None, **transformer: Any
) -> Shapes:
    configs = [json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae")]
    options = PipelineOptions(resolution=resolution, frames=frames)
    return DECLARED[f"Kandinsky5{kind}Pipeline"].shapes({**configs[0], **transformer}, configs[1], options)


@pytest.mark.parametrize("size", [(464, 480), (480, 480), (480, 848), (864, 480), (512, 768), (1024, 1024)])
def test_positions_are_scaled_as_by_the_pipeline(folder: Path, size: tuple[int, int]) -> None:
    options = PipelineOptions(resolution=size, frames=5)
    flow: Any = source_of(str(folder), pipeline=options).skeleton()
    assert flow.position_scales == Kandinsky5T2VPipeline._get_scale_factor(None, *size)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["T2V", "I2V"])
def test_sizes_are_those_of_the_pipelines_call(folder: Path, kind: str) -> None:
    assert shapes(folder, kind=kind).sample == (121, 3, 512, 768)
    assert shapes(folder, kind=kind).latent == (4, 31, 64, 96)


@pytest.mark.parametrize("level", [-0.5, 0.0, 0.07, 0.5])
@pytest.mark.parametrize("frames", [5, 7, 12])
def test_first_frames_are_levelled_as_by_the_pipeline(frames: int, level: float) -> None:
    """Each video for itself, whose first frames are nearer to the others than the bounds or further away."""
    x = torch.randn(3, 4, frames, 2, 3) * torch.tensor([0.3, 1.0, 1.6]).view(3, 1, 1, 1, 1)
    x[:, :, :4] = (x[:, :, :4] - x[:, :, :4].mean()) / x[:, :, :4].std() + x[:, :, 4:9].mean() + level
    pipe: Any = Kandinsky5I2VPipeline.__new__(Kandinsky5I2VPipeline)
    expected = [pipe.normalize_first_frame(video[None].movedim(1, -1)).movedim(-1, 1) for video in x]
    torch.testing.assert_close(levelled(x), torch.cat(expected))
    assert not torch.allclose(levelled(x), x, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_type": "nabla"}, "sparse attention"),
        ({"frames": 513}, "at most 509 .* not 513"),
        ({"frames": 7}, "e.g. 9"),
        ({"kind": "I2V", "frames": 13}, "at least 17 for this pipeline, which brings the first 4 .* not 13"),
        ({"kind": "I2V", "attention_type": "nabla"}, "sparse attention"),
        ({"resolution": (2048, 2064)}, "at most 2048 pixels"),
        ({"resolution": (40, 64)}, "multiple of 16 pixels for this pipeline, not 40x64; e.g. 32x64"),
    ],
)
def test_what_it_cannot_draw_is_said(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shapes(folder, **settings)


def test_a_network_without_room_for_a_mask_has_the_picture_in_the_latents_alone(tmp_path: Path) -> None:
    (case,) = kandinsky5_image_to_video.CASES
    options = replace(case.options, resolution=16)
    flow = source_of(str(kandinsky5_image_to_video.build(tmp_path, room=False)), pipeline=options).load()
    flow.pipeline.set_progress_bar_config(disable=True)
    x_0, cond = torch.randn(3, *flow.latent_shape), flow.encode(case.contexts)
    with torch.no_grad():
        expected = case.call(flow, x_0, 1.0, 1)
        ours = flow.arrived(x_0 + flow(x_0, torch.zeros(3), cond), cond)
    assert (ours - expected).abs().max() <= 1e-4
