"""Every declared class of pipelines: its own call's latents and pictures, training, export, the dry run's plan."""

from __future__ import annotations

import inspect
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from diffusers import ClassifierFreeGuidance
from families import CASES
from families.case import PROMPTS, Case
from gymnasium import spaces
from huggingface_hub import constants
from PIL import Image

import flowrl
from flowrl.distributed.ranks import seen_through
from flowrl.envs.text_to_image import TextToImageEnv
from flowrl.errors import ConfigError
from flowrl.export import export
from flowrl.models.families import DECLARED
from flowrl.models.families.registry import lacks_version
from flowrl.models.loading import source_of
from flowrl.models.long_prompts import silenced
from flowrl.models.pictures import PicturesFlow, read_picture
from flowrl.models.pipeline import PipelineFlow
from flowrl.models.source import FlowSource
from flowrl.pages.model_card import GUIDERS
from flowrl.sample import draw
from flowrl.training.policy import FlowPolicy


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families") / case.name
    torch.manual_seed(3)
    case.build(folder)
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if lacks_version(kind):
        pytest.skip(f"{kind} is of a later diffusers")
    return folder


@pytest.fixture(scope="module")
def untouched(case: Case, folder: Path) -> PipelineFlow:
    """The flow at its first resolution, for tests that neither change weights nor take parts away."""
    return loaded(case, folder)


@pytest.fixture(scope="module")
def sampled(case: Case, folder: Path) -> PipelineFlow:
    """The same, for policies that draw from it."""
    return loaded(case, folder)


def source(case: Case, folder: Path, size: Any = None) -> FlowSource:
    return source_of(str(folder), pipeline=replace(case.options, **{case.sized_by: size or case.sizes[0]}))


def policy_of(case: Case, flow: PipelineFlow, scale: float) -> FlowPolicy:
    box = spaces.Box(0, 1, flow.sample_shape)
    config = flowrl.FlowConfig(guidance_scale=scale)
    return FlowPolicy(spaces.Discrete(3), box, model=flow, contexts=case.contexts, config=config, seed=0)


def loaded(case: Case, folder: Path, size: Any = None) -> PipelineFlow:
    flow = source(case, folder, size).load()
    assert isinstance(flow, PipelineFlow)
    flow.pipeline.set_progress_bar_config(disable=True)
    return flow


def test_every_declared_class_has_a_case(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert {type_of(case, tmp_path_factory.mktemp("declared")) for case in CASES.values()} == set(DECLARED)


def test_pages_name_every_declared_class() -> None:
    names = "README.md", "docs/large-models.md", "docs/pipelines.md"
    pages = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in names}
    for name in names[:2]:
        assert not [kind for kind in DECLARED if f"`{kind.removesuffix('Pipeline')}`" not in pages[name]]
    table, left_out = pages["docs/pipelines.md"].split("## Left out")
    assert not [kind for kind in DECLARED if f"`{kind}`" not in table or f"| `{kind}` |" in left_out]


def type_of(case: Case, folder: Path) -> str:
    """Name of the class that a case builds."""
    built = case.build(folder)
    import json

    return str(json.loads((Path(built or folder) / "model_index.json").read_text())["_class_name"])


def test_configurations_of_older_releases_are_read(case: Case, folder: Path, tmp_path: Path) -> None:
    """They lack settings that came later, which are what they were before: the defaults of their classes."""
    index = json.loads((folder / "model_index.json").read_text())
    lacking = 0
    for file in folder.rglob("*.json"):
        part, config = file.parent.name, json.loads(file.read_text())
        if file.name == "config.json" and index[part][0] == "diffusers":
            known = inspect.signature(getattr(diffusers, index[part][1]).__init__).parameters
            kept = {k: v for k, v in config.items() if k not in known or json.loads(_json(known[k].default)) != v}
            lacking, config = lacking + len(config) - len(kept), kept
        (tmp_path / file.relative_to(folder)).parent.mkdir(exist_ok=True)
        (tmp_path / file.relative_to(folder)).write_text(json.dumps(config))
    assert lacking
    for size in case.sizes:
        old, new = source(case, tmp_path, size), source(case, folder, size)
        assert (old.sample_shape, old.sample_rate) == (new.sample_shape, new.sample_rate)
        assert old.skeleton().latent_shape == new.skeleton().latent_shape


def test_a_dry_run_takes_names_of_the_hub(
    case: Case, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cache made by hand: no file is asked for that a pipeline of the class has not."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshots = tmp_path / "models--OWNER--NAME" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / ("a" * 40)).symlink_to(folder, target_is_directory=True)
    named = source(case, Path(f"OWNER/NAME@{'a' * 40}")).imitation(torch.float32, torch.float32)
    assert [part.shape[1:] for part in named.encode(case.contexts[:1])] == [p.shape for p in named.condition_parts()]


def _json(value: Any) -> str:
    return json.dumps(value, default=repr)


def test_odd_sizes_name_the_nearest(case: Case, folder: Path) -> None:
    if case.sized_by != "resolution":
        pytest.skip("any length will do")
    largest = "at most [0-9]+ pixels" if case.name.startswith("auraflow") else r"multiple of [0-9]+ pixels .* e\.g\. "
    for size in (33, (32, 33)):
        with pytest.raises(ConfigError, match=largest):
            source(case, folder, size)


@pytest.mark.parametrize(("size", "steps"), [(0, 2), (1, 3)])
def test_our_sampler_gives_the_pipelines_latents(
    case: Case, folder: Path, untouched: PipelineFlow, sampled: PipelineFlow, size: int, steps: int
) -> None:
    """With and without guidance, in float32, at two resolutions."""
    flow = loaded(case, folder, case.sizes[size]) if size else sampled
    theirs = loaded(case, folder, case.sizes[size]) if size else untouched
    policy = policy_of(case, flow, 1.0)
    x_0, ids = policy.noise(3), torch.arange(3)
    found = []
    for scale in dict.fromkeys((1.0, case.scale)):
        found.append(policy.sample_latents(ids, x_0=x_0, steps=steps, solver="euler", guidance_scale=scale))
        with torch.no_grad():
            expected = case.call(theirs, x_0, scale, steps)
        assert expected.dtype == torch.float32
        assert (found[-1] - expected).abs().max() <= 1e-4
        assert (expected - x_0).abs().max() > 0.1
    plain, ours = found[0], found[-1]
    if not size:
        other = policy.sample_latents(ids.flip(0), x_0=x_0, steps=steps, solver="euler", guidance_scale=1.0)
        assert (plain - other).abs().max() > 1e-3  # prompts do something
    assert case.scale == 1 or (plain - ours).abs().max() > 1e-3  # and so does guidance


def test_decoding_gives_the_pipelines_samples(case: Case, untouched: PipelineFlow, sampled: PipelineFlow) -> None:
    if case.images is None:
        pytest.skip("another case of this class decodes")
    policy = policy_of(case, sampled, 1.0)
    x_0 = policy.noise(3)
    with torch.no_grad():
        expected = case.images(untouched, x_0, 1.0, 3)
    ours = sampled.decode(policy.sample_latents(torch.arange(3), x_0=x_0, steps=3, solver="euler"))
    assert ours.shape == expected.shape == (3, *sampled.sample_shape)
    assert (ours - expected).abs().max() <= 1e-4
    assert expected.std() > 0.01


def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return images.flatten(1).mean(1)


brightness.takes_sounds = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("algorithm", ["ORWCFMW2", "FlowGRPO", "DRaFT"])
def test_training_and_export(case: Case, folder: Path, algorithm: str, tmp_path: Path) -> None:
    """One iteration with LoRA; the exported adapter gives diffusers our velocity."""
    further = case.same_network or (case.images is None and case.load_adapter is None)
    if algorithm != "ORWCFMW2" and further:
        pytest.skip("a class's further forms are trained by one algorithm")
    env = TextToImageEnv(source(case, folder), case.contexts, brightness)
    settings: dict[str, Any] = {"n_samples": 2, "group_size": 2, "batch_size": 2, "rollout_steps": 2}
    model = getattr(flowrl, algorithm)("FlowPolicy", env, seed=0, device="cpu", lora_rank=2, n_epochs=1, **settings)
    before = {key: value.clone() for key, value in model.policy.parameters_of("current").items()}
    model.learn(2)
    policy, moved = model.policy, model.policy.parameters_of("current")
    assert any(not torch.equal(value, before[key]) for key, value in moved.items())
    if algorithm != "ORWCFMW2":
        return
    with torch.no_grad():  # adapters of a size that shows
        for parameter in moved.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save(tmp_path / "checkpoint")
    x, t, cond = torch.randn(2, *policy.model.latent_shape), torch.tensor([0.3, 0.7]), policy.condition(torch.arange(2))
    with torch.no_grad():
        ours, reference = policy.velocity(x, t, cond), policy.velocity(x, t, cond, "reference")
    theirs = loaded(case, folder)
    if case.load_adapter is not None:
        case.load_adapter(theirs, tmp_path / "checkpoint")
    elif case.has_lora:
        theirs.pipeline.load_lora_weights(tmp_path / "checkpoint")
    else:
        theirs.network.load_lora_adapter(tmp_path / "checkpoint", use_safetensors=True)  # type: ignore[operator]
    with torch.no_grad():
        assert (ours - reference).abs().max() > 1e-3
        assert (theirs(x, t, cond) - ours).abs().max() <= 1e-4


def test_gradients_are_those_of_the_velocity(case: Case, folder: Path) -> None:
    """In either mode: along a direction of the weights its gradient is its change, no part is computed without."""
    if case.rounds:
        pytest.skip("this network rounds")
    flow = loaded(case, folder)
    cond = tuple(part.double() if part.is_floating_point() else part for part in flow.encode(case.contexts[:2]))
    parameters = [p.requires_grad_(True) for p in flow.network.double().parameters()]
    draws = torch.Generator().manual_seed(0)
    x, r = (torch.randn(2, *flow.latent_shape, generator=draws, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    directions = [p.abs().detach() * torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in parameters]

    def along(step: float) -> torch.Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter.add_(direction, alpha=step)
        return (flow(x, t, cond) * r).sum()

    values = []
    for mode in (False, True):
        flow.train(mode)
        values.append(along(0.0))
        gradients = torch.autograd.grad(values[-1], parameters, allow_unused=True)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions) if g is not None)
        step = 1e-4
        with torch.no_grad():
            change = float(along(step) - along(-2 * step)) / (2 * step)
            along(step)  # back to where it was
        assert abs(slope - change) <= 0.02 * abs(change)
    assert float(values[0].detach()) == pytest.approx(float(values[1].detach()), rel=1e-4)


def test_lora_adapts_the_attention(case: Case, folder: Path) -> None:
    """Of every block that has any, by the names that the class declares; and blocks are found for compilation."""
    from flowrl.models.compiling import repeated_blocks

    env = TextToImageEnv(source(case, folder), case.contexts, brightness)
    config = flowrl.FlowConfig(lora_rank=2)
    network = FlowPolicy.of(env, config).model.network
    blocks = [{name: type(part).__name__ for name, part in block.named_modules()} for block in repeated_blocks(network)]
    assert all(len(block) > 1 for block in blocks)
    attentive = [block for block in blocks if any("Attention" in kind for kind in block.values())]
    assert len(attentive) > 0
    for block in attentive:  # of fused projections, what goes in and what comes out
        assert len({name.split(".lora_")[0] for name in block if ".lora_" in name and "att" in name}) >= 2


def test_the_plan_knows_the_prompts(case: Case, folder: Path) -> None:
    """What a dry run puts in the place of encoded prompts has their shapes and types."""
    flow = loaded(case, folder)
    real = flow.encode(case.contexts)
    parts = flow.condition_parts()
    assert [tuple(part.shape[1:]) for part in real] == [part.shape for part in parts]
    assert [part.dtype for part in real] == [part.dtype or torch.float32 for part in parts]
    imitation = source(case, folder).imitation(torch.float32, torch.float32)
    assert [part.shape for part in imitation.encode(case.contexts)] == [part.shape for part in real]
    null = flow.null_condition()
    assert [part.shape[1:] for part in null] == [part.shape[1:] for part in real]
    flow.release_encoders()
    assert all(map(torch.equal, flow.encode(case.contexts), real))  # they come back when they are needed


def test_networks_compute_in_bfloat16_without_autocast(case: Case, folder: Path) -> None:
    """As with LoRA in low precision: embeddings are all in that type, and so is every product."""
    flow = source(case, folder).load(torch.bfloat16, torch.bfloat16)
    cond = flow.encode(case.contexts[:2])
    embeddings = [part for part in (*cond, *flow.null_condition()) if part.is_floating_point() and part.dim() > 1]
    assert {part.dtype for part in embeddings} == {torch.bfloat16}
    x, t = torch.randn(2, *flow.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        assert bool(flow(x, t, cond).isfinite().all())


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_pipelines_call_takes_what_the_model_card_says(
    case: Case, untouched: PipelineFlow, sampled: PipelineFlow, scale: float
) -> None:
    """And draws what flowrl does of the same seed, unless the card says why not."""
    if case.own_noise:
        pytest.skip(f"its call draws noise {case.own_noise}")
    settings, pipeline = untouched.call_settings(scale), untouched.pipeline
    guiders = [part for part in GUIDERS if part in pipeline.components]
    if isinstance(untouched, PicturesFlow):
        picture = read_picture(case.contexts[0], *untouched.sample_shape[-2:]).permute(1, 2, 0)
        settings["image"] = Image.fromarray((255 * picture).byte().numpy())
    for part in guiders:
        setattr(pipeline, part, ClassifierFreeGuidance(1.0 if untouched.distilled_guidance else scale))
    with torch.no_grad(), silenced(), case.around(untouched):
        by = torch.Generator().manual_seed(0)
        drawn = pipeline(prompt=PROMPTS[0], num_inference_steps=2, output_type="pt", generator=by, **settings)
    samples = case.shown(torch.as_tensor(getattr(drawn, untouched.DRAWN)))
    assert samples.shape == (1, *untouched.sample_shape)
    if not untouched.OWN_CALL:
        (ours,) = draw(policy_of(case, sampled, scale), case.contexts[:1], [0], steps=2)
        assert (samples - ours).abs().max() <= 1e-3


@pytest.mark.parametrize(("name", "scale"), [("prx", 1.0), ("hunyuan-image", 3.5)])
def test_the_cards_script_draws_what_flowrl_draws(
    name: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of classes whose adapters are loaded, or whose guidance is set, in a way of their own."""
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    env = TextToImageEnv(source(case, case.build(tmp_path / "base") or tmp_path / "base"), case.contexts, brightness)
    settings = {"n_samples": 2, "batch_size": 2, "rollout_steps": 2, "lora_rank": 2, "guidance_scale": scale}
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cpu", **settings)
    with torch.no_grad():
        for parameter in model.policy.parameters_of("current").values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours, reference = (next(draw(model.policy, case.contexts[:1], [0], role=r)) for r in ("current", "reference"))
    export(model, tmp_path, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "script.py").write_text(code)
    runpy.run_path("script.py")
    theirs = torch.from_numpy(np.array(Image.open("image.png"))).permute(2, 0, 1) / 255
    assert (theirs - ours[0]).abs().max() <= 1 / 255
    assert (theirs - reference[0]).abs().max() > 5 / 255


def test_a_network_that_several_processes_train_is_seen_through(case: Case, untouched: PipelineFlow) -> None:
    """What wraps it, as DDP does, gives the attributes that the flow asks for in a pass."""
    wrapper = seen_through(torch.nn.DataParallel(untouched.network).train(untouched.network.training))
    wrapped = untouched.with_network(wrapper)
    x, t = torch.randn(1, *untouched.latent_shape), torch.tensor([0.3])
    with torch.no_grad():
        cond = tuple(part.imitated(1, torch.float32, torch.device("cpu")) for part in untouched.condition_parts())
        assert torch.equal(wrapped(x, t, cond), untouched(x, t, cond))


def test_memory_is_predicted(case: Case, folder: Path) -> None:
    """A dry run tries every class, and says where the work of its network depends on what is drawn."""
    from flowrl.training.memory_plan import predict_memory

    env = TextToImageEnv(source(case, folder), case.contexts, brightness)
    settings = {"n_samples": 2, "group_size": 2, "batch_size": 2, "rollout_steps": 1, "lora_rank": 2}
    plan = predict_memory(flowrl.ORWCFMW2, flowrl.ORWCFMW2.configure(settings=settings), env)
    assert case.why_unpredictable in plan.missing
    assert bool(plan.missing) == bool(case.why_unpredictable)
    assert plan.missing or plan.phases["training"] > 0


def test_prompts_are_cut_where_the_warning_says(case: Case, untouched: PipelineFlow) -> None:
    """The last word but one that is to be taken counts, one far behind it does not.

    But one, as the number of tokens of a template's message that a pipeline drops is that of its own tokenizer.
    """
    if case.drops_template:
        pytest.skip("how many tokens its template has is known of its own tokenizer only")
    if not untouched.tokenizers():
        pytest.skip("its template holds the prompt")
    _, tokenizer, most = untouched.tokenizers()[-1]
    words = most - len(tokenizer("white")["input_ids"])

    def encoded(words: int) -> list[torch.Tensor]:
        with silenced():
            return [untouched.encode([case.context("white " * (words - 1) + last)])[0] for last in ("white", "circles")]

    white, circles = encoded(words)
    assert (white - circles).abs().max() > 1e-3
    with pytest.warns(UserWarning, match="are cut"):
        white, circles = encoded(words + 16)
    assert torch.equal(white, circles)


def test_checkpoints_of_gradients_change_nothing(case: Case, folder: Path) -> None:
    """Neither the velocity nor its gradient, which blocks compute again then."""
    flow = loaded(case, folder)
    torch.manual_seed(0)
    x, t, cond = torch.randn(2, *flow.latent_shape), torch.tensor([0.3, 0.7]), flow.encode(case.contexts[:2])
    cond = flow.with_guidance(cond, 2.0) if flow.takes_guidance else cond
    weight = max(flow.network.parameters(), key=torch.Tensor.numel).requires_grad_()
    found = []
    for _ in range(2):
        v = flow(x, t, cond)
        found.append((v.detach(), torch.autograd.grad(v.square().sum(), weight)[0]))
        flow.checkpoint_gradients()
    (plain, gradient), (again, gradient_again) = found
    assert (again - plain).abs().max() <= 1e-5
    assert (gradient_again - gradient).abs().max() <= 1e-4 * gradient.abs().max()


def test_a_distilled_pipeline_goes_without_guidance(tmp_path: Path) -> None:
    from families import flux2

    case = CASES["flux2-klein"]
    flux2.build_klein(tmp_path / "klein", is_distilled=True)
    flow, theirs = loaded(case, tmp_path / "klein"), loaded(case, tmp_path / "klein")
    policy = policy_of(case, flow, 1.0)
    x_0, ids = policy.noise(3), torch.arange(3)
    with pytest.warns(UserWarning, match="guidance_scale=4 does nothing: this Flux2KleinPipeline is distilled") as told:
        ours = [policy.sample_latents(ids, x_0=x_0, steps=3, solver="euler", guidance_scale=4.0) for _ in range(2)]
    assert len([warning for warning in told if "guidance" in str(warning.message)]) == 1
    with torch.no_grad():
        expected = case.call(theirs, x_0, 4.0, 3)
    assert (ours[0] - expected).abs().max() <= 1e-4
    assert torch.equal(ours[0], ours[1])


def test_cases_are_of_random_weights_and_small(case: Case, folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < case.most_bytes
