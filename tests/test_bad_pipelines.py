"""Folders that are no whole pipeline, and classes that are no flow: what is said of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
from families import glm_image, hidream, hunyuan_image, nucleusmoe_image

from flowrl.errors import ModelLoadError
from flowrl.models.families import NO_FLOWS
from flowrl.models.families.registry import declared, lacks_version
from flowrl.models.loading import source_of


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (small_pipelines.sd3, ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_3"]),
        (hunyuan_image.build, ["text_encoder", "tokenizer_2"]),  # a tokenizer without a vocabulary
        (glm_image.build, ["processor", "vision_language_encoder"]),
        (nucleusmoe_image.CASES[0].build, ["processor", "text_encoder"]),
    ],
)
def test_a_missing_part_is_named(build: Callable[[Path], Any], parts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    build(folder)
    if lacks_version(kind := json.loads((folder / "model_index.json").read_text())["_class_name"]):
        pytest.skip(f"{kind} is of a later diffusers")
    for part in parts:
        shutil.move(folder / part, tmp_path / "away")
        with pytest.raises(ModelLoadError, match=f"is incomplete: .*'{part}'"):
            source_of(str(folder)).load()
        shutil.move(tmp_path / "away", folder / part)


def test_a_text_encoder_that_is_published_elsewhere_is_named(tmp_path: Path) -> None:
    hidream.CASES[0].build(tmp_path)
    index = tmp_path / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps({name: part for name, part in parts.items() if not name.endswith("_4")}))
    with pytest.raises(ModelLoadError, match="has no text_encoder_4, which its publisher leaves"):
        source_of(str(tmp_path))


def test_weights_in_few_bits_are_not_taken_for_damaged_ones(tmp_path: Path) -> None:
    small_pipelines.sd3(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    quantised = {"quantization_config": {"quant_method": "of nobody"}}  # whose library is missing, or needs a GPU
    config.write_text(json.dumps(json.loads(config.read_text()) | quantised))
    with pytest.raises(ModelLoadError, match=r"cannot be loaded: .* 8 bits or fewer \(transformer\), .*bfloat16"):
        source_of(str(tmp_path)).load()


@pytest.mark.parametrize("kind", NO_FLOWS)
def test_a_class_that_is_no_flow_says_why(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ModelLoadError, match=re.escape(f"is a {kind}, which flowrl does not train: {NO_FLOWS[kind]}.")):
        source_of(str(tmp_path))


def test_what_is_often_taken_for_a_flow_is_among_them() -> None:
    assert {"SanaSprintPipeline", "StableAudioPipeline", "CogVideoXPipeline"} <= NO_FLOWS.keys()


def test_a_class_of_a_later_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.models.families.registry.version", lambda name: "0.41.0")
    with pytest.raises(ModelLoadError, match=r"taken from diffusers 0\.42 on \(installed: 0\.41\.0"):
        declared("GlmImagePipeline", "mine")
    assert declared("SanaPipeline", "mine").PIPELINE == "SanaPipeline"
