"""Legibility of the asked text in a picture, by a text recogniser without a detector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from flowrl.envs.prompts import Prompt
from flowrl.envs.rewards.catalogue import register_reward
from flowrl.envs.rewards.ranges import UNIT
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.types import RewardOutput

HEIGHT = 48
"""Pixels of a line of text as the recogniser takes it."""
CHUNK = 32
"""Pictures read at once: a frame has a probability for each of 18,710 letters, 86 MB for 32 square pictures."""
STRIDE = 8
"""Pixels of width for each frame of its output."""
LEAST = 1e-7
"""Probabilities are not taken to be smaller: one hopeless letter should not outweigh all others."""
QUOTED = re.compile(r'"([^"]+)"')
SAID = re.compile(
    r"\b(?:says?|said|saying|reads?|reading|spells?|spelling|spelled|written|titled|captioned|label+ed|"
    r"(?:words?|texts?|letters?|message|title|caption|label|inscription|slogan)(?: (?:is|are|of))?)[\s:,]*"
    r'"([^"]+)"',
    re.IGNORECASE,
)
"""A quotation with what says that it is to be written; other quotations may be of anything."""


@register_reward("ocr")
class OCRReward:
    """Mean log-likelihood per letter of the asked text under a text recogniser; 0 is certainty, -16 the worst.

    The likelihood is that of connectionist temporal classification (Graves et al. 2006): the sum over all ways in which
    frames can spell the text. It is dense: a word that is nearly right scores better than a scribble. The asked text is
    the prompt's field "text"; or what stands in double quotes after "says", "reads", "with the word", "the text" and
    the like, the first such quotation; or else the last quotation: 'a "red" sign that says "stop"' asks for "stop".

    The recogniser reads lines, so a picture is cut into overlapping strips and the best one counts. Components:
    `exact` (1 where a strip spells exactly the text).

    Code and weights: rapidocr (Apache-2.0) with PP-OCRv6 (PaddleOCR, Apache-2.0), which come with the package; run by
    onnxruntime (MIT). The extra `[ocr]`.

    Args:
        strips: Number of strips, from the top to the bottom of the picture.
        share: Height of a strip as a share of the picture's.

    Raises:
        ConfigError: The extra is not installed, or an option has no meaning.
        ModelLoadError: The package holds no recogniser.
    """

    scale = 2.0
    takes = UNIT
    on_host = True

    def __init__(self, strips: int = 3, share: float = 0.5) -> None:
        if strips < 1 or not 0 < share <= 1:
            raise ConfigError(f"ocr.strips must be positive and ocr.share in (0, 1], not {strips} and {share}.")
        self.strips, self.share = strips, share
        self.session, self.letters = _recogniser()
        self.index = {letter: i for i, letter in enumerate(self.letters)}
        self.description = "log-likelihood per letter of the asked text (PP-OCRv6), best of overlapping strips"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1], with values in [log(1e-7), 0], on the CPU.

        Raises:
            ConfigError: A prompt that asks for no text, or for letters that the recogniser does not know.
        """
        texts = [asked_text(prompt) for prompt in prompts]
        targets = [self._encoded(text) for text in texts]
        pictures, found = images.detach().float().cpu(), torch.zeros(len(texts), 2)
        sizes = [self._size(images.shape[2], images.shape[3], len(target)) for target in targets]
        for size in sorted(set(sizes)):  # a score does not depend on the other texts
            rows = [i for i, other in enumerate(sizes) if other == size]
            for some in (rows[k : k + CHUNK] for k in range(0, len(rows), CHUNK)):
                here = [i for i in some for _ in range(self.strips)]
                probability = self._read(pictures[some], size).flatten(0, 1)  # (B * strips, T, letters)
                score = log_likelihood(probability, [targets[i] for i in here])
                exact = [spelled == texts[i] for i, spelled in zip(here, self._spelled(probability))]
                found[some] = torch.stack([score, torch.tensor(exact).float()], 1).view(-1, self.strips, 2).amax(1)
        return RewardOutput(found[:, 0], {"exact": found[:, 1]})

    def _size(self, height: int, width: int, letters: int) -> tuple[int, int]:
        """Compute the size of a strip as it is read, with a frame for each letter and for blanks between and around."""
        strip = max(1, round(self.share * height))
        return HEIGHT, max(STRIDE * (2 * letters + 1), round(width * HEIGHT / strip))

    def _read(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        n, _, height, _ = images.shape
        strip = max(1, round(self.share * height))
        tops = [round(i * (height - strip) / max(1, self.strips - 1)) for i in range(self.strips)]
        if self.strips == 1:
            tops = [(height - strip) // 2]
        cut = torch.stack([images[:, :, top : top + strip] for top in tops], dim=1).flatten(0, 1)
        lines = functional.interpolate(cut, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
        blue_first = (2 * lines.flip(1) - 1).numpy()
        (probability,) = self.session.run(None, {self.session.get_inputs()[0].name: blue_first})
        return torch.from_numpy(probability).view(n, self.strips, *probability.shape[1:])

    def _encoded(self, text: str) -> torch.Tensor:
        unknown = [letter for letter in text if letter not in self.index]
        if unknown:
            raise ConfigError(f"The recogniser of the reward 'ocr' does not know {unknown[0]!r} of the text {text!r}.")
        return torch.tensor([self.index[letter] for letter in text])

    def _spelled(self, probability: torch.Tensor) -> list[str]:
        """Spell the likeliest letters of frames (N, T, letters), repetitions and blanks left out: N texts."""
        best = probability.argmax(2)
        keep = best != 0
        keep[:, 1:] &= best[:, 1:] != best[:, :-1]
        return ["".join(self.letters[i] for i in row[kept].tolist()).strip() for row, kept in zip(best, keep)]


def asked_text(prompt: str) -> str:
    """Find the text that a prompt asks for.

    Raises:
        ConfigError: It asks for none.
    """
    field = prompt.fields.get("text") if isinstance(prompt, Prompt) else None
    quoted = [*SAID.findall(prompt)[:1], *QUOTED.findall(prompt)[-1:], ""]
    text = str(field) if field is not None else quoted[0]
    if not text.strip():
        raise ConfigError(
            f"The reward 'ocr' needs the asked text, and {str(prompt)!r} names none: put it in double quotes, or into "
            'the field "text" of a .jsonl prompt file (docs/prompts.md).'
        )
    return text.strip()


def log_likelihood(probability: torch.Tensor, targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the log-likelihood per letter (N,) of texts under frames (N, T, letters); letter 0 is the blank."""
    lengths = torch.tensor([len(target) for target in targets])
    log_p = probability.clamp_min(LEAST).log().transpose(0, 1)  # (T, N, letters)
    frames = torch.full((len(targets),), len(log_p))
    loss = functional.ctc_loss(log_p, torch.cat(list(targets)), frames, lengths, reduction="none")
    return (-loss / lengths).clamp(torch.tensor(LEAST).log().item(), 0)


def _recogniser() -> tuple[Any, list[str]]:
    """Load the recogniser: its session and its letters, the blank first."""
    try:
        import onnxruntime
        import rapidocr
    except ImportError as error:
        raise ConfigError(
            f"The reward 'ocr' needs rapidocr and onnxruntime: pip install 'flowrl-torch[ocr]' ({error})."
        ) from error
    files = sorted((Path(rapidocr.__file__).parent / "models").glob("*rec*.onnx"))
    if not files:
        raise ModelLoadError("rapidocr came without its recogniser (models/*rec*.onnx): install it again.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(files[-1]), options, providers=["CPUExecutionProvider"])
    known = session.get_modelmeta().custom_metadata_map.get("character", "").splitlines()
    letters = ["", *known, " "]
    outputs = session.get_outputs()[0].shape[-1]
    if outputs != len(letters):
        raise ModelLoadError(f"The recogniser '{files[-1].name}' has {outputs} outputs for {len(letters)} letters.")
    return session, letters
