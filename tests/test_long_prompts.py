"""Prompts that text encoders cut: one warning of flowrl's own, and none of the libraries'."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator

import pytest
import small_pipelines
import torch
from small_pipelines import PROMPTS

from flowrl.models.loading import source_of
from flowrl.models.long_prompts import lost_part, warn_of_cut
from flowrl.models.pipeline import PipelineFlow

LONG = "three red stars on blue " * 6 + "and two green squares"
T5_LONG = "white circles " * 300
LIBRARIES = ("diffusers", "transformers")


@pytest.fixture(scope="module", params=["sd3", "flux"])
def flow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PipelineFlow:
    folder = getattr(small_pipelines, request.param)(tmp_path_factory.mktemp("long") / "flow")
    model = source_of(str(folder)).load()
    assert isinstance(model, PipelineFlow)
    return model


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the libraries log at the level of warnings and above."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    yield records
    for name in LIBRARIES:
        logging.getLogger(name).removeHandler(handler)


def test_one_warning_counts_and_names(flow: PipelineFlow, said: list[str]) -> None:
    with pytest.warns(UserWarning, match="prompts are longer") as caught:
        flow.encode([PROMPTS[0], LONG, T5_LONG, LONG])
    (message,) = [str(warning.message) for warning in caught if "prompts are longer" in str(warning.message)]
    assert message.startswith("2 of 3 prompts are longer than the flow's text encoders can take, and are cut: ")
    assert "the first is 'three red stars on blue three" in message
    assert re.search(r"CLIP takes 16 tokens and loses '[^']*and two green squares' of the first", message)
    assert re.search(rf"T5 takes {flow.max_sequence_length} tokens and loses '[^']*circles' of the first", message)
    assert said == []


def test_prompts_that_fit_are_passed_over(flow: PipelineFlow, said: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*prompts are longer")
        flow.encode([*PROMPTS, ""])
    assert said == []


def test_what_is_lost_is_what_the_encoder_does_not_see(flow: PipelineFlow) -> None:
    """The prompt without it is encoded alike."""
    ((_, tokenizer, most), *_) = [entry for entry in flow.tokenizers() if entry[0] == "CLIP"]
    lost = lost_part(tokenizer, LONG, most)
    assert LONG.endswith(lost)
    kept = LONG.removesuffix(lost).strip()
    assert lost_part(tokenizer, kept, most) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, cut = flow.encode([LONG])[1], flow.encode([kept])[1]  # pooled, of CLIP alone
    assert torch.equal(whole, cut)


def test_the_libraries_say_what_they_said_before(flow: PipelineFlow) -> None:
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        flow.encode([LONG])
    assert diffusers_logging.get_verbosity() == before


def test_nothing_to_say() -> None:
    assert not warn_of_cut(["a"], [], "nobody")
