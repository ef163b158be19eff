"""Care of a pipeline's text encoders: placed, asked once for each prompt, released, imitated."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple
from zlib import crc32

import torch
from torch import nn

from flowrl.envs.prompts import PICTURE, picture_of
from flowrl.errors import ConfigError
from flowrl.models.base import VelocityModel, in_one_type
from flowrl.models.long_prompts import silenced, warn_of_cut
from flowrl.types import Condition, Contexts

PROMPTS_AT_ONCE = 64
CLIP_TOKENS = 77


class Part(NamedTuple):
    """Part of one encoded prompt: its shape, its type where that is not the text encoders', and what stands in for it.

    What stands in is 0, or 1 for masks (whole numbers and truth values), unless another number is given.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    imitation: int | None = None

    def imitated(self, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Make what stands in for the part of `n` prompts, in the text encoders' `dtype` unless it has its own."""
        kind = self.dtype or dtype
        value = self.imitation if self.imitation is not None else int(not kind.is_floating_point)
        return torch.full((n, *self.shape), value, dtype=kind, device=device)


class PromptedFlow(VelocityModel):
    """A flow of prompts, which are encoded by the text encoders of a pipeline (docs/how-to/pipeline.md).

    Attributes:
        pipeline: A loaded diffusers pipeline.
        max_sequence_length: Tokens of a prompt.
        load_encoders: Loads a pipeline that holds text encoders and tokenizers only. Without it they cannot be had
            again, so they are moved to the host instead of being released.
        device: Where the text encoders compute.
    """

    ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Names of the parts that encode prompts, and that can be released after that."""
    SEQUENCE_LENGTH: ClassVar[int] = 512
    """Tokens of a prompt in the pipeline's own call."""
    takes_pictures: ClassVar[bool] = False
    """Whether it is given a picture with each prompt."""
    pipeline: Any
    max_sequence_length: int
    load_encoders: Callable[[], Any] | None
    device: torch.device

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts by the pipeline's own text encoders."""

    @abstractmethod
    def condition_parts(self) -> list[Part]:
        """Give the parts of one encoded prompt, as `encode_prompts` makes them."""

    def imitate_prompts(self, prompts: list[str]) -> Condition:
        """Make meaningless embeddings, of the shapes and types that `encode_prompts` gives, at the same cost."""
        for encoder in self._encoders().values():
            self.imitate_encoder(encoder, len(prompts))
        return self._imitated_parts(len(prompts))

    def imitate_encoder(self, encoder: nn.Module, n: int) -> None:
        """Compute what a text encoder does with `n` prompts."""
        length = self._clip_tokens if _is_clip(encoder) else self.max_sequence_length
        encoder(torch.zeros(n, length, dtype=torch.long, device=self.device), output_hidden_states=True)

    def _imitated_parts(self, n: int) -> Condition:
        """Make as many embeddings, of the shapes and types that `encode_prompts` gives."""
        return tuple(part.imitated(n, self.pipeline.vae.dtype, self.device) for part in self.condition_parts())

    @torch.no_grad()
    def encode(self, contexts: Contexts) -> Condition:
        """Encode prompts by the pipeline's own text encoders."""
        for prompt in contexts:
            if not isinstance(prompt, str):
                raise ConfigError(f"A text-to-image flow takes prompts (str), not {prompt!r}.")
        if not self.takes_pictures and any(picture_of(prompt) for prompt in contexts):
            warnings.warn(
                f'Prompts name pictures (field "{PICTURE}"), of which this flow is given none: only rewards see them. '
                "Pipelines that edit a picture, or begin a video with it, are of other classes (docs/prompts.md).",
                stacklevel=2,
            )
        self._place_encoders()
        warn_of_cut(contexts, self.tokenizers(), "the flow's text encoders")
        chunks = [list(contexts[i : i + PROMPTS_AT_ONCE]) for i in range(0, len(contexts), PROMPTS_AT_ONCE)]
        with silenced():  # each library warns of each prompt again
            encoded = self.encode_chunks(chunks)
        return in_one_type(tuple(torch.cat(parts) for parts in zip(*encoded)))

    def encode_chunks(self, chunks: Sequence[list[str]]) -> list[Condition]:
        """Encode chunks of prompts, one after the other."""
        return [self.encode_prompts(chunk) for chunk in chunks]

    def imitate_chunks(self, chunks: Sequence[list[str]]) -> list[Condition]:
        """Imitate that: chunks between the first and the last take what the first does, and are not computed."""
        ends = (0, len(chunks) - 1)
        return [
            self.imitate_prompts(chunk) if i in ends else self._imitated_parts(len(chunk))
            for i, chunk in enumerate(chunks)
        ]

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Name of each kind of text encoder, its tokenizer, and how many tokens of a prompt it is given."""
        found: dict[str, tuple[str, Any, int]] = {}
        for part, encoder in self._encoders().items():
            if not part.startswith("text_encoder"):  # it is given something else
                continue
            tokenizer = getattr(self.pipeline, part.replace("text_encoder", "tokenizer"), None)
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of text and images
            name = "CLIP" if _is_clip(encoder) else "T5" if "T5" in type(encoder).__name__ else type(encoder).__name__
            if tokenizer is not None and name not in found:  # two encoders of one kind are given the same
                longest = self.max_sequence_length - self.template_tokens()
                found[name] = (name, tokenizer, self._clip_tokens if name == "CLIP" else longest)
        return list(found.values())

    def template_tokens(self) -> int:
        """Count the tokens of a prompt's that the pipeline's template takes, so that they are lost for the prompt."""
        return 0

    @property
    def _clip_tokens(self) -> int:
        """Tokens that the pipeline gives CLIP; where it does not say, those that CLIP takes."""
        return int(getattr(self.pipeline, "tokenizer_max_length", CLIP_TOKENS))

    @torch.no_grad()
    def null_condition(self) -> Condition:
        """Encode the empty prompt, as the pipeline's own guidance uses it."""
        self._place_encoders()
        return in_one_type(self.encode_null())

    def encode_null(self) -> Condition:
        """Encode the prompt that guidance leads away from; another than "" where the pipeline treats that otherwise."""
        return self.encode_prompts([""])

    def _place_encoders(self) -> None:
        """Put the text encoders on the device, loaded again where they had been released."""
        if self.load_encoders is not None and getattr(self.pipeline, self.ENCODERS[0], None) is None:
            loaded = self.load_encoders()
            for name in self.ENCODERS:
                if getattr(loaded, name, None) is not None:
                    setattr(self.pipeline, name, getattr(loaded, name))
        for encoder in self._encoders().values():
            encoder.to(self.device)

    def release_encoders(self) -> None:
        """Give back the memory of the text encoders; they come back when a new prompt is to be encoded."""
        for name, encoder in self._encoders().items():
            if self.load_encoders is None:
                encoder.to("cpu")
            else:
                setattr(self.pipeline, name, None)

    def _encoders(self) -> dict[str, torch.nn.Module]:
        return {name: part for name in self.ENCODERS if (part := getattr(self.pipeline, name, None)) is not None}


def _is_clip(encoder: nn.Module) -> bool:
    return "CLIP" in type(encoder).__name__


@contextmanager
def cleaned_by_ftfy(pipeline: str) -> Iterator[None]:
    """Say which library is missing where a pipeline of this class does not look before it cleans prompts by it.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        yield
    except NameError as error:
        raise ConfigError(f"A {pipeline} cleans prompts by a library of its own: pip install ftfy.") from error


def check_length(what: str, tokens: int, most: int) -> None:
    """Check that there is room for an encoded text, where nothing of it is cut.

    Raises:
        ConfigError: It has more than `most` tokens.
    """
    if tokens > most:
        raise ConfigError(
            f"{what} has {tokens} tokens, more than {most}: set sequence_length to at least {tokens}, or shorten it."
        )


def seed_of(prompt: str) -> int:
    """Give the seed by which what belongs to a prompt is drawn."""
    return crc32(prompt.encode())


@contextmanager
def seeded(prompt: str, device: torch.device) -> Iterator[torch.Generator]:
    """Give a generator of a prompt's seed, and put back torch's own states on `device` and the CPU afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield torch.Generator().manual_seed(seed_of(prompt))
