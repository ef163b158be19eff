"""Names of the hub with a revision, against a cache made by hand: there is no network in tests."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import flowrl
from flowrl.errors import ModelLoadError
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
