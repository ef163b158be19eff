"""Names of the hub with a revision, against a cache made by hand: there is no network in tests."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import flowrl
from flowrl.errors import ModelLoadError
from flowrl.models import loading
from flowrl.models.loading import ASSETS, source_of
from flowrl.pages import model_card as card
from flowrl.storage import revisions

OLD, NEW = "a" * 40, "b" * 40
SMALL = {"n_samples": 4, "batch_size": 4, "group_size": 2, "rollout_batch_size": 4, "rollout_steps": 2, "lora_rank": 2}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which OWNER/NAME is mini-sd3, at two commits; "main" is the newer one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(revisions, "READ", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models--OWNER--NAME"
    for commit in (OLD, NEW):
        shutil.copytree(ASSETS / "mini-sd3", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    return repository


def test_without_a_commit_it_is_said_which_one_was_read(hub: Path) -> None:
    with pytest.warns(UserWarning, match=f"without a commit, at {NEW} today; write OWNER/NAME@{NEW}"):
        source = source_of("OWNER/NAME")
    assert (source.source, source.revision) == ("OWNER/NAME", NEW)
    assert NEW in source.description
    assert revisions.READ == {"OWNER/NAME": NEW}


def test_a_commit_is_what_is_read(hub: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = source_of(f"OWNER/NAME@{OLD}")
    assert (source.source, source.revision) == (f"OWNER/NAME@{OLD}", OLD)
    shutil.rmtree(hub / "snapshots" / NEW)
    assert isinstance(source.load(), torch.nn.Module)
    assert card.hub_name(source) == "OWNER/NAME"


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loading._sd3_at_hand.cache_clear()
    yield
    loading._sd3_at_hand.cache_clear()


def answering(error: Exception | None, asked: list[str]) -> Any:
    def metadata(url: str, **kwargs: Any) -> None:
        asked.append(url)
        if error is not None:
            raise error

    return metadata


class GatedRepoError(Exception):
    """As the hub's client calls it; its own cannot be made without a response."""


def test_auto_without_cuda_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answering(None, asked))
    source = source_of("auto")
    assert source.source == "mini-sd3"
    assert source.description.endswith(
        "as there is no CUDA device; choose with --env.flow, e.g. --env.flow stabilityai/stable-diffusion-3.5-medium"
    )
    assert asked == []


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (GatedRepoError("401"), "its licence has not been accepted with a token that is known here"),
        (OSError("no route\nto host"), r"the hub gave no answer \(OSError: no route\)"),
    ],
)
def test_auto_with_cuda_where_the_files_cannot_be_had(
    error: Exception, why: str, hub: Path, with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answering(error, asked))
    env = flowrl.make("sd3-ocr", reward="compress")
    assert env.flow.source == "mini-sd3"
    assert flowrl.make("sd3-spatial").flow.source == "mini-spatial"
    said = f"a CUDA device is there, but not the files of {loading.DEFAULT_SD3}: .*{why}.*choose with --env.flow"
    assert re.search(said, env.describe()[0])
    assert "precision" not in env.recommended  # what is recommended is for the flow that is taken
    assert len(asked) == 1
    assert asked[0].endswith(f"{loading.DEFAULT_SD3}/resolve/main/model_index.json")


def test_auto_with_cuda_where_the_hub_answers(with_cuda: None, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answering(None, []))
    name, why = loading.chosen_sd3()
    assert name == loading.DEFAULT_SD3
    assert why == "a CUDA device is there and the hub answers for its files"
    assert flowrl.envs.text_to_image.recommended_for("auto")["precision"] == "bfloat16"


def test_auto_with_cuda_from_the_cache(hub: Path, with_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is whole: an index alone, or a part that was broken off, is none."""
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answering(OSError("offline"), asked))
    hub.rename(hub.with_name("models--stabilityai--stable-diffusion-3.5-medium"))
    snapshot = hub.with_name("models--stabilityai--stable-diffusion-3.5-medium") / "snapshots" / NEW
    source = source_of("auto")
    assert source.source == loading.DEFAULT_SD3
    assert "as a CUDA device is there and its files are in the local cache; choose with" in source.description
    assert source.description.endswith("--env.flow mini-sd3")
    assert asked == []
    weights = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    assert not revisions.at_hand(loading.DEFAULT_SD3)[0]
    shutil.copy(
        snapshot / "vae" / "diffusion_pytorch_model.safetensors",
        weights.with_name("diffusion_pytorch_model-00002-of-00002.safetensors"),
    )
    assert revisions.at_hand(loading.DEFAULT_SD3)[0]
    shutil.rmtree(snapshot / "vae")
    assert not revisions.at_hand(loading.DEFAULT_SD3)[0]


def test_a_commit_that_is_not_there(hub: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"Cannot get 'OWNER/NAME@{'c' * 40}' from the hub"):
        source_of(f"OWNER/NAME@{'c' * 40}")


@pytest.mark.filterwarnings("ignore:.*is read from the hub without a commit")
def test_a_checkpoint_goes_on_with_the_commit_that_it_was_trained_on(hub: Path, tmp_path: Path) -> None:
    """Though "main" has moved since."""
    (hub / "refs" / "main").write_text(OLD)
    env = {"flow": "OWNER/NAME"}
    model = flowrl.ORWCFMW2("FlowPolicy", "sd3-compress", env_settings=env, device="cpu", **SMALL)
    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["hub"] == {"OWNER/NAME": OLD}
    (hub / "refs" / "main").write_text(NEW)
    again = flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")
    assert again.env.core.flow.revision == OLD
    assert f'"OWNER/NAME", revision="{OLD}"' in card._base_code(again)


def test_models_of_rewards(hub: Path) -> None:
    shutil.copy(ASSETS / "mini-sd3" / "vae" / "config.json", hub / "snapshots" / OLD / "config.json")
    assert revisions.pinned(f"OWNER/NAME@{OLD}") == ("OWNER/NAME", OLD)
    assert revisions.pinned("OWNER/NAME@v1") == ("OWNER/NAME", "v1")  # not in the cache: loading says so
    assert revisions.pinned(str(hub)) == (str(hub), None)
    assert revisions.READ == {"OWNER/NAME": OLD}
