"""Pipelines as people save them: other schedulers, variants, a LoRA still attached, missing weights, broken imports."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import small_pipelines
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_pipelines import PROMPTS

import flowrl
from flowrl.envs.rewards import make_reward
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.export import main as export
from flowrl.models.imports import first_failure, importing
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineFlow, PipelineOptions
from flowrl.models.schedules import times_of

KINDS = {"sd3": small_pipelines.sd3, "flux": small_pipelines.flux}
OF_FLOWS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.fixture(scope="session", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("saved") / request.param)


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipelines.sd3(tmp_path_factory.mktemp("saved") / "sd3")


def load(folder: Path) -> PipelineFlow:
    model = source_of(str(folder), pipeline=PipelineOptions(resolution=16)).load()
    assert isinstance(model, PipelineFlow)
    model.pipeline.set_progress_bar_config(disable=True)
    return model


def saved_again(folder: Path, to: Path, scheduler: Any) -> Path:
    """The same pipeline with another scheduler, as its user saves it."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "scheduler")
    scheduler.save_pretrained(to / "scheduler")
    index = json.loads((to / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (to / "model_index.json").write_text(json.dumps(index))
    return to


def velocity(flow: PipelineFlow, t: float = 0.4) -> torch.Tensor:
    x = torch.randn(2, *flow.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return flow(x, torch.full((2,), t), flow.encode(PROMPTS[:2]))


# schedulers


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler(**OF_FLOWS),
        diffusers.UniPCMultistepScheduler(**OF_FLOWS),
        diffusers.DEISMultistepScheduler(**OF_FLOWS),  # ends above 0 and repeats the last level
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),  # repeats every level but the first
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_other_solvers(folder: Path, tmp_path: Path, scheduler: Any) -> None:
    flow = load(saved_again(folder, tmp_path / "other", scheduler))
    times = flow.times(6)
    assert times.shape == (7,)
    assert (times[0].item(), times[-1].item()) == (0, 1)
    assert bool((times[1:] > times[:-1]).all())
    scheduler.set_timesteps(6)
    own = [1 - level for level in dict.fromkeys(scheduler.sigmas.tolist()) if level > 0]
    assert times[1:6].tolist() == pytest.approx(own[1:], abs=1e-6)
    plain = load(folder)
    assert torch.equal(velocity(flow), velocity(plain))


def test_the_steps_of_a_heun_pipeline_sample_as_its_levels_say(sd3: Path, tmp_path: Path) -> None:
    """Level by level by hand: x += (sigma_i - sigma_i+1) v, with v = -network."""
    from flowrl.functional.solvers import ode_sample

    flow = load(saved_again(sd3, tmp_path / "heun", diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)))
    cond = flow.encode(PROMPTS[:1])
    x = x_0 = torch.randn(1, *flow.latent_shape)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    levels = [*dict.fromkeys(scheduler.sigmas.tolist())]
    assert len(levels) == 5
    with torch.no_grad():
        for high, low in itertools.pairwise(levels):
            x = x + (high - low) * flow(x, torch.tensor([1 - high]), cond)
        ours = ode_sample(lambda x, t: flow(x, t, cond), x_0, flow.times(4), "euler")
    assert (ours - x).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "says invert_sigmas: its time runs from data"),
        (diffusers.DPMSolverMultistepScheduler(), r"prediction_type 'epsilon' .*samples no flow"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas False.*no flow"),
        (diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler.*samples no flow"),
    ],
)
def test_schedulers_that_sample_no_flow(sd3: Path, tmp_path: Path, scheduler: Any, message: str) -> None:
    """Known before any weight is read."""
    other = saved_again(sd3, tmp_path / "other", scheduler)
    with pytest.raises(ModelLoadError, match=rf"{message}.*Save it with FlowMatchEulerDiscreteScheduler"):
        source_of(str(other))


def test_a_shift_by_resolution_that_a_scheduler_does_not_know(sd3: Path) -> None:
    flow = load(sd3)
    flow.pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    flow.pipeline.scheduler.register_to_config(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="FlowMatchHeunDiscreteScheduler cannot be shifted by the resolution"):
        flow.times(4)


def test_training_timesteps_other_than_1000(folder: Path, tmp_path: Path) -> None:
    """The network is given what the pipeline's own call gives it."""
    other = saved_again(
        folder, tmp_path / "other", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500)
    )
    flow = load(other)
    seen: list[float] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(float(kwargs["timestep"].flatten()[0]))

    handle = flow.network.register_forward_pre_hook(note, with_kwargs=True)
    flow.pipeline(PROMPTS[0], num_inference_steps=3, height=16, width=16, output_type="latent", guidance_scale=1.0)
    theirs, levels = seen[:3], 1 - flow.times(3)[:3]
    seen.clear()
    for level in levels.tolist():
        velocity(flow, 1 - level)
    handle.remove()
    assert seen == pytest.approx(theirs, rel=1e-5)
    assert not torch.allclose(velocity(flow), velocity(load(folder)))


@pytest.mark.parametrize("steps", [0, "1000", 10**9])
def test_training_timesteps_without_meaning(sd3: Path, tmp_path: Path, steps: object) -> None:
    shutil.copytree(sd3, tmp_path / "other")
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": steps}))
    with pytest.raises(ModelLoadError, match="says num_train_timesteps = "):
        source_of(str(tmp_path / "other"))


# weights


def pipeline_of(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    return getattr(diffusers, index["_class_name"]).from_pretrained(folder)


def test_a_variant_alone_is_loaded(folder: Path, tmp_path: Path) -> None:
    pipeline_of(folder).to(dtype=torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    assert not list((tmp_path / "fp16").rglob("model.safetensors"))
    flow, plain = load(tmp_path / "fp16"), load(folder)
    assert flow.network.dtype == flow.pipeline.text_encoder.dtype == torch.float32
    assert 0 < (velocity(flow) - velocity(plain)).abs().max() < 0.05
    flow.release_encoders()
    assert flow.encode(PROMPTS)[0].isfinite().all()


def test_plain_weights_beside_a_variant_are_taken(sd3: Path, tmp_path: Path) -> None:
    """Of one part there is the variant alone: it is taken for that part, the plain ones for the others."""
    shutil.copytree(sd3, tmp_path / "both")
    pipeline_of(sd3).to(dtype=torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    name = "diffusion_pytorch_model{}.safetensors"
    for part in ("transformer", "vae"):
        shutil.copy(tmp_path / "fp16" / part / name.format(".fp16"), tmp_path / "both" / part)
    (tmp_path / "both" / "vae" / name.format("")).unlink()
    flow, plain = load(tmp_path / "both"), load(sd3)
    assert torch.equal(velocity(flow), velocity(plain))
    x = torch.randn(1, *flow.latent_shape)
    assert 0 < (flow.decode(x) - plain.decode(x)).abs().max() < 0.01


def test_several_variants_without_plain_weights(sd3: Path, tmp_path: Path) -> None:
    shutil.copytree(sd3, tmp_path / "mixed")
    file = tmp_path / "mixed" / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ModelLoadError, match=r"'vae' .* no plain weights, but the variants bf16 and fp16: keep one"):
        load(tmp_path / "mixed")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_lora_still_attached(sd3: Path, tmp_path: Path, part: str) -> None:
    pipeline = pipeline_of(sd3)
    targets = ["to_q"] if part == "transformer" else ["q_proj"]
    getattr(pipeline, part).add_adapter(LoraConfig(r=2, target_modules=targets))
    pipeline.save_pretrained(tmp_path / "attached")
    with pytest.raises(ModelLoadError, match=rf"'{part}'.*A LoRA was still attached.*fuse_lora.*unload.*again"):
        load(tmp_path / "attached")


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_3", "model"),
    ],
)
def test_missing_weights_are_never_made_up(sd3: Path, tmp_path: Path, part: str, file: str) -> None:
    """diffusers leaves them without values, transformers draws them at random."""
    shutil.copytree(sd3, tmp_path / "cut")
    path = tmp_path / "cut" / part / f"{file}.safetensors"
    state = load_file(path)
    gone = sorted(key for key in state if "shared" not in key)[-1]  # that one goes by two names
    del state[gone]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"'{part}' .* lacks 1 weights, the first '{gone}'"):
        load(tmp_path / "cut")


def test_an_autoencoder_without_a_shift(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "old")
    file = tmp_path / "old" / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"shift_factor": None}))
    flow, shifted = load(tmp_path / "old"), load(folder)
    x = torch.randn(2, *flow.latent_shape)
    expected = shifted.decode(x - config["shift_factor"] * config["scaling_factor"])
    assert (flow.decode(x) - expected).abs().max() < 1e-5
    assert (flow.decode(x) - shifted.decode(x)).abs().max() > 1e-3


# imports


def test_one_step_of_a_schedule_that_scales_the_last_of_several() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    with pytest.raises(
        ConfigError, match=r"no noise levels for one step, .* \(shift_terminal\): take two steps or more"
    ):
        times_of(scheduler, 1)
    torch.testing.assert_close(times_of(scheduler, 2), torch.tensor([0.0, 0.98, 1.0]))


def test_an_import_that_fails_is_not_the_folders_fault(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'CLIPImageProcessor'. Are this object's...") from error

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", broken)
    with pytest.raises(ModelLoadError, match=r"failed first was RuntimeError: operator torchvision::nms.*not at fault"):
        load(sd3)


def test_an_import_that_fails_in_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("Could not import module 'CLIPModel'") from OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", broken)
    with pytest.raises(ModelLoadError, match="failed first was OSError: undefined symbol: _ZN3c10"):
        make_reward("clip", {"model": "anything"})
    with pytest.raises(ModelLoadError, match="failed first was OSError"), importing():
        broken()
    with pytest.raises(ZeroDivisionError), importing():
        _ = 1 / 0


def test_which_errors_are_of_imports() -> None:
    assert first_failure(OSError("no file named model.safetensors")) is None
    assert "ModuleNotFoundError: No module named 'x'" in (
        first_failure(ModuleNotFoundError("No module named 'x'")) or ""
    )
    wrapped = RuntimeError("Failed to import diffusers.pipelines.x because of the following error:\nsymbol not found")
    wrapped.__cause__ = OSError("symbol not found\nand more")
    assert "OSError: symbol not found. The files" in (first_failure(wrapped) or "")


# resolutions


@pytest.mark.parametrize(("flow", "most"), [("mini-sd3", "at most 128 pixels"), ("emoji", "no other resolution")])
def test_a_resolution_that_the_flow_cannot_draw(flow: str, most: str) -> None:
    """An error where the environment is made: before anything is drawn, and in a dry run."""
    for resolution in (256, 1024):
        with pytest.raises(ConfigError, match=most):
            flowrl.make("sd3-compress", flow=flow, resolution=resolution)
    flowrl.make("sd3-compress", flow=flow, resolution=32)


def test_the_largest_resolution_can_be_drawn() -> None:
    flow = flowrl.make("sd3-compress", flow="mini-sd3", resolution=128).flow.load()
    assert flow.sample_shape == (3, 128, 128)
    assert velocity(flow).shape == (2, *flow.latent_shape)


def test_a_dry_run_says_so(run_here, tmp_path: Path) -> None:
    done = run_here(
        "flowrl.run",
        "--algo",
        "orw",
        "--env",
        "sd3-compress",
        "--env.flow",
        "mini-sd3",
        "--env.resolution",
        1024,
        "--dry-run",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: resolution must be at most 128 pixels for this pipeline")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["final", "exported"])
def test_an_adapter_is_no_flow_and_says_how_to_start_from_it(
    place: str, tiny_runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny_runs["lora"] / "final"
    if place == "exported":
        folder = tmp_path / "shared"
        assert export([str(tiny_runs["lora"]), str(folder), "--device", "cpu"]) == 0
    with pytest.raises(ModelLoadError, match=r"an adapter \(LoRA\), .* by --algo.init-lora "):
        source_of(str(folder))
    small = {"init_lora": str(folder), "n_samples": 4, "batch_size": 4, "group_size": 2, "rollout_steps": 1}
    env = flowrl.make("sd3-compress", flow="mini-sd3")
    flowrl.ORWCFM("FlowPolicy", env, seed=0, device="cpu", **small)
