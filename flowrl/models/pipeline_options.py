"""What a user may choose of a pipeline of diffusers, and the shapes that follow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineOptions:
    """Use of a pipeline.

    Attributes:
        resolution: Height and width of the samples in pixels, one number for both; the pipeline's own when None.
        frames: Frames of a video, or of the latents of a sound; the pipeline's own number when None.
        decode_batch: Samples that the autoencoder decodes at once, at most: pictures on a CPU are 8 a thread.
        vae_tiling: Decode large images in tiles, for little memory.
        t5: Load the T5 text encoder where the pipeline can do without it (Stable Diffusion 3).
        sequence_length: Tokens of a prompt; as in the pipeline's own call when None.
        embedded_guidance: Guidance scale that a guidance-distilled network is always given, so that the other scale is
            of classifier-free guidance; None gives it that scale, and leaves classifier-free guidance out.
    """

    resolution: int | tuple[int, int] | None = None
    decode_batch: int = 64
    vae_tiling: bool = False
    t5: bool = True
    sequence_length: int | None = None
    embedded_guidance: float | None = None
    frames: int | None = None


DEFAULTS = PipelineOptions()


@dataclass(frozen=True)
class Shapes:
    """Shapes of one latent and one decoded sample, as a pipeline's configuration says."""

    latent: tuple[int, ...]
    sample: tuple[int, ...]
