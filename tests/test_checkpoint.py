"""Checkpoints: what is saved comes back, damage is named, nothing in them can run code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
import torch
from conftest import DEVICE, REPOSITORY
from safetensors.torch import load_file, save_file
from torch import nn

import flowrl
from flowrl.distributed.ranks import Ranks
from flowrl.errors import CheckpointError, ConfigError
from flowrl.models.mlp import MLP
from flowrl.models.source import ASSETS
from flowrl.registry import ALGORITHMS
from flowrl.runs.callbacks import KeepCheckpoints
from flowrl.storage import files
from flowrl.training import loading
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.loading import checkpoint_folder, load_checkpoint
from flowrl.training.networks import TrainedNetwork

pytestmark = pytest.mark.on_device

N = 32
SETTINGS = {
    "n_samples": N,
    "batch_size": 16,
    "rollout_steps": 2,
    "ema_decay": 0.9,
    "refresh_every": 2,
    "learning_rate": 3e-3,
}
KINDS = {"full": 0, "lora": 2}


def algorithm(lora_rank: int = 0, **settings: object) -> flowrl.ORWCFMW2:
    settings = {**SETTINGS, "lora_rank": lora_rank, **settings}
    return flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings)


def weights(model: FlowAlgorithm) -> dict[str, torch.Tensor]:
    return {f"{r}.{n}": p for r in model.policy.roles for n, p in model.policy.parameters_of(r).items()}


def random_states(model: FlowAlgorithm) -> list[torch.Tensor]:
    return [model.generator.get_state(), model.policy.generator.get_state(), torch.get_rng_state()]


def assert_same_state(one: FlowAlgorithm, other: FlowAlgorithm) -> None:
    mine, yours = weights(one), weights(other)
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)
    moments = [m.policy.optimizer.state_dict()["state"] for m in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for index, entry in moments[0].items():
        assert all(torch.equal(value, moments[1][index][key]) for key, value in entry.items())
    for name in ("num_timesteps", "iteration", "_n_updates"):
        assert getattr(one, name) == getattr(other, name)
    assert one.policy.evaluations == other.policy.evaluations
    assert one.config == other.config


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest) -> flowrl.ORWCFMW2:
    return algorithm(KINDS[request.param]).learn(3 * N)


def test_round_trip(trained: flowrl.ORWCFMW2, tmp_path: Path) -> None:
    trained.policy.sample(n=3)  # moves the policy's own generator
    states = random_states(trained)
    trained.save(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(states, random_states(trained)))  # saving draws nothing
    torch.randn(5)
    loaded = flowrl.ORWCFMW2.load(tmp_path / "a", device=DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(states, random_states(loaded)))
    assert_same_state(trained, loaded)
    assert (loaded.num_timesteps, loaded.iteration) == (3 * N, 3)
    x_0 = torch.randn(4, 2)
    for role in ("current", "behaviour", "ema", "reference"):
        ours, theirs = (m.policy.sample(n=4, x_0=x_0, role=role) for m in (trained, loaded))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_three_and_three_iterations_are_six(kind: str, tmp_path: Path) -> None:
    """Bit for bit, with a copy of the sampler that is refreshed every second iteration."""
    whole = algorithm(KINDS[kind]).learn(6 * N)
    algorithm(KINDS[kind]).learn(3 * N).save(tmp_path / "half")
    resumed = flowrl.ORWCFMW2.load(tmp_path / "half", device=DEVICE).learn(3 * N, reset_num_timesteps=False)
    assert_same_state(whole, resumed)
    assert all(torch.equal(a, b) for a, b in zip(random_states(whole), random_states(resumed)))


def test_the_base_class_loads_what_is_registered(trained: flowrl.ORWCFMW2, tmp_path: Path) -> None:
    trained.save(tmp_path / "a")
    assert type(FlowAlgorithm.load(tmp_path / "a", device=DEVICE)) is flowrl.ORWCFMW2


def test_zip_suffix_is_dropped(tmp_path: Path) -> None:
    """stable-baselines3's callbacks ask for files that end in .zip."""
    model = algorithm()
    model.save(tmp_path / "model.zip")
    assert (tmp_path / "model" / "state.json").exists()
    assert not (tmp_path / "model.zip").exists()
    assert_same_state(model, flowrl.ORWCFMW2.load(tmp_path / "model.zip", device=DEVICE))


def test_only_json_and_safetensors(trained: flowrl.ORWCFMW2, tmp_path: Path) -> None:
    trained.save(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}  # and nothing temporary beside it
    for path in (tmp_path / "a").rglob("*"):
        assert path.suffix in (".json", ".safetensors")
        assert b"\x80\x04" not in path.read_bytes()[:8]  # a pickle's first bytes
        assert not path.read_bytes().startswith(b"PK")  # nor the zip archive that torch.save writes


def test_saving_again_replaces(tmp_path: Path) -> None:
    model = algorithm()
    model.save(tmp_path / "a")
    (tmp_path / "a" / "left-over.json").write_text("{}")
    model.learn(N)
    model.save(tmp_path / "a")
    assert not (tmp_path / "a" / "left-over.json").exists()
    assert flowrl.ORWCFMW2.load(tmp_path / "a", device=DEVICE).num_timesteps == N


def test_saving_deletes_nothing_else(tmp_path: Path) -> None:
    """A run folder, or any other, is not taken for an older checkpoint, nor is a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    model = algorithm()
    for name in ("run", "file"):
        with pytest.raises(CheckpointError, match=f"{name}': it is there and no checkpoint.*{name}-model"):
            model.save(tmp_path / name)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"
    assert (tmp_path / "file").read_text() == "mine"
    model.save(tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file", "empty"}


def test_only_checkpoints_are_cleaned_away(tmp_path: Path) -> None:
    (tmp_path / "1999").mkdir()
    algorithm().learn(3 * N, callback=KeepCheckpoints(tmp_path, every=1, keep=1, keep_best=False, background=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{3 * N:010d}", "1999"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = algorithm().learn(N)
    model.save(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    model.learn(N, reset_num_timesteps=False)
    calls = []

    def full_disk(tensors: dict, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*older checkpoint"):
        model.save(tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        algorithm().save(tmp_path / "file" / "a")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    algorithm().learn(N).save(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "damaged"))


def load(folder: Path) -> FlowAlgorithm:
    return flowrl.ORWCFMW2.load(folder, device=DEVICE)


FILES = ["config.json", "state.json", "policy.safetensors", "optimizer.safetensors", "random.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_file(folder: Path, file: str, share: float) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=file):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "state.json"])
def test_json_that_is_no_object(folder: Path, file: str) -> None:
    (folder / file).write_text("[1, 2]\n")
    with pytest.raises(CheckpointError, match=file):
        load(folder)


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Change a file's content in place and keep it readable."""
    content = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
    change(content)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        save_file(content, path)


def first(tensors: dict, prefix: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(prefix) and tensors[name].dim() > 0)


@pytest.mark.parametrize(
    ("file", "name"),
    [("policy.safetensors", "behaviour"), ("optimizer.safetensors", "0.exp_avg"), ("algorithm.safetensors", "unit")],
)
def test_whole_numbers_are_no_weights(folder: Path, file: str, name: str) -> None:
    """They would be cut off without a word; floats of another size are as good."""
    if file == "algorithm.safetensors":
        flowrl.Tilt("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, n_samples=16, batch_size=16).save(folder)
    cls = flowrl.Tilt if file == "algorithm.safetensors" else flowrl.ORWCFMW2
    chosen = next(key for key in load_file(folder / file) if key.startswith(name))
    rewrite(folder / file, lambda t: t.update({chosen: t[chosen].double()}))
    cls.load(folder, device=DEVICE)
    rewrite(folder / file, lambda t: t.update({chosen: t[chosen].long()}))
    with pytest.raises(CheckpointError, match=r"does not fit|holds no 'unit'"):
        cls.load(folder, device=DEVICE)


@pytest.mark.parametrize(
    "odd",
    [
        {"moments.0.exp_avg": torch.zeros(1)},
        {"moments.0.step": None},
        {"moments.9.step": torch.zeros(())},
        {"weight": torch.zeros(1, 4, dtype=torch.long)},
        {"weight": None},
        {"moments.0.step": torch.ones((), dtype=torch.long)},
    ],
)
def test_a_stored_critic_of_another_kind(odd: dict[str, torch.Tensor | None]) -> None:
    """Moments were taken whatever their shapes: a fused step read beyond small ones, or ended in a KeyError."""
    made, other = (TrainedNetwork(nn.Linear(4, 1).to(DEVICE), 1e-3, Ranks()) for _ in range(2))
    made.improve(made(torch.ones(2, 4)).sum())
    other.load(made.state())
    assert torch.equal(other.state()["moments.0.exp_avg"], made.state()["moments.0.exp_avg"])
    stored = {name: tensor for name, tensor in {**made.state(), **odd}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match="does not fit"):
        other.load(stored)


@pytest.mark.parametrize("role", ["current", "ema", "behaviour"])
def test_wrong_shape_names_file_and_weight(folder: Path, role: str) -> None:
    rewrite(folder / "policy.safetensors", lambda t: t.update({first(t, role): torch.zeros(3, 3)}))
    with pytest.raises(CheckpointError, match=r"policy\.safetensors.*shape \(3, 3\)"):
        load(folder)


@pytest.mark.parametrize(
    "change", [lambda t: t.pop(first(t, "ema")), lambda t: t.update({"current.odd": torch.ones(1)})]
)
def test_other_weights(folder: Path, change: Callable) -> None:
    rewrite(folder / "policy.safetensors", change)
    with pytest.raises(CheckpointError, match=r"policy\.safetensors"):
        load(folder)


@pytest.mark.parametrize("change", [lambda t: t.pop("0.exp_avg"), lambda t: t.update({"0.exp_avg": torch.ones(3, 3)})])
def test_optimizer_that_does_not_fit(folder: Path, change: Callable) -> None:
    rewrite(folder / "optimizer.safetensors", change)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("state.json", lambda s: s.pop("iteration")),
        ("state.json", lambda s: s.update(num_timesteps="many")),
        ("state.json", lambda s: s.update(param_groups=None)),
        ("random.safetensors", lambda t: t.pop("training")),
        ("random.safetensors", lambda t: t.update(training=torch.zeros(3))),
    ],
)
def test_state_that_lacks_something(folder: Path, file: str, change: Callable) -> None:
    rewrite(folder / file, change)
    with pytest.raises(CheckpointError, match=str(folder)):
        load(folder)


def test_settings_of_another_version(folder: Path) -> None:
    def with_old_names(config: dict) -> None:
        config["flowrl"] = "0.0.9"
        config["settings"]["alfa"] = config["settings"].pop("alpha")

    rewrite(folder / "config.json", with_old_names)
    with pytest.raises(CheckpointError, match=r"0\.0\.9.* no settings alfa of ORWCFMW2.*Did you mean 'alpha'"):
        flowrl.ORWCFMW2.load(folder)


def test_settings_that_are_new_since(folder: Path) -> None:
    rewrite(folder / "config.json", lambda config: config["settings"].pop("max_dropped"))
    with pytest.warns(UserWarning, match="before ORWCFMW2 had max_dropped: the defaults"):
        assert flowrl.ORWCFMW2.load(folder).config.max_dropped == 0.1


def test_settings_to_train_on_with_are_taken(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no .*\. Settings given in place of its own: time_weighting\.$"):
        flowrl.ORWCFMW2.load(folder, device=DEVICE, time_weighting="variance", verbose=0)
    model = flowrl.ORWCFMW2.load(folder, device=DEVICE, weight_decay=0.25, learning_rate=0.125)
    model.learn(N, reset_num_timesteps=False)
    group = model.policy.optimizer.param_groups[0]
    assert (group["weight_decay"], group["lr"]) == (0.25, 0.125)
    with pytest.raises(ConfigError, match=r"seed of '.*' are its own. Give single settings"):
        flowrl.ORWCFMW2.load(folder, device=DEVICE, seed=1)


@pytest.mark.parametrize("name", ["tilt", "ddpo"])
def test_what_is_kept_of_rewards_begins_anew_in_another_environment(name: str, tmp_path: Path) -> None:
    own = {"n_samples": 32, "batch_size": 32, "rollout_steps": 3, "n_epochs": 1}
    own |= {"pool": 32} if name == "tilt" else {}
    model = ALGORITHMS[name]("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **own)
    model.learn(32)
    model.save(tmp_path)
    kept = model.extra_state.state()
    for given in (None, "gaussians-linear", flowrl.make("gaussians-linear")):
        again = type(model).load(tmp_path, env=given, device=DEVICE)
        assert all(torch.equal(tensor, kept[key]) for key, tensor in again.extra_state.state().items())
    other = type(model).load(tmp_path, env="gaussians-quadratic", device=DEVICE)
    other.learn(32, reset_num_timesteps=False)
    reward = other.buffer.all().reward
    if name == "ddpo":
        torch.testing.assert_close(other.mean, reward.mean()[None])
        return
    samples = other.policy.decode(other.pool.x_1[0].float())
    ids = torch.zeros(len(samples), dtype=torch.long, device=DEVICE)
    torch.testing.assert_close(other.pool.reward[0], other.env.core.evaluate(samples, ids).reward)


FORMULAS = [
    ("crd", {}, "sums over dimensions"),
    ("flow_grpo", {"target_lambda": 1.0}, "target_lambda goes by the slope"),
    ("ram", {"target_lambda": 1.0, "centred": False, "spread": "none"}, "target_lambda goes by the slope"),
    ("tilt", {"pool": 16}, "a critic learns .* by their shares of the mixture"),
]


@pytest.mark.parametrize(("name", "settings", "text"), FORMULAS)
def test_formulas_that_have_changed_since(name: str, settings: dict, text: str, tmp_path: Path) -> None:
    cls = ALGORITHMS[name]
    settings = {"n_samples": 16, "batch_size": 16, "rollout_steps": 2, "target_lambda": 0.0, **settings}
    folder = tmp_path / "a"
    cls("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings).save(folder)
    cls.load(folder)  # without a warning
    rewrite(folder / "config.json", lambda config: config.pop("formulas"))
    with pytest.warns(UserWarning, match=f"before a change of {name}: .*{text}.* start anew"):
        cls.load(folder)
    load_checkpoint(cls, folder, to_train=False)  # to sample and evaluate nothing has changed
    usual = {"ram": {"centred": True}, "tilt": {"control_variate": "one"}}.get(name, {"target_lambda": 0.0})
    rewrite(folder / "config.json", lambda config: config["settings"].update(usual))
    with pytest.warns(UserWarning, match=text) if name == "crd" else nullcontext():
        cls.load(folder)


def test_settings_that_mean_nothing_here_are_found_in_the_file(folder: Path) -> None:
    rewrite(folder / "config.json", lambda config: config["settings"].update(attention_backend="native"))
    with pytest.raises(ConfigError, match=r"leave it out\. The settings .* '.*/config\.json'"):
        flowrl.ORWCFMW2.load(folder)


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"solver": "eulr"}, {"not_a_setting": 1}, None])
def test_settings_that_do_not_fit(folder: Path, settings: dict | None) -> None:
    rewrite(folder / "config.json", lambda c: c.update(settings=settings and {**c["settings"], **settings}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_another_format(folder: Path) -> None:
    rewrite(folder / "config.json", lambda c: c.update(format=999))
    with pytest.raises(CheckpointError, match="999"):
        load(folder)


def test_another_algorithm(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="'orw_w2', not with 'orw'"):
        flowrl.ORWCFM.load(folder, device=DEVICE)


def test_code_named_by_a_checkpoint_is_not_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text("import flowrl\nclass Algo(flowrl.ORWCFMW2): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(folder / "config.json", lambda c: c.update(algorithm="hostile_module:Algo"))
    for cls in (FlowAlgorithm, flowrl.ORWCFMW2):
        with pytest.raises(CheckpointError, match="hostile_module:Algo"):
            cls.load(folder, device=DEVICE)
    assert "hostile_module" not in sys.modules


def test_environments_named_by_a_checkpoint_are_not_imported_either(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile_environment.py").write_text("")
    rewrite(folder / "config.json", lambda c: c["environment"].update(name="hostile_environment:gaussians-linear"))
    with pytest.raises(CheckpointError, match="hostile_environment"):
        FlowAlgorithm.load(folder, device=DEVICE)
    assert "hostile_environment" not in sys.modules


def run_folder(sound: Path, tmp_path: Path) -> Path:
    for n, name in ((64, "checkpoints/0000000064"), (128, "checkpoints/0000000128"), (96, "final")):
        shutil.copytree(sound, tmp_path / "run" / name)
        rewrite(tmp_path / "run" / name / "state.json", lambda s, n=n: s.update(num_timesteps=n))
    return tmp_path / "run"


def test_a_run_folder_means_its_newest_checkpoint(sound: Path, tmp_path: Path) -> None:
    run = run_folder(sound, tmp_path)
    assert checkpoint_folder(run) == run / "checkpoints" / "0000000128"
    assert load(run).num_timesteps == 128
    assert checkpoint_folder(run / "final") == run / "final"


def test_where_training_deletes_a_checkpoint_that_is_read_the_newest_one_is(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen, read = run_folder(sound, tmp_path), [], files.read_json
    newest, newer = run / "checkpoints" / "0000000128", run / "checkpoints" / "0000000192"

    def train_on(path: Path) -> dict:
        if path == newest / "state.json" and seen.count(path):  # chosen, and now loaded
            shutil.copytree(newest, newer)
            rewrite(newer / "state.json", lambda s: s.update(num_timesteps=192))
            shutil.rmtree(newest)
        elif path == run / "checkpoints" / "0000000064" / "state.json":
            shutil.rmtree(path.parent)  # while the newest is looked for
        seen.append(path)
        return read(path)

    monkeypatch.setattr(loading, "read_json", train_on)
    assert load(run).num_timesteps == 192
    with pytest.raises(CheckpointError, match="damaged"):
        loading.of_newest(run, lambda folder: files.read_tensors(folder / "config.json"))


@pytest.mark.parametrize("odd", ["many", None, True, [1]])
def test_a_checkpoint_that_does_not_say_how_long_it_was_trained_is_not_the_newest(
    sound: Path, tmp_path: Path, odd: Any
) -> None:
    run = run_folder(sound, tmp_path)
    rewrite(run / "checkpoints" / "0000000064" / "state.json", lambda s: s.update(num_timesteps=odd))
    assert checkpoint_folder(run).name == "0000000128"


def test_a_checkpoint_that_was_never_finished_is_passed_over(sound: Path, tmp_path: Path) -> None:
    """What a kill in the middle of writing leaves behind."""
    run = run_folder(sound, tmp_path)
    shutil.copytree(run / "checkpoints" / "0000000128", run / "checkpoints" / ".0000000192-tmp")
    (run / "checkpoints" / ".0000000192-tmp" / "state.json").write_text('{"num_time')
    assert checkpoint_folder(run) == run / "checkpoints" / "0000000128"


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_no_checkpoint_there(tmp_path: Path, make: Callable) -> None:
    make(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="nothing"):
        load(tmp_path / "nothing")


def test_environment_objects_are_given_again(tmp_path: Path) -> None:
    from flowrl.envs.gaussians import GaussiansEnv, LinearReward, eight_gaussians

    env = GaussiansEnv(eight_gaussians(), LinearReward((1.0, 0.0)))
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=DEVICE, **SETTINGS).learn(N)
    model.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="env="):
        load(tmp_path / "a")
    assert_same_state(model, flowrl.ORWCFMW2.load(tmp_path / "a", env=env, device=DEVICE))


@pytest.mark.parametrize("kind", ["gaussians-linear", "sd3-compress"])
def test_a_flow_whose_folder_was_written_anew_is_noticed(kind: str, tmp_path: Path) -> None:
    """Reference, autoencoder and encoders are read again from there; files that come to it do not matter."""
    place = tmp_path / "flow"
    if kind == "gaussians-linear":
        shutil.copytree(ASSETS / "gaussians", place)
    else:
        small_pipelines.sd3(place)
    settings = {"flow": str(place)} | ({"resolution": 16, "sequence_length": 16} if kind == "sd3-compress" else {})
    small = {"n_samples": 8, "batch_size": 8, "group_size": 4, "rollout_steps": 2, "lora_rank": 2}
    flowrl.ORWCFMW2("FlowPolicy", kind, seed=0, device="cpu", env_settings=settings, **small).save(tmp_path / "saved")
    (place / "more").mkdir()
    save_file({"a": torch.ones(2)}, place / "more" / "a.safetensors")
    flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu").save(place / "runs" / "a")
    assert "more/a.safetensors" in files.weight_hashes(place)
    assert not any(name.startswith("runs") for name in files.weight_hashes(place))
    weights = next(path for path in sorted(place.rglob("*.safetensors")) if path.parent.name in ("flow", "vae"))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    name = weights.relative_to(place).as_posix()
    with pytest.raises(CheckpointError, match=rf"trained from other weights than '.*flow' holds now: {name} is not"):
        flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")
    other = flowrl.make(kind, **settings)
    assert flowrl.ORWCFMW2.load(tmp_path / "saved", env=other, device="cpu").env.core is other


@pytest.mark.parametrize("size", [10, files.PIECE + 1, files.PIECES * files.PIECE, 3 * files.PIECES * files.PIECE + 7])
def test_hashes_of_weights_see_both_ends_and_all_of_a_small_file(size: int, tmp_path: Path) -> None:
    path, content = tmp_path / "a.safetensors", bytearray(size)
    changed = [0, size - 1] if size > files.PIECES * files.PIECE else [0, size // 2, size - 2, size - 1]
    seen = set()
    for place in (None, *changed):
        path.write_bytes(content if place is None else bytes(i == place for i in range(size)))
        seen |= set(files.weight_hashes(tmp_path).values())
    path.write_bytes(bytes(size + 1))
    assert len(seen | set(files.weight_hashes(tmp_path).values())) == len(changed) + 2


def test_environment_settings_come_back(tmp_path: Path) -> None:
    settings = {"flow": "mini-sd3", "prompts": ("stars", "two red circles")}
    sizes = {"n_samples": 2, "group_size": 1, "batch_size": 2, "rollout_steps": 1, "ema_decay": 0.0}
    model = flowrl.ORWCFMW2("FlowPolicy", "sd3-compress", env_settings=settings, seed=0, device=DEVICE, **sizes)
    model.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert loaded.env.core.contexts == list(settings["prompts"])
    assert loaded.env.core.flow.source == "mini-sd3"


class Random2D(MLP):
    """A flow whose base weights differ every time it is made."""

    sample_shape = (2,)

    def __init__(self) -> None:
        super().__init__(2, 8, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=GENERATOR)


class WithBuffer(nn.Module):
    """A flow with a buffer that training changes."""

    sample_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.network = MLP(2, 8, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(self.norm(x), t)


GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("flow", "changed"),
    [
        (Random2D, {}),
        (Random2D, {"lora_rank": 2}),
        (Random2D, {"trained_parameters": ("output",), "ema_decay": 0.5}),
        (WithBuffer, {}),
    ],
    ids=["full", "lora", "some", "buffers"],
)
def test_the_weights_of_a_factory_come_back(flow: Callable, changed: dict[str, Any], tmp_path: Path) -> None:
    from flowrl.envs.gaussians import GaussiansEnv, LinearReward, eight_gaussians

    env = GaussiansEnv(eight_gaussians(), LinearReward((1.0, 0.0)), flow)
    settings = {**SETTINGS, "ema_decay": 0.0, **changed}
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=DEVICE, **settings).learn(N)
    model.save(tmp_path / "a")
    loaded = flowrl.ORWCFMW2.load(tmp_path / "a", env=env, device=DEVICE)
    x_0 = torch.randn(4, 2)
    for role in model.policy.networks.available:
        for m in (model, loaded):
            m.policy.set_training_mode(False)
        ours, theirs = (m.policy.sample(n=4, x_0=x_0, role=role) for m in (model, loaded))
        torch.testing.assert_close(ours, theirs)


def test_rewards_that_draw_from_numpy_resume_exactly(tmp_path: Path) -> None:
    import numpy as np

    from flowrl.envs.gaussians import GaussiansEnv, eight_gaussians

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] + torch.from_numpy(np.random.normal(size=len(x))).to(x)

    env = GaussiansEnv(eight_gaussians(), noisy, "gaussians")
    make = lambda: flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=DEVICE, **SETTINGS)  # noqa: E731
    whole = make().learn(4 * N)
    make().learn(2 * N).save(tmp_path / "half")
    resumed = flowrl.ORWCFMW2.load(tmp_path / "half", env=env, device=DEVICE).learn(2 * N, reset_num_timesteps=False)
    assert_same_state(whole, resumed)


def test_a_checkpoint_of_before_algorithms_registered_their_networks_goes_on_as_it_would_have() -> None:
    """tests/data/dpok-before-rows: DPOK with its critic after two iterations, by the version that first wrote any."""
    model = flowrl.DPOK.load(REPOSITORY / "tests" / "data" / "dpok-before-rows", device="cpu")  # whose numbers it holds
    assert model.iteration == 2
    model.learn(8, reset_num_timesteps=False)
    assert model.last_logged["train/critic_error"] == pytest.approx(0.99999845, rel=1e-5)
    weights = {name: p.double().sum().item() for name, p in model.policy.parameters_of("current").items()}
    assert weights["output.lora_B.weight"] == pytest.approx(0.004092354, rel=1e-3)
    assert weights["hidden.2.lora_B.weight"] == pytest.approx(-0.036768445, rel=1e-3)


class Doubled(flowrl.FlowPolicy):
    """A policy of one's own, whose noise is twice as large."""

    def noise(self, n, generator=None):
        return 2 * super().noise(n, generator)


def test_a_policy_of_ones_own_is_not_replaced(tmp_path):
    """The checkpoint of one went on with another's samples, without a word."""
    settings = {"n_samples": 32, "batch_size": 32, "rollout_steps": 2}
    model = flowrl.ORWCFM(Doubled, "gaussians-linear", seed=0, device=DEVICE, **settings).learn(32)
    model.save(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"trained with the policy '.*:Doubled': give that class as policy="):
        flowrl.ORWCFM.load(tmp_path / "own", device=DEVICE)
    again = flowrl.ORWCFM.load(tmp_path / "own", device=DEVICE, policy=Doubled)
    assert torch.equal(again.policy.sample(n=4), model.policy.sample(n=4))
