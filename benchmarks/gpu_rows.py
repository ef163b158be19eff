"""The rows of the GPU benchmark: each measures one thing, says its lines as it knows them, and gives its figures."""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare_loops import ALL, BareLoop, BareLoRA
from gpu_lab import FLUX, PROMPTS, SD35, Figures, Lab, known
from torch.utils.flop_counter import FlopCounterMode

import flowrl
from flowrl.envs.rewards.aesthetic import colourfulness

GIB = 2**30
FLUX_NEEDS = 60e9


def ceiling(lab: Lab) -> Figures:
    """What the device gives at most: a product of large matrices, a copy within its memory."""
    n = lab.sizes.matrix
    a, b = (torch.randn(n, n, device=lab.device, dtype=torch.bfloat16) for _ in range(2))
    product = lab.in_turn({"product": lambda: [torch.mm(a, b) for _ in range(10)]}, lab.repeats(10))["product"]
    lab.ceiling = 10 * 2 * n**3 / product["median"]
    source = torch.empty(lab.sizes.copied, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    copy = lab.in_turn({"copy": lambda: [target.copy_(source) for _ in range(10)]}, lab.repeats(10))["copy"]
    rate = 10 * 2 * lab.sizes.copied / copy["median"]
    lab.say("ceiling", f"bfloat16 product of {n} x {n} matrices", lab.ceiling / 1e12, "TFLOP/s")
    lab.say("ceiling", "copy on the device, read and written", rate / 1e9, "GB/s")
    return {"flops": lab.ceiling, "copied_bytes_per_second": rate}


def sd35_rollout(lab: Lab) -> Figures:
    """Rollout of Stable Diffusion 3.5 medium against diffusers' own pipeline."""
    n, steps = lab.sizes.images, lab.sizes.steps
    return _rollout(lab, "sd35-rollout", SD35, n, steps, _sd3_pipeline)


def flux_rollout(lab: Lab) -> Figures:
    """Rollout of FLUX.1-dev against diffusers' own pipeline: one after the other, as both are 24 GB."""
    if lab.on_gpu and torch.cuda.mem_get_info()[0] < FLUX_NEEDS:
        free = torch.cuda.mem_get_info()[0] / 1e9
        lab.say("flux-rollout", f"left out: {free:.0f} GB are free, {FLUX_NEEDS / 1e9:.0f} are needed", None, "")
        return {"left_out": f"{free:.0f} GB free"}
    n, steps = lab.sizes.flux_images, lab.sizes.flux_steps
    return _rollout(lab, "flux-rollout", FLUX, n, steps, _flux_pipeline, together=False)


def _rollout(
    lab: Lab, row: str, name: str, n: int, steps: int, pipeline: Callable[..., Any], together: bool = True
) -> Figures:
    repeats, env = lab.repeats(5), lab.env(name)
    works: dict[str, Callable[[], object]] = {}
    seconds: dict[str, Figures] = {}
    figures: Figures = {"images": n, "steps": steps}
    if not lab.only_flowrl:
        figures["flops_per_image"], works["pipeline, eager"], compiled = pipeline(lab, env, n, steps)
        if not together:
            seconds |= lab.in_turn(works, repeats)
            works.clear()
            del compiled
            lab.free()
    for variant in lab.variants():
        with lab.guarded(variant, figures):
            works[variant] = _draws(lab.large(env, n_samples=n, rollout_batch_size=n, rollout_steps=steps))
            seconds |= lab.in_turn(works, repeats)
            _speeds(lab, row, figures, seconds, n, "images/s", figures.get("flops_per_image"))
        works.pop(variant, None)
        lab.free()
    if together and not (lab.only_flowrl or lab.eager_only):
        with lab.guarded("pipeline, blocks compiled", figures):
            seconds |= lab.in_turn({"pipeline, blocks compiled": compiled}, repeats)
            _speeds(lab, row, figures, seconds, n, "images/s", figures["flops_per_image"])
    return figures


def _draws(model: Any) -> Callable[[], object]:
    n, role = model.config.n_samples, model.behaviour_role
    ids = torch.arange(n, device=model.device) % len(PROMPTS)
    return lambda: model.policy.sample_latents(ids, role=role)


def _sd3_pipeline(lab: Lab, env: Any, n: int, steps: int) -> tuple[float, Callable[[], object], Callable[[], object]]:
    """FLOPs of an image, the pipeline's call, and the same where the first call compiles the blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    flow = env.flow.load(torch.bfloat16, torch.bfloat16)
    flow.network.requires_grad_(False)
    absent = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    pipeline = StableDiffusion3Pipeline(
        transformer=flow.network,
        vae=flow.pipeline.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **absent,
    )
    return _calls(lab, pipeline, flow, n, steps, guidance_scale=1.0)


def _flux_pipeline(lab: Lab, env: Any, n: int, steps: int) -> tuple[float, Callable[[], object], Callable[[], object]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    flow = env.flow.load(torch.bfloat16, torch.bfloat16)
    flow.network.requires_grad_(False)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = FluxPipeline(transformer=flow.network, vae=flow.pipeline.vae, scheduler=scheduler, **absent)
    return _calls(lab, pipeline, flow, n, steps, guidance_scale=1.0)


def _calls(
    lab: Lab, pipeline: Any, flow: Any, n: int, steps: int, **more: Any
) -> tuple[float, Callable[[], object], Callable[[], object]]:
    pipeline.set_progress_bar_config(disable=True)
    embeds, pooled = flow.encode(PROMPTS[:1] * n)[:2]
    size = lab.sizes.resolution

    def call() -> None:
        pipeline(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            height=size,
            width=size,
            num_inference_steps=steps,
            output_type="latent",
            **more,
        )

    def compiled() -> None:
        if not pipeline.transformer.transformer_blocks[0]._compiled_call_impl:
            compile_blocks(pipeline.transformer)
        call()

    x = torch.randn(1, *flow.latent_shape, device=lab.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        flow(x, torch.full((1,), 0.5, device=lab.device), flow.encode(PROMPTS[:1]))
    return float(steps * counter.get_total_flops()), call, compiled


def compile_blocks(network: Any) -> None:
    """Compile each block, as `compile_repeated_blocks` does where a class of diffusers names its blocks."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # kinds of blocks x adapters x with and without gradients
    for block in network.transformer_blocks:
        block.compile()


def _speeds(
    lab: Lab,
    row: str,
    figures: Figures,
    seconds: Mapping[str, Figures],
    n: int,
    unit: str,
    flops: float | None,
) -> None:
    """Say and note what is new: speeds, ratios to the bare variant, shares of the ceiling, compile times."""
    done = figures.setdefault("variants", {})
    for variant, measured in seconds.items():
        if variant in done:
            continue
        speed = n / measured["median"]
        done[variant] = {"per_second": speed, "seconds": measured["median"], "first_seconds": measured["first"]}
        notes = []
        if flops and lab.ceiling:
            done[variant]["share_of_ceiling"] = speed * flops / lab.ceiling
            notes.append(f"{100 * speed * flops / lab.ceiling:.1f} % of the ceiling")
        warming = measured["first"] - measured["median"]
        if "compiled" in variant or (variant == "flowrl" and lab.settings.get("compile")):
            done[variant]["compile_seconds"] = warming
            notes.append(f"compiling took {warming:.1f} s")
        lab.say(row, variant, speed, unit, "; ".join(notes))
    eager = next((v for v in done if v.endswith("eager")), None)
    for variant in (v for v in seconds if eager and v != eager and f"{v} / {eager}" not in figures):
        figures[f"{variant} / {eager}"] = done[variant]["per_second"] / done[eager]["per_second"]
        lab.say(row, f"{variant} / {eager}", figures[f"{variant} / {eager}"], "")


def sd35_update(lab: Lab) -> Figures:
    """Gradient steps on adapters of Stable Diffusion 3.5 medium against a bare loop of the same arithmetic."""
    n, batch, env = lab.sizes.images, lab.sizes.batch, lab.env(SD35)
    figures: Figures = {"samples": n, "batch_size": batch}
    works: dict[str, Callable[[], object]] = {}
    seconds: dict[str, Figures] = {}
    flops = None
    if not lab.only_flowrl:
        bare, update, flops = _bare_update(lab, env, n, batch)
        works["bare, eager"], figures["flops_per_sample"] = update, flops
    for variant in lab.variants():
        with lab.guarded(variant, figures):
            model = lab.large(env, rollout_steps=1)
            _collect(model)
            works[variant] = model.update
            seconds |= lab.in_turn(works, lab.repeats(5))
            _speeds(lab, "sd35-update", figures, seconds, n, "samples/s", flops)
        works.pop(variant, None)
        model = None
        lab.free()
    if lab.only_flowrl:
        return figures
    if not (lab.eager_only or lab.quick):
        with lab.guarded("bare, blocks compiled", figures):
            compile_blocks(bare.network)
            seconds |= lab.in_turn({"bare, blocks compiled": update}, lab.repeats(5))
            _speeds(lab, "sd35-update", figures, seconds, n, "samples/s", flops)
    del bare, update
    lab.free()
    _, update, _ = _bare_update(lab, env, n, batch, autocast=False)
    seconds |= lab.in_turn({"bare, adapters in bfloat16, no autocast": update}, lab.repeats(5))
    _speeds(lab, "sd35-update", figures, seconds, n, "samples/s", flops)
    return figures


def _bare_update(
    lab: Lab, env: Any, n: int, batch: int, autocast: bool = True
) -> tuple[BareLoRA, Callable[[], object], float]:
    """A bare loop on a network of its own, its update, and the FLOPs of that for a sample."""
    flow = env.flow.load(torch.bfloat16, torch.bfloat16)
    bare = BareLoRA(flow.network, flow.lora_targets, lab.sizes.rank, autocast=autocast)
    x_1 = torch.randn(n, *flow.latent_shape, device=lab.device)
    cond, weight = flow.encode(PROMPTS[:1] * n), torch.rand(n, device=lab.device) + 0.5
    with FlopCounterMode(display=False) as counter:
        bare.step(x_1[:1], weight[:1], tuple(part[:1] for part in cond))
    return bare, lambda: bare.update(x_1, weight, cond, batch), float(counter.get_total_flops())


def _collect(model: Any) -> Any:
    """Fill the buffer as `learn` does; the callback that it was given."""
    from stable_baselines3.common.callbacks import CallbackList

    _, callback = model._setup_learn(model.config.n_samples, CallbackList([]), True, "", False)
    model.collect(callback)
    return callback


def sd35_iteration(lab: Lab) -> Figures:
    """A whole iteration of Stable Diffusion 3.5 medium, decoding included, and its memory against the plan."""
    from flowrl.training.memory_plan import predict_memory

    row, env = "sd35-iteration", lab.env(SD35)
    figures: Figures = {"reward": "mean brightness, on the device"}
    for variant in lab.variants():
        with lab.guarded(variant, figures):
            _iteration(lab, variant, lab.large(env), figures)
        lab.free()
    if lab.only_flowrl:
        return figures
    plan = predict_memory(flowrl.ORWCFMW2, lab.large_config(env), env)
    figures |= {"predicted_bytes": plan.peak, "predicted_phases": plan.phases, "missing": plan.missing}
    peak = figures.get("peak_bytes", {}).get("flowrl")
    note = plan.missing or (f"predicted / measured {plan.peak / peak:.2f}" if peak else "")
    lab.say(row, "peak as the memory plan predicts it", plan.peak / GIB, "GiB", note)
    return figures


def _iteration(lab: Lab, variant: str, model: Any, figures: Figures) -> None:
    """Measure a variant of flowrl, whole and by phases, and what it takes of the device's memory."""
    row, iteration = "sd35-iteration", whole_iteration(model)

    def note(what: str, value: float, unit: str, line: str, shown: float | None = None) -> None:
        figures.setdefault(what, {})[variant] = value
        lab.say(row, f"{variant}, {line}", value if shown is None else shown, unit)

    note("first_seconds", lab.seconds(iteration), "s", "the first")
    if lab.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = lab.in_turn({"iteration": iteration}, lab.repeats(4))["iteration"]["median"]
    note("seconds", seconds, "s", f"{model.config.n_samples} samples, decoded")
    if lab.on_gpu:
        peak = torch.cuda.max_memory_allocated()
        note("peak_bytes", peak, "GiB", "peak of the device's memory", peak / GIB)
    phases = {"rollout and decoding": partial(_collect, model), "update": model.update}
    for phase, part in lab.in_turn(phases, lab.repeats(4)).items():
        note(f"{phase}, seconds", part["median"], "s", phase)


def whole_iteration(model: Any) -> Callable[[], object]:
    return lambda: model.learn(model.config.n_samples, reset_num_timesteps=False, log_interval=1)


def _mini_model(lab: Lab) -> Any:
    settings = {**known(ALL), "n_epochs": 1, "group_size": 8, "standardise": "none", "warmup_updates": 0}
    settings |= {"lora_rank": 0, "precision": "float32", **lab.sizes.mini, **lab.settings}
    where = {"flow": "mini-sd3"}
    return flowrl.ORWCFMW2("FlowPolicy", "sd3-aesthetic", env_settings=where, seed=0, device=lab.device, **settings)


def _mlp_model(lab: Lab) -> Any:
    settings = {**known(ALL), **lab.sizes.mlp, **lab.settings}
    return flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device=lab.device, **settings)


def _call_sd3(net: Any, x: torch.Tensor, t: torch.Tensor, c: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return -net(
        hidden_states=x,
        timestep=1000 * (1 - t),
        encoder_hidden_states=c[0],
        pooled_projections=c[1],
        return_dict=False,
    )[0]


def mini_sd3(lab: Lab) -> Figures:
    """An iteration of the embedded mini-sd3, all weights trained, in parts, against a bare loop."""
    makers = _call_sd3, lambda x: colourfulness(x) / 100
    figures, parts = _small(lab, _mini_model, lambda model: BareLoop(model, *makers, model.policy.model.decode), 8)
    with lab.guarded("parts", figures):
        figures["parts"] = {name: value["median"] for name, value in lab.in_turn(parts, lab.repeats(8)).items()}
        for name, value in figures["parts"].items():
            lab.say("mini-sd3", name, value, "s")
    return figures


def mlp(lab: Lab) -> Figures:
    """An iteration of an MLP in the plane against a bare loop: nearly all of it is launching kernels."""
    makers = lambda net, x, t, c: net(x, t), lambda x: x[:, 0], lambda x: x
    return _small(lab, _mlp_model, lambda model: BareLoop(model, *makers), 40)[0]


def _small(
    lab: Lab, build: Callable[[Lab], Any], bare_of: Callable[[Any], BareLoop], repeats: int
) -> tuple[Figures, dict[str, Callable[[], object]]]:
    """Measure whole iterations of each variant, and of a bare loop beside the first; their figures, and their parts."""
    figures: Figures = {"seconds": {}, "first_seconds": {}}
    works: dict[str, Callable[[], object]] = {}
    parts: dict[str, Callable[[], object]] = {}
    bare = None
    for variant in lab.variants():
        with lab.guarded(variant, figures):
            model = build(lab)
            n = figures["samples"] = model.config.n_samples
            for _ in range(3 if getattr(model.config, "cuda_graphs", False) else 0):  # captured in the third
                whole_iteration(model)()
            works[variant] = whole_iteration(model)
            if bare is None and not lab.only_flowrl:
                bare = bare_of(model)
                works["bare"] = bare.iteration
            for name, value in lab.in_turn(works, lab.repeats(repeats)).items():
                figures["seconds"][name], figures["first_seconds"][name] = value["median"], value["first"]
                lab.say(lab.row, f"{name}, an iteration of {n} samples", value["median"], "s")
            if bare is not None:
                figures[f"{variant} / bare"] = figures["seconds"][variant] / figures["seconds"]["bare"]
                lab.say(lab.row, f"seconds, {variant} / bare", figures[f"{variant} / bare"], "")
            parts |= _parts(variant, model)
        works.clear()
    return figures, {**parts, **({} if bare is None else _bare_parts(bare))}


def _parts(variant: str, model: Any) -> dict[str, Callable[[], object]]:
    ids = model.contexts()
    draw = partial(model.policy.sample_latents, ids, role=model.behaviour_role)
    x = draw()
    return {
        f"{variant}, rollout": draw,
        f"{variant}, decoding and reward": lambda: model.reward(model.policy.decode(x), ids),
        f"{variant}, update": model.update,
    }


def _bare_parts(bare: BareLoop) -> dict[str, Callable[[], object]]:
    x_1 = bare.draw().clone()
    reward = bare.score(x_1).clone()
    return {
        "bare, rollout": bare.draw,
        "bare, decoding and reward": lambda: bare.score(x_1),
        "bare, update": lambda: bare.train(x_1, reward),
    }


def syncs(lab: Lab) -> Figures:
    """How often an iteration waits for the device, and where: as torch's own sync debug mode warns."""
    figures: Figures = {}
    for name, build in {"mlp": _mlp_model, "mini-sd3": _mini_model}.items():
        model = build(lab)
        iteration = whole_iteration(model)
        iteration()
        with _waits(lab) as whole:
            iteration()
        with _waits(lab) as within:
            model.update()
        figures[name] = {"iteration": sum(whole.values()), "update": sum(within.values()), "where": dict(whole)}
        note = "" if lab.on_gpu else "no GPU here: nothing to wait for"
        lab.say("syncs", f"{name}, a whole iteration", figures[name]["iteration"], "waits", note)
        lab.say("syncs", f"{name}, within update()", figures[name]["update"], "waits")
        for where, count in whole.most_common(3):
            lab.say("syncs", f"{name}, at {where}", count, "waits")
    return figures


@contextlib.contextmanager
def _waits(lab: Lab) -> Iterator[collections.Counter[str]]:
    """Count synchronisations by the line that asked for them."""
    counts: collections.Counter[str] = collections.Counter()
    lab.synchronise()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if lab.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            if lab.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            counts["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}"] += 1


ROWS: dict[str, Callable[[Lab], Figures]] = {
    "ceiling": ceiling,
    "sd35-rollout": sd35_rollout,
    "sd35-update": sd35_update,
    "sd35-iteration": sd35_iteration,
    "mini-sd3": mini_sd3,
    "mlp": mlp,
    "syncs": syncs,
    "flux-rollout": flux_rollout,
}
QUICK = ("ceiling", "sd35-rollout", "sd35-update", "mini-sd3", "mlp")
COMPARED = ("mini-sd3", "mlp", "sd35-iteration")
"""Rows that a baseline runs, too: those of whole iterations, which are measured by phases as well."""
