"""Exported folders: what others load, the model card, and what is uploaded."""

from __future__ import annotations

import ast
import dataclasses
import errno
import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import small_pipelines
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file

import flowrl
from flowrl.errors import CheckpointError, ConfigError, HubError
from flowrl.export import export, main
from flowrl.models.loading import ASSETS, source_of
from flowrl.pages import model_card
from flowrl.pages.model_card import LIMITATIONS, NOT_EVALUATED, _use, _with_interval, _without_folders
from flowrl.runs import pictures
from flowrl.runs.folder import load_model
from flowrl.runs.pictures import STEPS
from flowrl.sample import draw, seeded_noise
from flowrl.storage import hub
from flowrl.training.policy import FlowPolicy

MINI = ASSETS / "mini-sd3"
CARD = ["README.md", "before_after.png", "curves.png", "export.json", "sampling.json"]


@pytest.fixture(scope="module")
def shared(tiny_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs "lora" and "full", exported; and "hub", as "full" would be if its base were on the hub. Read only."""
    out = tmp_path_factory.mktemp("shared")
    for name in ("lora", "full"):
        assert main([str(tiny_runs[name]), str(out / name)]) == 0
    model = load_model(tiny_runs["full"], device="cpu")
    core = model.env.core
    core.flow = dataclasses.replace(core.flow, source="someone/base-sd3")
    export(model, tiny_runs["full"], out / "hub", name="me/my-sd3")
    return {name: out / name for name in ("lora", "full", "hub")}


@pytest.fixture(scope="module")
def policies(tiny_runs: dict[str, Path]) -> dict[str, FlowPolicy]:
    found = {name: load_model(tiny_runs[name], device="cpu").policy for name in ("lora", "full")}
    return {**found, "hub": found["full"]}


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["lora", "full", "hub"])
def test_the_cards_snippet_draws_what_flowrl_draws(
    shared: dict[str, Path],
    policies: dict[str, FlowPolicy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """As it stands, where the folder's name leads to it; names on the hub are replaced by folders."""
    (code,) = re.findall(r"```python\n(.*?)```", card(shared[kind]), re.DOTALL)
    if kind == "hub":
        for name, place in (("me/my-sd3", shared["hub"]), ("someone/base-sd3", MINI)):
            assert json.dumps(name) in code
            code = code.replace(json.dumps(name), json.dumps(str(place)))
    else:
        (tmp_path / shared[kind].name).symlink_to(shared[kind])
    (tmp_path / "snippet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("snippet.py")
    policy = policies[kind]
    (ours,) = draw(policy, policy.contexts[:1], [0])
    theirs = np.asarray(Image.open("image.png")).astype(int)
    assert abs((255 * ours[0]).round().permute(1, 2, 0).numpy() - theirs).max() <= 1
    for role in ("current", "reference"):  # the snippet's weights are the moving average
        (other,) = draw(policy, policy.contexts[:1], [0], role=role)
        assert abs((255 * other[0]).round().permute(1, 2, 0).numpy() - theirs).max() > 5


def test_files_of_lora(shared: dict[str, Path], tiny_runs: dict[str, Path]) -> None:
    assert files(shared["lora"]) == sorted([*CARD, "pytorch_lora_weights.safetensors"])
    mine, final = (
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (shared["lora"], tiny_runs["lora"] / "final")
    )
    assert mine.keys() == final.keys()
    assert all(torch.equal(mine[key], final[key]) for key in mine)
    for picture in ("before_after.png", "curves.png"):
        assert Image.open(shared["lora"] / picture).width > 100


def test_files_of_a_network_whose_base_is_on_the_hub(shared: dict[str, Path]) -> None:
    weights = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    assert files(shared["hub"]) == sorted([*CARD, *weights])
    assert SD3Transformer2DModel.from_pretrained(shared["hub"], subfolder="transformer").dtype == torch.float32


def test_a_whole_pipeline(shared: dict[str, Path], policies: dict[str, FlowPolicy]) -> None:
    """It needs nothing else; flowrl itself can go on from it."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(shared["full"])
    pipeline.set_progress_bar_config(disable=True)
    policy, prompts = policies["full"], ["three red stars on blue", "two squares"]
    noise = seeded_noise([1, 2], policy.model.latent_shape)
    sampling = json.loads((shared["full"] / "sampling.json").read_text())
    theirs = pipeline(prompts, latents=noise, output_type="pt", **sampling).images
    (ours,) = draw(policy, prompts, [1, 2])
    assert (ours - theirs).abs().max() <= 1e-3
    again = source_of(str(shared["full"]))
    assert again.sample_shape == policy.model.sample_shape
    loaded = again.load()
    assert loaded.max_sequence_length == 1
    network = policy.networks.model_of("ema").network.state_dict()
    assert all(torch.equal(value, network[key]) for key, value in loaded.network.state_dict().items())
    for name in ("vocab.json", "merges.txt"):  # which transformers 4 reads
        assert (shared["full"] / "tokenizer" / name).read_text() == (MINI / "tokenizer" / name).read_text()


@pytest.mark.parametrize(
    ("env", "algo", "levels"),
    [
        ({}, {"precision": "bfloat16"}, 8),
        ({}, {"lora_rank": 2}, 1),
        ({"t5": False}, {}, 1),
        ({"t5": False}, {"lora_rank": 2}, 1),
    ],
    ids=["low precision", "LoRA of files in low precision", "whole without T5", "LoRA without T5"],
)
def test_the_cards_snippet_fits_how_the_run_loaded_its_pipeline(
    env: dict[str, Any], algo: dict[str, Any], levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of another precision do not go together, and diffusers must be told which encoders are left out."""
    monkeypatch.chdir(tmp_path)
    base = StableDiffusion3Pipeline.from_pretrained(small_pipelines.sd3(tmp_path / "high"))
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    settings = {"flow": "base", "prompts": ("two squares",), "resolution": 16, **env}
    sizes = {"n_samples": 8, "batch_size": 4, "group_size": 2, "rollout_steps": 3}
    model = flowrl.ORWCFMW2(
        "FlowPolicy",
        "sd3-compress",
        seed=0,
        device="cpu",
        env_settings=settings,
        **{"precision": "float32", "lora_rank": 0, **sizes, **algo},
    )
    before = model.policy.model.pipeline.vae.dtype
    export(model, tmp_path, tmp_path / "out")
    assert model.policy.model.pipeline.vae.dtype == before
    (code,) = re.findall(r"```python\n(.*?)```", card(tmp_path / "out"), re.DOTALL)
    (tmp_path / "snippet.py").write_text(code)
    runpy.run_path("snippet.py")
    (ours,) = draw(model.policy, ["two squares"], [0])
    theirs = np.asarray(Image.open("image.png")).astype(int)
    assert abs((255 * ours[0]).round().permute(1, 2, 0).numpy() - theirs).max() <= levels


def test_exporting_leaves_the_model_as_it_was(policies: dict[str, FlowPolicy], shared: dict[str, Path]) -> None:
    policy = policies["full"]
    assert policy.model.pipeline.transformer is policy.model.network is policy.networks.model_of("current").network


def test_front_matter(shared: dict[str, Path]) -> None:
    """Read by the hub's own library."""
    data = huggingface_hub.ModelCard.load(shared["hub"] / "README.md").data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert data["base_model"] == "someone/base-sd3"
    assert "license" not in data
    assert "lora" not in data["tags"]
    assert {"flowrl", "text-to-image"} <= set(data["tags"])
    assert "instance_prompt: null\n" in card(shared["hub"]).split("---")[1]
    lora = huggingface_hub.ModelCard.load(shared["lora"] / "README.md").data.to_dict()
    assert "lora" in lora["tags"]
    assert "base_model" not in lora  # mini-sd3 is not on the hub
    assert "`mini-sd3`, which ships with [flowrl]" in card(shared["lora"])


def test_the_card_says_what_was_done(shared: dict[str, Path], tiny_runs: dict[str, Path]) -> None:
    text = card(shared["lora"])
    result = json.loads((tiny_runs["lora"] / "evaluation.json").read_text())
    assert result["reward_ci"] == [None, None]  # eight samples of one prompt of thirty say nothing of the others
    assert f"| reward | {result['reference']['reward_mean']:.4g} (–) | {result['reward_mean']:.4g} (–) |" in text
    assert f"| diversity | {result['reference']['diversity']:.4g} | {result['diversity']:.4g} |" in text
    assert f"| 0 | {result['drift']:.4g} |" in text
    state = json.loads((tiny_runs["lora"] / "final" / "state.json").read_text())
    assert f"16 generated samples, {state['_n_updates']} gradient steps, {state['evaluations']:,} network" in text
    for expected in ("`orw_w2`", "minus the JPEG size", '"lora_rank": 4', '"learning_rate": 0.02', "prompts (30)"):
        assert expected in text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (shared["lora"] / picture).is_file()
    assert text.rstrip().endswith(LIMITATIONS)
    assert len(re.findall(r"\.(?: |$)", LIMITATIONS)) == 2


def test_the_card_has_an_interval_where_there_is_one() -> None:
    assert _with_interval({"reward_mean": 1.5, "reward_ci": [1.25, 1.75]}) == "1.5 (1.25 to 1.75)"
    assert _with_interval({"reward_mean": 1.5, "reward_ci": [None, None]}) == "1.5 (–)"


def test_paths_of_this_machine_stay_out_of_the_card(tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(MINI, tmp_path / "someones" / "my-sd3")
    model = load_model(tiny_runs["full"], device="cpu")
    core = model.env.core
    flow = str(tmp_path / "someones" / "my-sd3")
    core.flow, core.origin = source_of(flow), ("sd3-compress", {"flow": flow})
    export(model, tmp_path / "no-run", tmp_path / "out")
    assert "`my-sd3`, a local pipeline" in card(tmp_path / "out")
    for name in ("README.md", "export.json", "sampling.json"):
        assert "someones" not in (tmp_path / "out" / name).read_text()
    options = {"reward_options": ("a.head=/home/me/b.pth", "a.n=1/2"), "samples": Path("~/me/c"), "flow": "a/b"}
    assert _without_folders(options) == {"reward_options": ["a.head=b.pth", "a.n=1/2"], "samples": "c", "flow": "a/b"}


def test_a_checkpoint_without_its_run(tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    assert main([str(tiny_runs["lora"] / "final"), str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == sorted(
        ["README.md", "export.json", "sampling.json", "pytorch_lora_weights.safetensors"]
    )
    assert "has not been evaluated" in card(tmp_path / "out")
    assert "![" not in card(tmp_path / "out")


def test_the_card_is_of_the_state_that_is_exported(
    tiny_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed has rows beyond its checkpoint; figures of another state are none of this one."""
    run = shutil.copytree(tiny_runs["lora"], tmp_path / "run")
    head, *_, last = (run / "metrics.csv").read_text().splitlines()
    later = dict(zip(head.split(","), last.split(",")), **{STEPS: "24"})
    (run / "metrics.csv").open("a").write(",".join(later.values()) + "\n")
    result = json.loads((run / "evaluation.json").read_text())
    assert result["trained_samples"] == 16
    (run / "evaluation.json").write_text(json.dumps({**result, "trained_samples": 8}))
    drawn: list[float] = []
    monkeypatch.setattr(
        model_card, "curves", lambda rows: drawn.extend(row[STEPS] for row in rows) or pictures.curves(rows)
    )
    export(load_model(run, device="cpu"), run, tmp_path / "out")
    assert drawn == [8, 16]
    assert NOT_EVALUATED in card(tmp_path / "out")
    assert not (tmp_path / "out" / "before_after.png").exists()


def test_nothing_is_overwritten(tiny_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_runs["lora"]), str(tmp_path)]) == 2
    assert "is there already, and nothing is overwritten" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_made_meanwhile_is_not_overwritten(
    tiny_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(folder: Path, *args: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()

    monkeypatch.setattr("flowrl.export.write_card", slowly)
    with pytest.raises(ConfigError, match="is there already"):
        export(load_model(tiny_runs["lora"], device="cpu"), tiny_runs["lora"], tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_disk_that_is_full_leaves_nothing(
    tiny_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flowrl.export.write_card", full)
    assert main([str(tiny_runs["lora"]), str(tmp_path / "out")]) == 2
    assert "out': No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_flow_that_nobody_else_loads(
    tiny_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_runs["points"]), str(tmp_path / "out")]) == 2
    assert "'gaussians-linear' is no diffusers pipeline" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "out"], "There is no folder 'nowhere'"),
        (["RUN"], "Say where to write"),
        (["RUN", "out", "--dry-run"], "go with --push-to-hub"),
        (["RUN", "out", "--public"], "go with --push-to-hub"),
        (["RUN", "out", "--push-to-hub", "a/b/c"], "takes OWNER/NAME, not 'a/b/c'"),
        (["EXPORTED"], "was exported already: upload it with --push-to-hub"),
        (["EXPORTED", "out", "--push-to-hub", "me/a"], "was exported already"),
    ],
)
def test_mistakes(
    tiny_runs: dict[str, Path],
    shared: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(tiny_runs["lora"]), "EXPORTED": str(shared["lora"])}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class FakeApi:
    """Records calls; takes the files that the real one would take."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: list[str] = []
        self.exists_publicly = False
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.error is not None:
            raise self.error
        self.private = options["private"] and not self.exists_publicly
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        there = [p.relative_to(folder_path).as_posix() for p in folder_path.glob("**/*") if p.is_file()]
        self.uploaded = sorted(filter_repo_objects(there, allow_patterns=allow_patterns))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{options['repo_id']}/commit/1")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return fake


@pytest.fixture
def folder(shared: dict[str, Path], tmp_path: Path) -> Path:
    """An exported folder to spoil."""
    return Path(shutil.copytree(shared["hub"], tmp_path / "export"))


def test_upload(api: FakeApi, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--push-to-hub", "me/my-sd3"]) == 0
    assert [name for name, _ in api.calls] == ["create_repo", "upload_folder"]
    assert api.calls[0][1] == {"repo_id": "me/my-sd3", "private": True, "exist_ok": True}
    assert api.calls[1][1]["repo_id"] == "me/my-sd3"
    assert api.uploaded == files(folder)
    printed = capsys.readouterr().out
    assert "private model repository: me/my-sd3" in printed
    assert "uploaded: https://huggingface.co/me/my-sd3/commit/1" in printed
    assert "hf_test" not in printed
    assert "note:" not in printed


def test_public_and_an_owner_left_out(api: FakeApi, folder: Path) -> None:
    printed = hub.push(folder, "other", private=False)
    assert api.calls[0][1]["private"] is False
    assert api.calls[1][1]["repo_id"] == "me/other"
    assert "note: the card in README.md says to load 'me/my-sd3'; edit it to say 'other'" in printed


def test_export_and_upload_in_one(api: FakeApi, tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    assert main([str(tiny_runs["lora"]), str(tmp_path / "out"), "--push-to-hub", "me/a-lora"]) == 0
    assert api.uploaded == sorted([*CARD, "pytorch_lora_weights.safetensors"])
    assert 'pipe.load_lora_weights("me/a-lora", weight_name="pytorch_lora_weights.safetensors")' in card(
        tmp_path / "out"
    )


def test_only_what_was_exported_is_uploaded(api: FakeApi, folder: Path, tiny_runs: dict[str, Path]) -> None:
    """No optimizer states, no metrics, nothing that a link leads to, whatever lies beside the exported files."""
    expected = files(folder)
    final = tiny_runs["full"] / "final"
    for file in ("optimizer.safetensors", "state.json", "policy.safetensors"):
        shutil.copyfile(final / file, folder / file)
    shutil.copyfile(tiny_runs["points"] / "metrics.csv", folder / "metrics.csv")
    (folder / "transformer" / "linked.json").symlink_to(final / "state.json")
    (folder / "linked").symlink_to(final)
    printed = hub.push(folder, "me/my-sd3")
    assert api.uploaded == expected
    assert "left out: 6 files or links" in printed


def test_patterns_are_names(api: FakeApi, folder: Path) -> None:
    """A listed file whose name looks like a pattern takes no other with it."""
    (folder / "*.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    listed = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**listed, "files": [*listed["files"], "*.json"]}))
    hub.push(folder, "me/my-sd3")
    assert "*.json" in api.uploaded
    assert "state.json" not in api.uploaded


@pytest.mark.parametrize("how", ["link", "folder link", "outside", "absolute", "missing"])
def test_a_listed_file_that_is_not_in_the_folder(api: FakeApi, folder: Path, tmp_path: Path, how: str) -> None:
    secret = tmp_path / "secret" / "config.json"
    secret.parent.mkdir()
    secret.write_text("{}")
    name = {"outside": "../secret/config.json", "absolute": str(secret)}.get(how, "transformer/config.json")
    if how in ("link", "missing"):
        (folder / name).unlink()
    if how == "link":
        (folder / name).symlink_to(secret)
    if how == "folder link":
        shutil.rmtree(folder / "transformer")
        (folder / "transformer").symlink_to(secret.parent)
    (folder / "export.json").write_text(json.dumps({"name": "me/a", "files": [name]}))
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="which is no file of that folder"):
            hub.push(folder, "me/a", dry_run=dry_run)
    assert api.calls == []


@pytest.mark.parametrize(
    ("content", "kind"), [("{", CheckpointError), ("{}", ConfigError), ('{"files": [1]}', ConfigError)]
)
def test_a_damaged_list(folder: Path, content: str, kind: type[Exception]) -> None:
    (folder / "export.json").write_text(content)
    with pytest.raises(kind, match=r"export\.json"):
        hub.push(folder, "me/a", dry_run=True)


def test_dry_run_lists_files_and_uses_no_network(
    tiny_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*args: object, **options: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr(huggingface_hub, "HfApi", no_network)
    monkeypatch.setattr(huggingface_hub, "get_token", no_network)
    out = tmp_path / "out"
    assert main([str(tiny_runs["lora"]), str(out), "--push-to-hub", "me/a", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    listed = dict(reversed(line.split()) for line in printed.splitlines() if re.match(r" +[\d,]+  \S+$", line))
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {
        name: (out / name).stat().st_size for name in files(out)
    }
    assert "private model repository: me/a" in printed
    assert "dry run: nothing was uploaded" in printed


def refused(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} Client Error", response=response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (refused(401), "does not accept the token"),
        (refused(403), "check the owner in 'me/a' and that the token has write access"),
        (refused(500), "try again later"),
        (OfflineModeIsEnabled("offline"), "Check the network"),
        (ConnectionError("no route"), "Check the network"),
    ],
)
def test_what_the_hub_may_say(api: FakeApi, folder: Path, error: Exception, remedy: str) -> None:
    api.error = error
    with pytest.raises(HubError, match=remedy) as caught:
        hub.push(folder, "me/a")
    assert str(error) in str(caught.value)
    assert "hf_test" not in str(caught.value)
    assert [name for name, _ in api.calls] == ["create_repo"]


def test_no_token(api: FakeApi, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match=r"set HF_TOKEN, or log in with `hf auth login`"):
        hub.push(folder, "me/a")
    assert api.calls == []


def test_a_repository_that_is_public_already(api: FakeApi, folder: Path) -> None:
    api.exists_publicly = True
    with pytest.raises(HubError, match="is public on the hub: add --public"):
        hub.push(folder, "me/a")
    assert api.uploaded == []


def test_the_real_client_without_network(
    run_in, program_environment: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE is set in the subprocess's environment (conftest)."""
    monkeypatch.setitem(program_environment, "HF_TOKEN", "hf_test")
    done = run_in(folder.parent, "flowrl.export", folder, "--push-to-hub", "me/my-sd3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Uploading to 'me/my-sd3' failed: ")
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, ""),
        ({"solver": "heun"}, "sampled with heun"),
        ({"guidance": "cfg_zero"}, ""),
        ({"guidance": "cfg_zero", "guidance_scale": 2.0}, "guided by CFG-Zero*"),
        ({"guidance_scale": 0.5}, "below 1, which pipelines' calls take for none"),
    ],
)
def test_the_card_says_where_the_pipelines_own_call_draws_otherwise(
    tiny_runs: dict[str, Path], settings: dict[str, Any], told: str
) -> None:
    model = load_model(tiny_runs["lora"], device="cpu")
    model.policy.solver = settings.get("solver", "euler")
    model.policy.guidance = settings.get("guidance", "cfg")
    model.policy.guidance_scale = settings.get("guidance_scale", 1.0)
    text = _use(model, "lora", "me/my-sd3", {})
    assert told in text
    assert ("The run" in text) is bool(told)


def test_the_card_says_that_a_scheduler_takes_other_steps(tiny_runs: dict[str, Path]) -> None:
    model = load_model(tiny_runs["lora"], device="cpu")
    model.policy.model.pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    assert "other steps than the pipeline's FlowMatchHeunDiscreteScheduler" in _use(model, "lora", "me/my-sd3", {})
    model.policy.model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert "other steps than the pipeline's FlowMatchEuler" in _use(model, "lora", "me/my-sd3", {})


def test_the_cards_code_is_python_whatever_the_call_takes(tiny_runs: dict[str, Path]) -> None:
    model = load_model(tiny_runs["lora"], device="cpu")
    text = _use(model, "lora", "me/my-sd3", {"guidance_scale": 4.5, "negative_prompt": ""})
    code = text.split("```python\n")[1].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.keyword)]
    assert {call.arg: ast.unparse(call.value) for call in calls}["negative_prompt"] == "''"
