"""Prompts longer than a text encoder takes: one warning that counts them and says what is lost."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flowrl.models.imports import importing

_shortened = reprlib.Repr()
_shortened.maxstring = 120


def lost_part(tokenizer: Any, prompt: str, most: int) -> str:
    """Tell what of a prompt a tokenizer cuts off beyond `most` tokens, its marks of beginning and end included."""
    tokens = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    if len(tokens) <= most:
        return ""
    return tokenizer.decode(tokens[most - 1 : -1], skip_special_tokens=True).strip() or "its end"


def warn_of_cut(prompts: Sequence[str], tokenizers: Sequence[tuple[str, Any, int]], who: str) -> bool:
    """Warn once of prompts that are cut, and tell whether any was.

    Args:
        prompts: The prompts to encode; one may come several times.
        tokenizers: Name, tokenizer, and how many tokens are taken at most.
        who: The encoders' owner, for the message.
    """
    distinct = list(dict.fromkeys(prompts))
    told: list[str] = []
    cut: set[str] = set()
    with silenced():
        for name, tokenizer, most in tokenizers:
            lost = {prompt: part for prompt in distinct if (part := lost_part(tokenizer, prompt, most))}
            if lost:
                cut |= lost.keys()
                first = next(iter(lost))
                told.append(f"{name} takes {most} tokens and loses {_shortened.repr(lost[first])} of the first")
    if not told:
        return False
    first = next(prompt for prompt in distinct if prompt in cut)
    warnings.warn(
        f"{len(cut)} of {len(distinct)} prompts are longer than {who} can take, and are cut: the first is "
        f"{_shortened.repr(str(first))}; {'; '.join(told)}. Write what matters first, or shorten them.",
        stacklevel=2,
    )
    return True


@contextmanager
def silenced() -> Iterator[None]:
    """Keep the libraries of tokenizers and pipelines from saying the same of each such prompt; errors still raise."""
    with importing():
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    try:
        for log, _ in levels:
            log.set_verbosity_error()
        yield
    finally:
        for log, level in levels:
            log.set_verbosity(level)
