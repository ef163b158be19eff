"""Declared classes of pipelines, and those that are left out, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, TypeVar

from flowrl.checks import shown
from flowrl.errors import ConfigError, ModelLoadError, did_you_mean
from flowrl.models.pipeline import PipelineFlow

Declaration = TypeVar("Declaration", bound=type[PipelineFlow])
DECLARED: dict[str, type[PipelineFlow]] = {}
"""Declarations by the class name of the pipeline."""
DIFFUSION = "it predicts noise, or is made for a diffusion schedule; losses and samplers here are those of a flow"
FLOW_MAP = "its network is given two times, and maps from one to the other"
TRIGONOMETRIC = "it is distilled to a trigonometric schedule of one to four steps, which is no straight path"
NO_FLOWS: Mapping[str, str] = {
    "AllegroPipeline": DIFFUSION,
    "AnyFlowFARPipeline": FLOW_MAP,
    "AnyFlowPipeline": FLOW_MAP,
    "CogVideoXPipeline": DIFFUSION,
    "CogView3PlusPipeline": DIFFUSION,
    "CosmosTextToWorldPipeline": DIFFUSION,
    "HunyuanDiTPipeline": DIFFUSION,
    "Ideogram4Pipeline": "its guidance is that of a second network, which would not follow the one that is trained",
    "KolorsPipeline": DIFFUSION,
    "LattePipeline": DIFFUSION,
    "OmniGenPipeline": "it has no text encoder: its network takes the words themselves, and conditions here are "
    "embeddings",
    "PRXPixelPipeline": "it predicts images, which its call turns into velocities down to a noise level of 0.05 only",
    "PixArtAlphaPipeline": DIFFUSION,
    "PixArtSigmaPipeline": DIFFUSION,
    "SanaSprintPipeline": TRIGONOMETRIC,
    "StableAudioPipeline": DIFFUSION,
    "StableCascadeCombinedPipeline": DIFFUSION,
    "StableDiffusionPipeline": DIFFUSION,
    "StableDiffusionXLPipeline": DIFFUSION,
}
"""Pipelines that are asked for and cannot be had, with the reason."""
EXAMPLE = """\
from flowrl.models.families import register_pipeline
from flowrl.models.pipeline import PipelineFlow

@register_pipeline
class MyFlow(PipelineFlow):
    PIPELINE = "{kind}"
    TRANSFORMER = "..."        # class of its transformer
    ...                        # inputs, encode_prompts, condition_parts: docs/how-to/pipeline.md"""


def register_pipeline(declaration: Declaration) -> Declaration:
    """Declare a class of pipelines; as a decorator of a subclass of `PipelineFlow`.

    Raises:
        ConfigError: It is no such class, lacks what every declaration says, or another class declares the same.
    """
    if not (isinstance(declaration, type) and issubclass(declaration, PipelineFlow)):
        raise ConfigError(f"register_pipeline takes a subclass of PipelineFlow, not {declaration!r}.")
    lacking = [name for name in ("PIPELINE", "TRANSFORMER") if not isinstance(getattr(declaration, name, None), str)]
    if lacking:
        raise ConfigError(f"{declaration.__name__} must say {' and '.join(lacking)}, as names of classes of diffusers.")
    there = DECLARED.get(declaration.PIPELINE)
    if there is not None and (there.__module__, there.__qualname__) != (
        declaration.__module__,
        declaration.__qualname__,
    ):
        raise ConfigError(f"{declaration.PIPELINE} is declared already, by {there.__module__}.{there.__qualname__}.")
    DECLARED[declaration.PIPELINE] = declaration
    return declaration


def lacks_version(kind: str) -> bool:
    """Tell whether the installed diffusers is older than a declared class asks for."""
    return tuple(int(n) for n in version("diffusers").split(".")[:2]) < DECLARED[kind].LEAST_DIFFUSERS


def declared(kind: Any, name: str) -> type[PipelineFlow]:
    """Find the declaration of a class of pipelines.

    Args:
        kind: Name of the class, as a pipeline's `model_index.json` says.
        name: Name of the flow, for messages.

    Raises:
        ModelLoadError: There is none: says why, or shows how to write one.
    """
    if isinstance(kind, str) and kind in DECLARED:
        if lacks_version(kind):
            least = ".".join(map(str, DECLARED[kind].LEAST_DIFFUSERS))
            raise ModelLoadError(
                f"'{name}' is a {kind}, which is taken from diffusers {least} on (installed: {version('diffusers')}, "
                "which computes it otherwise): update diffusers, on Python 3.11 or later."
            )
        return DECLARED[kind]
    came = kind[:100] if isinstance(kind, str) else shown(kind)
    if came in NO_FLOWS:
        raise ModelLoadError(f"'{name}' is a {came}, which flowrl does not train: {NO_FLOWS[came]}.")
    raise ModelLoadError(
        f"'{name}' is a {came}, a class of pipelines that is not declared ({', '.join(sorted(DECLARED))} are)."
        f"{did_you_mean(came, tuple(DECLARED))} If it is a flow, declare it in a module of yours and name that by "
        f"--modules:\n\n{EXAMPLE.format(kind=came)}"
    )
