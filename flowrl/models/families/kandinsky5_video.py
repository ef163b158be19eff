"""Kandinsky 5.0, of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowrl.errors import ConfigError
from flowrl.models.families.kandinsky5 import POSITIONS, Kandinsky5Flow
from flowrl.models.pipeline import PipelineOptions, Shapes
from flowrl.models.video import VideoFlow

MIDDLING = range(480, 855)
"""Sides in pixels whose positions are divided by less."""


class Kandinsky5VideoFlow(Kandinsky5Flow, VideoFlow):
    """A `Kandinsky5T2VPipeline` whose transformer attends to everything; those for ten seconds do not."""

    PIPELINE = "Kandinsky5T2VPipeline"
    FRAMES, SIDES, FRAME_RATE = 121, (512, 768), 24

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        if transformer.get("attention_type") == "nabla":
            raise ConfigError(
                "This Kandinsky 5 has sparse attention (attention_type 'nabla'), which needs flex attention and is not "
                "trained here: take one of those for five seconds, which attend to everything."
            )
        shapes = super().shapes(transformer, vae, options)
        if shapes.latent[1] > POSITIONS:
            most = (POSITIONS - 1) * cls.frame_reduction(vae) + 1
            raise ConfigError(
                f"frames must be at most {most} for this pipeline, whose transformer has positions for {POSITIONS} "
                f"latent frames; not {options.frames}."
            )
        return shapes

    @property
    def position_scales(self) -> tuple[float, float, float]:
        """What positions are divided by: rows and columns by 2 for sides of 480 to 854 pixels, by 3.16 for others."""
        scale = 2.0 if all(side in MIDDLING for side in self.sample_shape[-2:]) else 3.16
        return 1.0, scale, scale
