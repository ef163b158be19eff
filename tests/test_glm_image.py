"""GLM-Image's own part: image tokens that are drawn once for each prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import glm_image
from transformers import GlmImageProcessor

from flowrl.errors import ConfigError
from flowrl.models.families.glm_image import GlmImageFlow
from flowrl.models.families.registry import lacks_version
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineOptions
from flowrl.models.text_encoders import seed_of


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> GlmImageFlow:
    if lacks_version("GlmImagePipeline"):
        pytest.skip("GLM-Image is of a later diffusers")
    folder: Path = glm_image.build(tmp_path_factory.mktemp("glm"))
    flow = source_of(str(folder), pipeline=PipelineOptions(resolution=(32, 64), sequence_length=12)).load()
    assert isinstance(flow, GlmImageFlow)
    return flow


def test_image_tokens_depend_on_the_prompt_alone(flow: GlmImageFlow) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    together, apart = flow.encode(["white", "circles"]), flow.encode(["circles"])
    assert torch.equal(together[2][1], apart[2][0])
    assert not torch.equal(together[2][0], together[2][1])
    assert torch.equal(torch.random.get_rng_state(), before)  # which the pipeline seeds anew


def test_a_preview_is_drawn_before_them(flow: GlmImageFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 tokens, as published."""
    monkeypatch.setattr(GlmImageProcessor, "_get_target_shape", glm_image.target_shape)
    by = torch.Generator().manual_seed(seed_of("white circles"))
    expected, *_ = flow.pipeline.generate_prior_tokens(["white circles"], 32, 64, generator=by)
    assert torch.equal(flow.encode(["white circles"])[2], expected)
    assert expected.shape == (1, flow.sequence_length)


def test_quoted_text_is_not_cut(flow: GlmImageFlow) -> None:
    with pytest.raises(ConfigError, match=r"quotes has 1[0-9] tokens, more than 12: set sequence_length to at least"):
        flow.encode(["a sign 'of many words'"])
