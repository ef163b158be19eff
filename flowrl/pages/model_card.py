"""The model card of an exported run: a README.md that the Hugging Face hub understands, and its pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from inspect import getdoc
from pathlib import Path
from typing import Any, Literal

from flowrl.envs.base import GenerationEnv
from flowrl.envs.prompts import picture_of
from flowrl.models.init_lora import LORA_WEIGHTS
from flowrl.models.loading import FlowSource
from flowrl.models.pictures import PicturesFlow
from flowrl.models.pipeline import saves_adapters
from flowrl.pages.text import markdown_table, number, span
from flowrl.runs.logs import read_metrics
from flowrl.runs.pictures import STEPS, curves
from flowrl.storage.files import read_json
from flowrl.storage.revisions import split
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.saving import algorithm_name
from flowrl.version import __version__

Kind = Literal["lora", "transformer", "pipeline"]
"""What an export holds: LoRA weights, the fine-tuned network alone, or a whole pipeline."""
NOT_EVALUATED = "This state of the run has not been evaluated.\n"
EULER = "FlowMatchEulerDiscreteScheduler"
GUIDERS = "guider", "ocr_guider"
"""Parts by which some pipelines guide, in the place of arguments of their call."""
PROMPTS = 20
"""Prompts that the card lists."""
LIMITATIONS = (
    "Fine-tuning on a reward raises that reward and nothing else: what it does not measure can get worse, diversity "
    "usually falls, and a high score can come from exploiting the reward instead of from better images. The figures "
    "hold for the prompts, the reward, the sampler and the one seed of this run; beyond them nothing was measured, and "
    "all limits and biases of the base model remain."
)


def hub_name(flow: FlowSource) -> str:
    """Name the repository on the hub that a flow's pipeline comes from; empty when it comes from elsewhere."""
    elsewhere = flow.is_embedded or not flow.source or Path(flow.source).exists()
    return "" if elsewhere else split(flow.source)[0]


def write_card(
    folder: Path, model: FlowAlgorithm, run: Path, name: str, kind: Kind, sampling: Mapping[str, Any]
) -> None:
    """Write `README.md`, `curves.png` and `before_after.png`.

    Pictures and results are those of the run folder; what it does not have of this state is left out, and the card says
    so.

    Args:
        folder: Folder to write to.
        model: The run's trained algorithm.
        run: The run folder.
        name: What to load: a name on the hub, or a folder.
        kind: What the folder holds.
        sampling: How the run sampled, as the pipeline takes it.
    """
    parts = [_front_matter(model, kind), f"# {name.rpartition('/')[2]}\n", _summary(model, kind)]
    evaluation = read_json(run / "evaluation.json") if (run / "evaluation.json").exists() else {}
    evaluated = evaluation != {} and evaluation.get("trained_samples") in (None, model.num_timesteps)
    if evaluated and (run / "before_after.png").exists():
        shutil.copyfile(run / "before_after.png", folder / "before_after.png")
        parts.append(
            "![samples before and after](before_after.png)\n\nBefore (left) and after this training (right), from the "
            "same noise and prompts.\n"
        )
    parts += ["## Use\n", _use(model, kind, name, sampling)]
    parts += ["## Training\n", _training(model)]
    rows = read_metrics(run / "metrics.csv")  # of a run that was killed, further than the checkpoint
    if rows := [row for row in rows if row.get(STEPS, 0) <= model.num_timesteps]:
        curves(rows).savefig(folder / "curves.png", dpi=110)
        parts.append("![training curves](curves.png)\n")
    parts += ["## Results\n", _results(evaluation) if evaluated else NOT_EVALUATED]
    parts += ["## Limitations\n", LIMITATIONS]
    (folder / "README.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(model: FlowAlgorithm, kind: Kind) -> str:
    """Write the YAML for the hub, without a licence: it is the base model's. Values are JSON, which is YAML."""
    task = f"{'image' if isinstance(model.policy.model, PicturesFlow) else 'text'}-to-{_drawn(model, 'audio')}"
    tags = ["flowrl", task, "flow-matching", "reward-fine-tuning"]
    data: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    if base := hub_name(model.env.core.flow):
        data["base_model"] = base
    data["tags"] = [*tags, "lora"] if kind == "lora" else tags
    data["instance_prompt"] = None
    lines = [f"{key}: {json.dumps(value)}" for key, value in data.items()]
    return "\n".join(["---", *lines, "---", ""])


def _base(flow: FlowSource) -> str:
    """Name the base model, without the folders of the machine that it was on."""
    if name := hub_name(flow):
        return f"[{name}](https://huggingface.co/{name})"
    if flow.is_embedded:
        return f"`{flow.source}`, which ships with [flowrl](https://pypi.org/project/flowrl-torch/)"
    return f"`{Path(flow.source).name}`, a local pipeline" if flow.source else "a pipeline made in code"


def _summary(model: FlowAlgorithm, kind: Kind) -> str:
    what = {"lora": "LoRA weights", "transformer": "A fully fine-tuned transformer", "pipeline": "A whole pipeline"}
    core, began = (
        model.env.core,
        " It began from other LoRA weights, which are in these." * bool(model.config.init_lora),
    )
    return (
        f"{what[kind]} for diffusers' `{type(_pipeline(model)).__name__}`, trained by the algorithm "
        f"`{algorithm_name(type(model))}` of flowrl {__version__} with the reward *{_reward(core)}*. "
        f"Base model: {_base(core.flow)}; its licence holds here too.{began}\n"
    )


def _reward(core: GenerationEnv) -> str:
    return getattr(core, "reward_name", "") or core.name


def _pipeline(model: FlowAlgorithm) -> Any:
    return model.policy.model.pipeline


def _drawn(model: FlowAlgorithm, sound: str = "sound") -> str:
    """Name what a run draws."""
    flow = model.env.core.flow
    return "video" if flow.frame_rate else sound if flow.sample_rate else "image"


def _use(model: FlowAlgorithm, kind: Kind, name: str, sampling: Mapping[str, Any]) -> str:
    """Write a script that loads the folder and draws a picture as the run does."""
    pipeline = _pipeline(model)
    parts = model.policy.model.networks_of(model.policy.model.network)  # type: ignore[operator]
    cls, network = type(pipeline).__name__, type(next(iter(parts.values()))).__name__
    imports = ["import torch"]
    imports.append(f"from diffusers import {f'{network}, {cls}' if kind == 'transformer' else cls}")
    lines = []
    rest = f", torch_dtype=torch.float32{_without(pipeline)}"  # transformers would take the files' type, diffusers not
    if kind == "pipeline":
        lines.append(f"pipe = {cls}.from_pretrained({json.dumps(name)}{rest})")
    elif kind == "transformer":
        own = f"{network}.from_pretrained({json.dumps(name)}, torch_dtype=torch.float32, subfolder="
        lines += [f"{part} = {own}{json.dumps(part)})" for part in parts]
        given = ", ".join(f"{part}={part}" for part in parts)
        lines.append(f"pipe = {cls}.from_pretrained({_base_code(model)}, {given}{rest})")
    else:
        lines += _adapters(model, name, rest, imports)
    if guiders := [part for part in GUIDERS if part in pipeline.components]:
        imports[1] += ", ClassifierFreeGuidance"
        scale = 1.0 if model.policy.model.distilled_guidance else model.policy.guidance_scale
        lines += [f"pipe.{part} = ClassifierFreeGuidance(guidance_scale={scale})" for part in guiders]
    options = [f"    {key}={value!r}," for key, value in sampling.items()]
    options.append("    generator=torch.Generator().manual_seed(0),")
    prompt = json.dumps(model.env.core.contexts[0], ensure_ascii=False)
    if isinstance(model.policy.model, PicturesFlow):
        *_, height, width = model.policy.model.sample_shape
        imports += ["from diffusers.utils import load_image", "from PIL import Image"]
        picture = json.dumps(Path(picture_of(model.env.core.contexts[0]) or "").name, ensure_ascii=False)
        options.insert(0, f"    image=load_image({picture}).resize(({width}, {height}), Image.Resampling.LANCZOS),")
    drawn, flow = _drawn(model), model.env.core.flow
    save = f'{drawn}.save("image.png")'
    if drawn == "video":
        imports.append("from diffusers.utils import export_to_video")
        save = f'export_to_video(video, "video.mp4", fps={flow.frame_rate:g})'
    elif drawn == "sound":
        imports.append("from scipy.io import wavfile")
        save = f'wavfile.write("sound.wav", {flow.sample_rate}, sound.float().cpu().numpy().T)'
    kept = model.policy.model.DRAWN
    call = [f"{drawn} = pipe(", f"    prompt={prompt},", *options, f").{kept}[0]", save]
    code = "\n".join([*imports, "", *lines, *call])
    advice = 'On a GPU take `torch.bfloat16` in the place of `torch.float32`, and call `pipe.to("cuda")`.'
    return f"```python\n{code}\n```\n\n{advice}{_otherwise(model)}\n"


def _adapters(model: FlowAlgorithm, name: str, rest: str, imports: list[str]) -> list[str]:
    """Write how the base model is loaded with adapters; adds to the script's imports."""
    pipeline, flow = _pipeline(model), model.policy.model
    parts = list(flow.networks_of(flow.network))  # type: ignore[operator]
    if model.env.core.flow.is_embedded:
        imports.append("from flowrl.models.loading import ASSETS  # pip install flowrl-torch")
    lines = [f"pipe = {type(pipeline).__name__}.from_pretrained({_base_code(model)}{rest})"]
    file = f'{json.dumps(name)}, weight_name="{LORA_WEIGHTS}"'  # older versions of diffusers look for none when offline
    if saves_adapters(pipeline):
        lines.append(f"pipe.load_lora_weights({file})")
    elif hasattr(getattr(pipeline, parts[0]), "load_lora_adapter"):
        lines.append(f"pipe.{parts[0]}.load_lora_adapter({file}, use_safetensors=True)")
    else:
        imports.append("from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict")
        imports.append("from safetensors.torch import load_file")
        lines += _by_peft(name, parts[0])
    for part in parts[1:]:
        given = f'weight_name="{part}_lora.safetensors", load_into_{part}=True'
        lines.append(f"pipe.load_lora_weights({json.dumps(name)}, {given})")
    return lines


def _by_peft(name: str, part: str) -> list[str]:
    """Write how peft alone puts adapters into a network that has no loader of them."""
    file = json.dumps(f"{name}/{LORA_WEIGHTS}")
    return [
        f"weights = load_file({file})  # in a folder, not on the hub",
        f'weights = {{key.removeprefix("{part}."): value for key, value in weights.items()}}',
        'targets = sorted({key.rpartition(".lora_")[0] for key in weights})',
        'rank = next(len(value) for key, value in weights.items() if ".lora_A." in key)',
        "config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)",
        f"inject_adapter_in_model(config, pipe.{part})",
        f"set_peft_model_state_dict(pipe.{part}, weights)",
    ]


def _without(pipeline: Any) -> str:
    """Name the text encoders that the pipeline does without, as arguments: diffusers must be told, or loads them."""
    gone = [name for name, part in pipeline.components.items() if name.startswith("tokenizer") and part is None]
    gone = [name for name in gone if name not in pipeline._optional_components]
    return "".join(f", {name.replace('tokenizer', 'text_encoder')}=None, {name}=None" for name in gone)


def _otherwise(model: FlowAlgorithm) -> str:
    """Say how the run sampled where the pipeline's own call does not: it then draws other pictures."""
    policy, scheduler = model.policy, _pipeline(model).scheduler
    flow: Any = policy.model
    told = [flow.OWN_CALL] if flow.OWN_CALL else []
    if type(scheduler).__name__ != EULER or scheduler.config.get("stochastic_sampling"):
        told.append(f"The run took other steps than the pipeline's {type(scheduler).__name__}: pictures are others.")
    if policy.solver != "euler":
        told.append(f"The run sampled with {policy.solver}: Euler's steps, the pipeline's own, come near it when many.")
    if policy.guidance_scale < flow.UNGUIDED and not flow.distilled_guidance:
        told.append("The run's guidance scale is below 1, which pipelines' calls take for none: pictures are others.")
    if policy.guidance != "cfg" and policy.guidance_scale != 1 and not flow.distilled_guidance:
        told.append("The run guided by CFG-Zero*: the pipeline's own guidance is another, and so are its pictures.")
    return "".join(f" {text}" for text in told)


def _base_code(model: FlowAlgorithm) -> str:
    flow = model.env.core.flow
    if flow.is_embedded:
        return f'ASSETS / "{flow.source}"'
    revision = f", revision={json.dumps(flow.revision)}" if flow.revision else ""
    return json.dumps(hub_name(flow) or Path(flow.source).name or "BASE") + revision


def _training(model: FlowAlgorithm) -> str:
    core, policy = model.env.core, model.policy
    what = (getdoc(type(model)) or "").partition("\n")[0]
    listed = [json.dumps(prompt, ensure_ascii=False) for prompt in core.contexts[:PROMPTS]]
    more = len(core.contexts) - len(listed)
    prompts = ", ".join(listed) + (f", and {more} more" if more > 0 else "")
    settings = {
        "algorithm": algorithm_name(type(model)),
        "settings": asdict(model.config),
        "environment": None if core.origin is None else {"name": core.origin[0], **core.origin[1]},
        "seed": model.seed,
    }
    whole = json.dumps(_without_folders(settings), indent=1, ensure_ascii=False, default=str)
    return "\n".join(
        [
            f"- algorithm: `{algorithm_name(type(model))}`: {what}",
            f"- reward: {_reward(core)}",
            f"- length: {model.num_timesteps:,} generated samples, {model._n_updates:,} gradient steps, "
            f"{policy.evaluations:,} network evaluations (a forward is 1 per sample, a backward 2)",
            f"- weights shared: {'the moving average' if policy.sampling_role == 'ema' else 'those trained last'}",
            f"- prompts ({len(core.contexts)}): {prompts}",
            "\n<details><summary>All settings</summary>\n",
            f"```json\n{whole}\n```\n\n</details>\n",
        ]
    )


def _without_folders(value: Any) -> Any:
    """Cut absolute paths, as such or after a `=`, to their last part: the rest is nobody's matter."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str | Path):
        return value
    key, equals, path = str(value).rpartition("=")
    return key + equals + Path(path).name if path.startswith("~") or Path(path).is_absolute() else str(value)


def _results(result: Mapping[str, Any]) -> str:
    """Write the table of `evaluation.json`; figures that do not exist are dashes."""
    base, components = _table(result.get("reference")), _table(result.get("components"))
    rows = [("reward", _with_interval(base), _with_interval(result))]
    for key, value in components.items():
        rows.append((key[:100], number(_table(base.get("components")).get(key)), number(value)))
    rows.append(("diversity", number(base.get("diversity")), number(result.get("diversity"))))
    rows.append(("drift E|v - v_ref|²", "0", number(result.get("drift"))))
    intervals = _table(result.get("win_rate_cis"))
    for key, value in _table(result.get("win_rates")).items():
        rows.append((f"win rate, {key[:100]}", "", f"{number(value)} ({span(intervals.get(key))})"))
    return (
        f"{markdown_table(['', 'before', 'after'], rows)}\n\n"
        f"{number(result.get('n_samples'))} samples of each, from the same noise and prompts; intervals are of "
        "95 %. Diversity is the mean distance of two samples of the same prompt; a win rate is the share of pairs, of "
        "the same prompt and noise, in which the fine-tuned model's sample is the better one (ties count half).\n"
    )


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _with_interval(statistics: Mapping[str, Any]) -> str:
    return f"{number(statistics.get('reward_mean'))} ({span(statistics.get('reward_ci'))})"
