"""The adapters of diffusers' pipelines: our sampler with the pipeline's schedule gives the pipeline's own latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
import torch
from conftest import REPOSITORY
from small_pipelines import PROMPTS

import flowrl
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.models import pipeline
from flowrl.models.families import register_pipeline, registry
from flowrl.models.families.flux import FluxFlow
from flowrl.models.families.sd3 import SD3Flow
from flowrl.models.loading import source_of
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions
from flowrl.training import role_networks
from flowrl.training.policy import FlowPolicy

KINDS = {
    "sd3": lambda folder: small_pipelines.sd3(folder),
    "sd3-shifted-by-resolution": lambda folder: small_pipelines.sd3(folder, use_dynamic_shifting=True),
    "sd3-without-t5": lambda folder: small_pipelines.sd3(folder, t5=False),
    "flux-dev": lambda folder: small_pipelines.flux(folder),
    "flux-schnell": lambda folder: small_pipelines.flux(folder, guidance_embeds=False),
}
OPTIONS = PipelineOptions(resolution=16)


@pytest.fixture(scope="session", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("pipelines") / request.param)


def load(folder: Path, options: PipelineOptions = OPTIONS, **dtypes: torch.dtype) -> PipelineFlow:
    model = source_of(str(folder), pipeline=options).load(**dtypes)
    assert isinstance(model, PipelineFlow)
    model.pipeline.set_progress_bar_config(disable=True)
    return model


def policy_of(folder: Path, scale: float = 1.0) -> FlowPolicy:
    from gymnasium import spaces

    model = load(folder)
    box = spaces.Box(0, 1, model.sample_shape)
    config = flowrl.FlowConfig(guidance_scale=scale)
    return FlowPolicy(spaces.Discrete(3), box, model=model, contexts=PROMPTS, config=config, seed=0)


def call_pipeline(flow: PipelineFlow, x_0: torch.Tensor, scale: float, output: str = "latent") -> torch.Tensor:
    """What the pipeline's own call gives for this noise, as latents (B, C, H, W) or images."""
    size = flow.sample_shape[1]
    call = {"num_inference_steps": 6, "height": size, "width": size, "output_type": output}
    if isinstance(flow, FluxFlow):
        guidance = {"guidance_scale": scale} if flow.distilled_guidance else {}
        if scale != 1 and not flow.distilled_guidance:
            guidance = {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)}
        result = flow.pipeline(PROMPTS, latents=pack(x_0), **guidance, **call).images
        return unpack(result, size // 4, size // 4) if output == "latent" else result
    return flow.pipeline(PROMPTS, latents=x_0, guidance_scale=scale, **call).images


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_euler_gives_the_pipelines_latents(folder: Path, scale: float) -> None:
    policy = policy_of(folder, scale)
    x_0 = policy.noise(3)
    ours = policy.sample_latents(torch.arange(3), x_0=x_0, steps=6, solver="euler")
    plain = policy.sample_latents(torch.arange(3), x_0=x_0, steps=6, solver="euler", guidance_scale=1.0)
    expected = call_pipeline(load(folder), x_0, scale)
    assert expected.dtype == torch.float32
    assert (ours - expected).abs().max() <= 1e-4
    assert (expected - x_0).abs().max() > 0.5
    assert scale == 1 or (ours - plain).abs().max() > 0.01  # guidance does something
    other = policy.sample_latents(torch.tensor([1, 2, 0]), x_0=x_0, steps=6)
    assert (ours - other).abs().max() > 0.01  # and so do prompts


def test_decoding_gives_the_pipelines_images(folder: Path) -> None:
    flow = load(folder)
    x_0 = torch.randn(3, *flow.latent_shape)
    expected = call_pipeline(flow, x_0, 1.0, "pt")
    ours = flow.decode(call_pipeline(flow, x_0, 1.0))
    assert ours.shape == (3, *flow.sample_shape)
    assert (ours - expected).abs().max() <= 1e-5


def test_decoding_in_pieces_gives_the_same_images_in_the_usual_layout(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, sizes = load(folder), []
    latents = torch.randn(5, *flow.latent_shape)
    expected = flow.pipeline.vae.decode(flow.to_autoencoder(latents)).sample / 2 + 0.5
    decode = flow.pipeline.vae.decode
    monkeypatch.setattr(flow.pipeline.vae, "decode", lambda z, **kwargs: sizes.append(len(z)) or decode(z, **kwargs))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("flowrl.models.pipeline.DECODED_AT_ONCE", 3)
    for most, pieces in ((64, [3, 2]), (2, [2, 2, 1])):
        flow.decode_batch = most
        images = flow.decode(latents)
        assert images.is_contiguous()
        torch.testing.assert_close(images, expected.clamp(0, 1), rtol=0, atol=1e-5)
        assert sizes == pieces
        sizes.clear()


def test_on_the_cpu_passes_that_draw_go_piece_by_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(folder, 3.0)
    network, sizes = policy.model.network, []
    network.register_forward_hook(lambda *args: sizes.append(len(args[-1][0])))
    assert policy.model.rows_at_once() == 1024 // policy.model.sequence_length * torch.get_num_threads()
    x_0, ids, n = policy.noise(3), torch.arange(3), 3 if policy.model.distilled_guidance else 6
    whole = policy.sample_latents(ids, x_0=x_0, steps=2)
    assert sizes == [n, n]
    monkeypatch.setattr(type(policy.model), "rows_at_once", lambda self: n - 1)
    pieces = policy.sample_latents(ids, x_0=x_0, steps=2)
    assert sizes[2:] == [n - 1, 1, n - 1, 1]
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    policy.sample_latents(ids, x_0=x_0, steps=1, grad_steps=1)
    assert sizes[6:] == [n]  # the pass that is trained is one
    decoded: list[int] = []
    decode = policy.model.pipeline.vae.decode
    monkeypatch.setattr(
        policy.model.pipeline.vae, "decode", lambda z, **kwargs: decoded.append(len(z)) or decode(z, **kwargs)
    )
    monkeypatch.setattr(pipeline, "DECODED_AT_ONCE", 1)
    policy.decode(pieces)
    for module in (pipeline, role_networks):  # a prediction of memory, which is for GPUs too, takes all at once
        monkeypatch.setattr(module, "has_values", lambda tensor: False)
    policy.decode(policy.sample_latents(ids, x_0=x_0, steps=1))
    assert (sizes[7:], decoded) == ([n], [1, 1, 1, 3])


@pytest.mark.parametrize(("tokens", "rows"), [(None, 0), (16.0, 64), (5000, 1)])
def test_a_declaration_need_not_count_its_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: float | None, rows: int
) -> None:
    """Where its schedule does not depend on them: samples are then drawn all at once."""
    flow = load(folder)
    monkeypatch.setattr(type(flow), "sequence_length", property(lambda self: tokens))
    assert flow.rows_at_once() == rows * torch.get_num_threads()


def test_the_schedule_depends_on_the_resolution_where_the_pipelines_does(folder: Path) -> None:
    small, large = load(folder).times(4), load(folder, PipelineOptions(resolution=24)).times(4)
    dynamic = load(folder).pipeline.scheduler.config.use_dynamic_shifting
    assert torch.equal(small, large) != dynamic


def test_velocity_sees_time_and_prompt_per_sample(folder: Path) -> None:
    flow = load(folder)
    x, t, cond = torch.randn(3, *flow.latent_shape), torch.tensor([0.1, 0.5, 0.9]), flow.encode(PROMPTS)
    with torch.no_grad():
        whole = flow(x, t, cond)
        for i in range(3):
            one = flow(x[i : i + 1], t[i : i + 1], tuple(part[i : i + 1] for part in cond))
            torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-4, atol=1e-5)


def test_skeleton_has_the_shapes_and_parameters(folder: Path) -> None:
    source, flow = source_of(str(folder), pipeline=OPTIONS), load(folder)
    skeleton = source.skeleton()
    assert (skeleton.latent_shape, skeleton.sample_shape) == (flow.latent_shape, flow.sample_shape)
    sizes = [{n: p.shape for n, p in model.network.named_parameters()} for model in (skeleton, flow)]
    assert sizes[0] == sizes[1]
    assert source.sample_shape == flow.sample_shape == (3, 16, 16)


@pytest.mark.parametrize("size", [10, 0, -16])
def test_a_resolution_that_cannot_be_drawn(folder: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=r"multiple of 4 pixels"):
        source_of(str(folder), pipeline=PipelineOptions(resolution=size))


def test_encoders_are_released_and_come_back(folder: Path) -> None:
    flow = load(folder)
    before = flow.encode(PROMPTS)
    flow.release_encoders()
    assert all(getattr(flow.pipeline, name, None) is None for name in ("text_encoder", "text_encoder_2"))
    for part, again in zip(before, flow.encode(PROMPTS)):
        assert torch.equal(part, again)


def test_a_pipeline_that_cannot_be_loaded_again_keeps_its_encoders(folder: Path) -> None:
    flow = load(folder)
    flow.load_encoders = None
    before = flow.encode(PROMPTS)
    flow.release_encoders()
    for part, again in zip(before, flow.encode(PROMPTS)):
        assert torch.equal(part, again)


def test_weights_in_the_types_asked_for(folder: Path) -> None:
    flow = load(folder, network_dtype=torch.float32, frozen_dtype=torch.bfloat16)
    assert flow.network.dtype == torch.float32
    assert flow.pipeline.vae.dtype == flow.pipeline.text_encoder.dtype == torch.bfloat16
    assert load(folder, network_dtype=torch.bfloat16).network.dtype == torch.bfloat16


def test_imitated_prompts_are_where_the_encoders_are(folder: Path) -> None:
    flow = source_of(str(folder), pipeline=OPTIONS).imitation(torch.float32, torch.float32)
    for encoder in flow._encoders().values():
        encoder.to("meta")
    flow.move_frozen(torch.device("meta"))
    assert {part.device.type for part in flow.imitate_prompts(PROMPTS)} == {"meta"}


def test_of_many_prompts_the_first_and_the_last_are_imitated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = source_of(str(folder), pipeline=OPTIONS).imitation(torch.float32, torch.float32)
    imitate, asked = flow.imitate_prompts, []
    monkeypatch.setattr(flow, "imitate_prompts", lambda prompts: asked.append(len(prompts)) or imitate(prompts))
    parts = flow.encode([f"prompt {i}" for i in range(200)])
    assert asked == [64, 8]
    assert {len(part) for part in parts} == {200}


def test_tiled_decoding_is_asked_for(folder: Path) -> None:
    assert not load(folder).pipeline.vae.use_tiling
    assert load(folder, PipelineOptions(resolution=16, vae_tiling=True)).pipeline.vae.use_tiling


def test_t5_can_be_left_out(tmp_path: Path) -> None:
    with_t5 = small_pipelines.sd3(tmp_path / "sd3")
    without = load(with_t5, PipelineOptions(resolution=16, t5=False))
    assert without.pipeline.text_encoder_3 is None
    full = load(with_t5).encode(PROMPTS)[0]
    zeros = without.encode(PROMPTS)[0][:, 16:]
    assert zeros.count_nonzero() == 0
    assert full[:, 16:].count_nonzero() > 0
    with pytest.raises(ConfigError, match=r"FluxPipeline.*cannot do without T5"):
        source_of(str(small_pipelines.flux(tmp_path / "flux")), pipeline=PipelineOptions(t5=False))


def test_packing_is_the_pipelines_own() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 8)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 3, 4), x)


def test_a_pipeline_that_is_no_flow_says_why(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ModelLoadError, match=r"StableDiffusionXLPipeline.*does not train: it predicts noise"):
        source_of(str(tmp_path))


def test_a_pipeline_that_is_not_declared_shows_how_to(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "Fluxx2Pipeline"}')
    with pytest.raises(ModelLoadError, match=r"(?s)Fluxx2Pipeline.*not declared.*--modules") as told:
        source_of(str(tmp_path))
    assert '    PIPELINE = "Fluxx2Pipeline"' in str(told.value)
    shown = str(told.value)[str(told.value).index("from flowrl") :]
    made: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "DECLARED", {})
        exec(shown, made)  # noqa: S102
        assert {"Fluxx2Pipeline": made["MyFlow"]} == registry.DECLARED


def test_declarations_are_looked_at() -> None:
    with pytest.raises(ConfigError, match="subclass of PipelineFlow"):
        register_pipeline(dict)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="Empty must say PIPELINE and TRANSFORMER"):
        register_pipeline(type("Empty", (PipelineFlow,), {}))
    with pytest.raises(ConfigError, match=r"FluxPipeline is declared already, by flowrl\.models"):
        register_pipeline(type("Mine", (FluxFlow,), {}))
    assert register_pipeline(FluxFlow) is FluxFlow  # a module that is loaded twice


def test_a_class_that_is_declared_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another class of diffusers' with the parts of Stable Diffusion 3 trains as that one does."""
    folder = small_pipelines.sd3(tmp_path / "pag", t5=False)
    index = json.loads((folder / "model_index.json").read_text())
    monkeypatch.setattr(registry, "DECLARED", dict(registry.DECLARED))
    expected = load(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3PAGPipeline"}))
    with pytest.raises(ModelLoadError, match="not declared"):
        load(folder)
    register_pipeline(type("PAGFlow", (SD3Flow,), {"PIPELINE": "StableDiffusion3PAGPipeline"}))
    flow = load(folder)
    assert type(flow.pipeline).__name__ == "StableDiffusion3PAGPipeline"
    x, t, cond = torch.randn(2, *flow.latent_shape), torch.tensor([0.2, 0.7]), flow.encode(PROMPTS[:2])
    with torch.no_grad():
        assert torch.equal(flow(x, t, cond), expected(x, t, expected.encode(PROMPTS[:2])))


def test_a_declaration_that_names_what_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders that it forgets were loaded in another type than the network; of a class a folder was called damaged."""
    folder = small_pipelines.sd3(tmp_path / "pag", t5=False)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3PAGPipeline"}))
    monkeypatch.setattr(registry, "DECLARED", {})

    def declare(**said: Any) -> None:
        registry.DECLARED.clear()
        register_pipeline(type("Mine", (SD3Flow,), {"PIPELINE": "StableDiffusion3PAGPipeline", **said}))

    declare(ENCODERS=("text_encoder",))
    with pytest.raises(ConfigError, match=r"has text_encoder_2, too: Mine\.ENCODERS must name it"):
        source_of(str(folder))
    declare(TRANSFORMER="SD3Transformer")
    with pytest.raises(ModelLoadError, match=r"diffusers \d.*, as installed, has no class 'SD3Transformer'"):
        source_of(str(folder)).skeleton()
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "MyPipeline"}))
    declare(PIPELINE="MyPipeline")
    with pytest.raises(ModelLoadError, match=r"diffusers \d.*, as installed, has no class 'MyPipeline'"):
        load(folder)


def test_the_declaration_of_the_how_to_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "how-to" / "pipeline.md").read_text(encoding="utf-8")
    monkeypatch.setattr(registry, "DECLARED", dict(registry.DECLARED))
    folder = small_pipelines.sd3(tmp_path / "pag")
    expected, t = load(folder), torch.tensor([0.2, 0.7])
    exec(page.partition("# my_pipelines.py\n")[2].partition("```")[0], made := {})  # noqa: S102
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": made["MyFlow"].PIPELINE}
    (folder / "model_index.json").write_text(json.dumps(index))
    flow = load(folder)
    assert type(flow) is made["MyFlow"]
    x = torch.randn(2, *flow.latent_shape)
    with torch.no_grad():
        assert torch.equal(flow(x, t, flow.encode(PROMPTS[:2])), expected(x, t, expected.encode(PROMPTS[:2])))
