"""The Stable Diffusion 3 adapter against diffusers' own pipeline, and what goes wrong when loading."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import flowrl
from flowrl.errors import ModelLoadError
from flowrl.functional.solvers import ode_sample
from flowrl.models.families.sd3 import SD3Flow
from flowrl.models.loading import ASSETS, source_of
from flowrl.models.pipeline import Shapes
from flowrl.training.policy import FlowPolicy

MINI = ASSETS / "mini-sd3"
PROMPTS = ["three red stars on blue", "white circles", "two green squares on black"]


@pytest.fixture(scope="module")
def flow() -> SD3Flow:
    model = source_of("mini-sd3").load()
    model.pipeline.set_progress_bar_config(disable=True)
    return model


@pytest.fixture(scope="module")
def policy() -> FlowPolicy:
    env = flowrl.make("sd3-compress", flow="mini-sd3", prompts=tuple(PROMPTS))
    model = env.flow.load()
    model.pipeline.set_progress_bar_config(disable=True)
    return FlowPolicy(env.observation_space, env.action_space, model=model, contexts=PROMPTS, seed=0)


def call_pipeline(flow: SD3Flow, x_0: torch.Tensor, steps: int, scale: float, output: str) -> torch.Tensor:
    return flow.pipeline(
        PROMPTS,
        latents=x_0,
        num_inference_steps=steps,
        guidance_scale=scale,
        max_sequence_length=flow.max_sequence_length,
        output_type=output,
    ).images


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_euler_gives_the_pipelines_latents(
    policy: FlowPolicy, flow: SD3Flow, scale: float, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (flow, policy.model):
        monkeypatch.setattr(model.pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=shift))
    x_0 = policy.noise(3)
    expected = call_pipeline(flow, x_0, 8, scale, "latent")
    ours = policy.sample_latents(torch.arange(3), x_0=x_0, steps=8, solver="euler", guidance_scale=scale)
    assert flow.times(8)[[0, -1]].tolist() == pytest.approx([0, 1])
    assert expected.dtype == torch.float32
    assert (ours - expected).abs().max() <= 1e-4
    assert (expected - x_0).abs().max() > 0.5


def test_a_scale_that_leads_away_from_the_prompts_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own call takes 0 for none; here prompts do nothing at 0."""
    flow, cond = source_of("mini-sd3").load(), (torch.zeros(1, 2),)
    with pytest.warns(
        UserWarning, match=r"guidance_scale=0 leads away from the prompts.*: without guidance it is 1"
    ) as told:
        assert [flow.with_guidance(cond, scale) for scale in (1.0, 4.5, 0.0, 0.0)] == [cond] * 4
    assert len(told) == 1
    monkeypatch.setattr(SD3Flow, "UNGUIDED", 0.0)  # as of Z-Image, whose scale counts from 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source_of("mini-sd3").load().with_guidance(cond, 0.0)


@torch.no_grad()
def test_shipped_schedule_is_the_one_that_is_used(flow: SD3Flow) -> None:
    x_0 = torch.randn(3, *flow.latent_shape)
    expected = call_pipeline(flow, x_0, 4, 1.0, "latent")
    cond = flow.encode(PROMPTS)
    ours = ode_sample(lambda x, t: flow(x, t, cond), x_0, flow.times(4))
    assert (ours - expected).abs().max() <= 1e-4


def test_decode_is_the_pipelines_own(flow: SD3Flow) -> None:
    x_0 = torch.randn(3, *flow.latent_shape)
    images = call_pipeline(flow, x_0, 4, 1.0, "pt")
    latents = call_pipeline(flow, x_0, 4, 1.0, "latent")
    ours = flow.decode(latents)
    assert ours.shape == (3, *flow.sample_shape)
    assert (ours - images).abs().max() <= 1e-5
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_decoding_in_parts_changes_nothing(flow: SD3Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(5, *flow.latent_shape)
    whole = flow.decode(latents)
    monkeypatch.setattr(flow, "decode_batch", 2)
    torch.testing.assert_close(flow.decode(latents), whole, rtol=0, atol=1e-5)


def test_encoding_many_prompts_equals_encoding_one(flow: SD3Flow) -> None:
    many = flow.encode([PROMPTS[i % 3] for i in range(70)])  # more than one chunk
    for k in (0, 64, 69):
        for part, alone in zip(many, flow.encode([PROMPTS[k % 3]])):
            torch.testing.assert_close(part[k : k + 1], alone, rtol=1e-4, atol=1e-4)


def test_time_and_sign(flow: SD3Flow) -> None:
    """velocity = -(noise - data), at timestep 1000 (1 - t)."""
    x, t, cond = torch.randn(2, *flow.latent_shape), torch.tensor([0.25, 0.9]), flow.encode(PROMPTS[:2])
    with torch.no_grad():
        raw = flow.pipeline.transformer(
            hidden_states=x,
            timestep=torch.tensor([750.0, 100.0]),
            encoder_hidden_states=cond[0],
            pooled_projections=cond[1],
        ).sample
        torch.testing.assert_close(flow(x, t, cond), -raw)


def test_prompts_must_be_text(flow: SD3Flow) -> None:
    with pytest.raises(ValueError, match="not None"):
        flow.encode([None])


def test_skeleton_counts_the_same_parameters(flow: SD3Flow) -> None:
    source = source_of(str(MINI))
    assert source.sample_shape == flow.sample_shape
    skeleton = source.skeleton()
    assert skeleton.latent_shape == flow.latent_shape
    count = sum(p.numel() for p in skeleton.network.parameters())
    assert count == sum(p.numel() for p in flow.network.parameters())
    assert all(p.is_meta for p in skeleton.network.parameters())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI, tmp_path / "my-pipeline"))


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
def test_missing_configuration_names_the_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ModelLoadError) as caught:
        source_of(str(folder))
    assert "my-pipeline" in str(caught.value)
    if file != "model_index.json":  # without it the folder could be any flow; config.json is asked for
        assert Path(file).name in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_missing_part_names_the_folder(folder: Path, part: str) -> None:
    weights = [*(folder / part).glob("*.safetensors")]
    for file in weights or [*(folder / part).iterdir()]:
        file.unlink()
    with pytest.raises(ModelLoadError, match="my-pipeline"):
        source_of(str(folder)).load()


def test_truncated_weights(folder: Path) -> None:
    file = next((folder / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelLoadError, match="my-pipeline"):
        source_of(str(folder)).load()


def test_broken_json_names_the_file(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": ')
    with pytest.raises(ModelLoadError, match=r"model_index\.json"):
        source_of(str(folder))


def test_a_folder_that_is_no_flow(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        source_of(str(tmp_path))


def test_an_unknown_name() -> None:
    with pytest.raises(ModelLoadError, match="Did you mean 'mini-sd3'"):
        source_of("mini-sd")


def test_a_hub_name_without_network(run_module) -> None:
    """HF_HUB_OFFLINE is set in the subprocess's environment (conftest)."""
    done = run_module(
        "flowrl.run", "--algo", "orw_w2", "--env", "sd3-compress", "--env.flow", "nobody/no-such-model", "--dry-run"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for expected in ("nobody/no-such-model", "network", "--env.flow FOLDER", "--env.flow mini-sd3"):
        assert expected in done.stderr


@pytest.mark.parametrize("alpha", [4.0, 0.0, 6.0])  # rank 4; 0 is the default, twice the rank
def test_exported_lora_gives_diffusers_the_same_velocity(tmp_path: Path, alpha: float) -> None:
    """`pipe.load_lora_weights(folder)` on the checkpoint folder as it is, whatever the adapters' scale."""
    settings = {"n_samples": 4, "batch_size": 2, "group_size": 2, "rollout_steps": 2, "ema_decay": 0.0}
    model = flowrl.ORWCFMW2(
        "FlowPolicy",
        "sd3-compress",
        env_settings={"flow": "mini-sd3", "prompts": tuple(PROMPTS)},
        seed=0,
        device="cpu",
        lora_rank=4,
        lora_alpha=alpha,
        **settings,
    )
    policy = model.policy
    with torch.no_grad():  # adapters of a size that shows
        for parameter in policy.parameters_of("current").values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save(tmp_path / "checkpoint")
    x, t, cond = torch.randn(2, *policy.model.latent_shape), torch.tensor([0.3, 0.7]), policy.condition(torch.arange(2))
    with torch.no_grad():
        ours, reference = policy.velocity(x, t, cond), policy.velocity(x, t, cond, "reference")

    pipeline = StableDiffusion3Pipeline.from_pretrained(MINI, torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "checkpoint")
    shapes = Shapes(policy.model.latent_shape, policy.model.sample_shape)
    with torch.no_grad():
        theirs = SD3Flow(pipeline, shapes)(x, t, cond)
    assert (ours - reference).abs().max() > 0.05
    assert (theirs - ours).abs().max() <= 1e-4


def test_exported_transformer_of_a_full_fine_tune(tmp_path: Path, flow: SD3Flow) -> None:
    from diffusers import SD3Transformer2DModel

    flow.export(tmp_path, None)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    mine = flow.network.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in loaded.state_dict().items())
