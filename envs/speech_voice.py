"""Speech of `speech-mos`: a synthesiser whose prosody is set word by word."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from flowrl.envs.speech_data import BASE, ROWS, SENTENCES, WORDS, Sentence
from flowrl.errors import ConfigError
from flowrl.functional.vocoder import BINS, HOP, LOWEST, RATE, Frames, at_each, filled_pitch, synthesise, warp

HEARD = 16_000
"""Values per second of what listeners hear."""
MARGIN, MULTIPLE = 8, 16
"""Frames after the end of an utterance, and what the number of frames is a multiple of: a sound then hardly depends on
the others of its batch."""
HIGHEST_PITCH, LARGEST_STRETCH, LARGEST_GAIN = 12.0, 1.0, 12.0
"""Semitones around `BASE`, octaves of a word's length and dB: a prosody beyond is taken as one at the bound."""
AT_ONCE = 16
"""Utterances synthesised together: each takes some 10 MB."""


class Synthesiser(Protocol):
    """What says a sentence: `synthesiser(text, speed) -> Frames`."""

    def __call__(self, text: str, speed: float = 1.0) -> Frames:
        """Say `text` at `speed` times the usual pace."""


def package(name: str, of: str) -> Any:
    """Import a package of the extra [speech].

    Raises:
        ConfigError: It is not installed, or cannot be imported; says the remedy.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"The environment 'speech-mos' needs {of}: pip install 'flowrl-torch[speech]' "
            f"({type(error).__name__}: {error})."
        ) from error


class Hibari:
    """The voice "heart" of `hibari-tts`, whose weights are in the package (Apache-2.0).

    Raises:
        ConfigError: The extra is not installed.
    """

    def __init__(self) -> None:
        self.model = package("hibari", "hibari-tts").Hibari(threads=1)

    def __call__(self, text: str, speed: float = 1.0) -> Frames:
        """Say one sentence."""
        import numpy as np

        (phonemes,) = self.model.phonemize(text)
        inputs = {"ids": np.asarray([self.model.ids(phonemes)], np.int64), "speed": np.asarray([speed], np.float32)}
        outputs = [torch.from_numpy(output[0]) for output in self.model.sess.run(None, inputs)]
        return Frames(*outputs)


def spoken_prosody(frames: Frames, edges: Sequence[int]) -> torch.Tensor:
    """Measure the prosody (3, WORDS) with which the synthesiser itself says words between these edges."""
    semitones = 12 * (filled_pitch(frames.pitch) / BASE).log2()
    pairs = list(pairwise(edges))
    pitch = [semitones[a:b].mean() for a, b in pairs]
    duration = [math.log2((b - a) * HOP / RATE) for a, b in pairs]
    return torch.stack([torch.stack(pitch), torch.tensor(duration), torch.zeros(len(pairs))])


class Voice:
    """Sentences said with any prosody, each word in its own: batched, differentiable and always the same.

    The synthesiser says each sentence once. Its frames are then drawn out or shortened word by word, its pitch is
    moved by what is interpolated linearly between the middles of words, as is its loudness, and a vocoder makes the
    waveform. Silence before and after stays as it is.

    Args:
        synthesiser: Makes what says a sentence; called when the first one is said.
        sentences: Those that can be said.
    """

    def __init__(
        self, synthesiser: Callable[[], Synthesiser] = Hibari, sentences: Sequence[Sentence] = SENTENCES
    ) -> None:
        self.make, self.sentences = synthesiser, {sentence.text: sentence for sentence in sentences}
        self.said: dict[str, tuple[Frames, torch.Tensor]] = {}

    def say(self, text: str) -> tuple[Frames, torch.Tensor]:
        """Give the frames of a sentence and the synthesiser's own prosody (3, WORDS).

        Raises:
            ConfigError: A sentence whose words nobody has found.
        """
        if text not in self.sentences:
            raise ConfigError(
                f"'speech-mos' cannot say {str(text)[:80]!r}, only {', '.join(map(repr, self.sentences))}: it must "
                "know where words begin. Add yours to envs/speech_data.py and train a flow by pretrain/speech.py."
            )
        if not self.said:
            synthesiser = self.make()
            for name, sentence in self.sentences.items():
                frames = synthesiser(name)
                self.said[name] = frames, spoken_prosody(frames, sentence.edges)
        return self.said[text]

    def speak(self, prosodies: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Say sentences: waveforms (B, N), 16 kHz, silent after their ends, on the CPU.

        Args:
            prosodies: (B, 3, WORDS); see `flowrl.envs.speech_data.ROWS`. Gradients flow through them.
            texts: A sentence for each.
        """
        prosodies = prosodies.float().cpu()
        of: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            of.setdefault(text, []).append(i)
        order, parts = [], []
        for text, rows in of.items():
            for k in range(0, len(rows), AT_ONCE):
                order += rows[k : k + AT_ONCE]
                parts.append(self._spoken(prosodies[rows[k : k + AT_ONCE]], text))
        longest = max(part.shape[1] for part in parts)
        sounds = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])
        return sounds[torch.tensor(order).argsort()]

    def _spoken(self, prosodies: torch.Tensor, text: str) -> torch.Tensor:
        frames, own = self.say(text)
        edges = self.sentences[text].edges
        pitch = prosodies[:, 0].clamp(-HIGHEST_PITCH, HIGHEST_PITCH) - own[0]
        stretch = (prosodies[:, 1] - own[1]).clamp(-LARGEST_STRETCH, LARGEST_STRETCH)
        gain = prosodies[:, 2].clamp(-LARGEST_GAIN, LARGEST_GAIN)
        n = len(frames)
        counts = torch.tensor([edges[0], *(b - a for a, b in pairwise(edges)), n - edges[-1]])
        around = torch.nn.functional.pad(stretch, (1, 1))
        lengths = (2**around).repeat_interleave(counts, dim=1)
        total = lengths.sum(1, keepdim=True)
        wanted = -(-(math.ceil(total.max().item()) + MARGIN) // MULTIPLE) * MULTIPLE
        places = warp(lengths, wanted)
        middles = torch.tensor([(a + b) / 2 for a, b in pairwise(edges)])
        contour = filled_pitch(frames.pitch).log2() + between(pitch, middles, n) / 12
        voiced = (frames.pitch > LOWEST)[places.detach().round().long()]
        sounding = (torch.arange(wanted) + 0.5) < total
        f0 = 2 ** at_each(contour, places) * voiced * sounding
        loud = 10 ** (at_each(between(gain, middles, n), places) / 20) * sounding
        sounds = resampled(synthesise(frames, places, f0, loud, hiss(wanted)), HEARD / RATE)
        heard = (total + MARGIN) * (HOP * HEARD / RATE)  # resampling leaves traces in silence, which a listener hears
        return torch.where(torch.arange(sounds.shape[1]) < heard, sounds, 0.0)


def between(values: torch.Tensor, middles: torch.Tensor, n: int) -> torch.Tensor:
    """Interpolate values (B, k) at increasing places (k,) linearly to 0, ..., n - 1: (B, n); constant beyond."""
    places = torch.arange(n).float()
    right = torch.searchsorted(middles, places).clamp(1, len(middles) - 1)
    a, b = middles[right - 1], middles[right]
    share = ((places - a) / (b - a)).clamp(0, 1)
    return values[:, right - 1] + share * (values[:, right] - values[:, right - 1])


def hiss(n: int) -> torch.Tensor:
    """Give the noise of the vocoder, complex (BINS, n): always the same."""
    drawn = torch.randn(n, 2, BINS, generator=torch.Generator().manual_seed(0))
    return torch.complex(drawn[:, 0], drawn[:, 1]).T


def resampled(sounds: torch.Tensor, factor: float) -> torch.Tensor:
    """Resample sounds (B, N), silent at both ends, to a lower rate: N * factor values, a whole number."""
    n = round(sounds.shape[1] * factor)
    return torch.fft.irfft(torch.fft.rfft(sounds)[:, : n // 2 + 1], n) * factor


def pitch_and_rate(prosodies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give mean pitches (B,) in semitones above BASE and rates (B,) in words per second of prosodies (B, 3, WORDS)."""
    assert prosodies.shape[1:] == (len(ROWS), WORDS)
    return prosodies[:, 0].mean(1), WORDS / (2 ** prosodies[:, 1].clamp(-10, 10)).sum(1)
