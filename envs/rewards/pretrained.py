"""Published networks for rewards: loading without surprises, and images as they take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from flowrl.errors import ModelLoadError
from flowrl.models.imports import first_failure
from flowrl.storage import revisions

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MODES: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def from_pretrained(cls: Any, name: str, option: str, hint: str = "", **kwargs: Any) -> Any:
    """Call `cls.from_pretrained(name)` of a transformers class.

    Args:
        cls: Class of a model, processor, tokenizer or config.
        name: Folder or hub name, OWNER/NAME or OWNER/NAME@REVISION.
        option: Option of the reward that gives another folder, for the message of an error.
        hint: One more way out, for that message.
        **kwargs: For `from_pretrained`.

    Raises:
        ModelLoadError: It cannot be had.
    """
    repository, revision = revisions.pinned(name)
    try:
        return cls.from_pretrained(repository, revision=revision or "main", trust_remote_code=False, **kwargs)
    except Exception as error:
        raise ModelLoadError(first_failure(error) or _message(f"'{name}'", error, option, "FOLDER", hint)) from error


def load_model(cls: Any, name: str, option: str, hint: str = "") -> Any:
    """Load a frozen float32 network of a folder or hub name from safetensors; arguments as of `from_pretrained`.

    Raises:
        ModelLoadError: It cannot be had, or lacks weights (transformers would draw those at random).
    """
    model, info = from_pretrained(cls, name, option, hint, use_safetensors=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(
            f"'{name}' is no complete {type(model).__name__}: {len(missing)} weights are missing, the first "
            f"'{missing[0]}'. Give a folder that has them as --env.reward-options {option}=FOLDER."
        )
    return model.float().eval().requires_grad_(False)


def published_file(repository: str, file: str, option: str, hint: str = "") -> str:
    """Fetch a file of a hub repository, downloaded where it is not in the cache; gives its path.

    Raises:
        ModelLoadError: It cannot be had.
    """
    try:
        return str(revisions.fetch(repository, file)[0])
    except Exception as error:
        raise ModelLoadError(_message(f"'{file}' of '{repository}'", error, option, "FILE", hint)) from error


def read_state(file: str | Path) -> dict[str, Any]:
    """Read a file of weights: safetensors, or a .pt or .pth, of which only weights are read.

    Raises:
        ModelLoadError: Missing, damaged, or holding anything but weights.
    """
    from safetensors.torch import load_file

    try:
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelLoadError(f"Cannot read weights from '{file}': {error}") from error
    if not isinstance(state, dict):
        raise ModelLoadError(f"'{file}' holds a {type(state).__name__}, not weights by name.")
    return state


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], file: str | Path) -> None:
    """Put all weights of a state into a model.

    Raises:
        ModelLoadError: Weights are missing, left over, or of another shape; names the file.
    """
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelLoadError(f"The weights in '{file}' do not fit: {error}") from error
    if odd := [*result.missing_keys, *result.unexpected_keys]:
        raise ModelLoadError(
            f"The weights in '{file}' do not fit: {len(result.missing_keys)} are missing and "
            f"{len(result.unexpected_keys)} left over, the first '{odd[0]}'."
        )


def _message(what: str, error: Exception, option: str, kind: str, hint: str) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"Cannot load {what}: {first_line} Give it as --env.reward-options {option}={kind}{hint}."


@dataclass(frozen=True)
class ImagePreprocessing:
    """Resizing, cropping and normalisation of images, on their device.

    Attributes:
        resize: Height and width in pixels; or the length of the shorter side (with `pad`, of the longer side).
        crop: Height and width of the middle part that is kept; None keeps all.
        pad: Fill up to a square with black.
        mean: Per channel, of values in [0, 1].
        std: Per channel.
        mode: "bicubic" or "bilinear", both with antialiasing.
    """

    resize: tuple[int, int] | int
    crop: tuple[int, int] | None = None
    pad: bool = False
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: Literal["bicubic", "bilinear"] = "bicubic"

    @classmethod
    def of_clip(cls, size: int) -> ImagePreprocessing:
        """Preprocess as CLIP was trained: shorter side to `size`, bicubic, the middle square."""
        return cls(size, (size, size))

    @classmethod
    def of_processor(cls, processor: Any, name: str) -> ImagePreprocessing:
        """Preprocess as an image processor of transformers does; tried beside it on one picture.

        Raises:
            ModelLoadError: The processor does something else.
        """
        config = processor.to_dict()
        size = config.get("size") or {}
        resize = (size["height"], size["width"]) if size.get("height") else size.get("shortest_edge")
        crop_size = config["crop_size"] if config.get("do_center_crop") else None
        crop = (crop_size["height"], crop_size["width"]) if crop_size else None
        if config.get("crop_pct") and isinstance(resize, int):  # ConvNeXt and ResNet
            crop = (resize, resize) if resize < 384 else None
            resize = int(resize / config["crop_pct"]) if resize < 384 else (resize, resize)
        mode = MODES.get(config.get("resample", -1))
        if resize is None or mode is None:
            raise ModelLoadError(f"The image processor of '{name}' resizes in a way that flowrl cannot: {config}.")
        mean, std = config["image_mean"], config["image_std"]
        if not config.get("do_normalize"):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        preprocessing = cls(resize, crop, mean=tuple(mean), std=tuple(std), mode=mode)
        preprocessing._compare(processor, name)
        return preprocessing

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Prepare images (B, 3, H, W) in [0, 1] for the network, float32."""
        size = self._resized(*images.shape[2:])
        pixels = nn.functional.interpolate(
            images.float(), size=size, mode=self.mode, antialias=True, align_corners=False
        ).clamp(0, 1)
        if self.crop is not None:
            (height, width), (top, left) = self.crop, ((n - m) // 2 for n, m in zip(size, self.crop))
            pixels = pixels[:, :, max(top, 0) :, max(left, 0) :][:, :, :height, :width]
        if self.pad:
            top, left = ((max(size) - n) // 2 for n in size)
            pixels = nn.functional.pad(pixels, (left, max(size) - size[1] - left, top, max(size) - size[0] - top))
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize
        if self.pad:
            scale = self.resize / max(height, width)
            return round(height * scale), round(width * scale)
        scale = self.resize / min(height, width)
        return max(int(height * scale), self.resize), max(int(width * scale), self.resize)

    def _compare(self, processor: Any, name: str) -> None:
        """Compare with the processor on ramps in all directions: flips, other crops, channels and scales show."""
        y, x = np.mgrid[0:300, 0:340] / 340
        picture = (255 * np.stack([y, x, (1 - x) * (1 - y)], axis=2)).round().astype(np.uint8)
        theirs = processor(images=[Image.fromarray(picture)], return_tensors="pt")["pixel_values"].float()
        ours = self(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
        tolerance = 3 / 255 / min(self.std)  # the processor rounds to whole numbers after resizing
        if ours.shape != theirs.shape or bool((ours - theirs).abs().max() > tolerance):
            raise ModelLoadError(
                f"The image processor of '{name}' ({type(processor).__name__}) does more than resize, crop and "
                "normalise, which is what flowrl can do on the device."
            )
