"""Videos of Kandinsky 5: what their declaration takes from sizes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import Kandinsky5T2VPipeline
from families import kandinsky5_video

from flowrl.errors import ConfigError
from flowrl.models.families import DECLARED
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineOptions, Shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kandinsky5_video.build(tmp_path_factory.mktemp("kandinsky5"))


def shapes(folder: Path, *, resolution: Any = None, frames: int | None = None, **transformer: Any) -> Shapes:
    configs = [json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae")]
    options = PipelineOptions(resolution=resolution, frames=frames)
    return DECLARED["Kandinsky5T2VPipeline"].shapes({**configs[0], **transformer}, configs[1], options)


@pytest.mark.parametrize("size", [(464, 480), (480, 480), (480, 848), (864, 480), (512, 768), (1024, 1024)])
def test_positions_are_scaled_as_by_the_pipeline(folder: Path, size: tuple[int, int]) -> None:
    options = PipelineOptions(resolution=size, frames=5)
    flow: Any = source_of(str(folder), pipeline=options).skeleton()
    assert flow.position_scales == Kandinsky5T2VPipeline._get_scale_factor(None, *size)  # type: ignore[arg-type]


def test_sizes_are_those_of_the_pipelines_call(folder: Path) -> None:
    assert shapes(folder).sample == (121, 3, 512, 768)
    assert shapes(folder).latent == (4, 31, 64, 96)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_type": "nabla"}, "sparse attention"),
        ({"frames": 513}, "at most 509 .* not 513"),
        ({"frames": 7}, "e.g. 9"),
        ({"resolution": (2048, 2064)}, "at most 2048 pixels"),
        ({"resolution": (40, 64)}, "multiple of 16 pixels for this pipeline, not 40x64; e.g. 32x64"),
    ],
)
def test_what_it_cannot_draw_is_said(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shapes(folder, **settings)
