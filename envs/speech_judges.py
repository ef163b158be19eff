"""Judges of speech for `speech-mos`: predicted opinion scores, and what a recogniser understands."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from flowrl.envs.speech_voice import HEARD, package

STRIDE, EDGE = 320, 16
"""Values per frame of the network of `Opinion`, and frames of silence after a sound that can still tell of it: more
than its convolutions reach."""


class Opinion:
    """Mean opinion score, from 1 to 5, that `distillmos` predicts (weights in the package, MIT).

    The network hears 7.68 s, most of it the silence that is put after a short sound. What its convolutions make of
    silence is always the same and is computed once: a third of the cost, with the same result.

    Args:
        dtype: Type that the convolutions, most of the cost, compute in.

    Raises:
        ConfigError: The extra is not installed.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        with _without_torchaudio(), contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights lie
            made = package("distillmos", "distillmos").ConvTransformerSQAModel()
            self.length = package("distillmos.sqa", "distillmos").SEQ_LEN
        self.model = made.eval().requires_grad_(False)
        with torch.no_grad():
            self.silence = self._features(torch.zeros(1, self.length))

    @torch.no_grad()
    def __call__(self, sounds: torch.Tensor) -> torch.Tensor:
        """Predict scores (B,) of sounds (B, N) at 16 kHz; of longer ones than it hears, of the beginning."""
        heard = sounds[:, : self.length]
        heard = heard / heard.abs().amax(1, keepdim=True).clamp_min(1e-8)
        frames = -(-heard.shape[1] // STRIDE) + EDGE
        used = min((frames + EDGE) * STRIDE, self.length)
        features = self._features(torch.nn.functional.pad(heard, (0, used - heard.shape[1])))
        if used < self.length:
            rest = self.silence[:, :, frames:].expand(len(heard), -1, -1)
            features = torch.cat([features[:, :, :frames], rest], dim=2)
        return 1 + 4 * self.model.transformer_pool_attn(features.permute(0, 2, 1)).view(len(sounds))

    def _features(self, heard: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.model.cnn(heard).float()


@contextlib.contextmanager
def _without_torchaudio() -> Any:
    """Make a context in which an empty module stands for torchaudio, where it cannot be imported.

    `distillmos` imports it to read files, which nobody does here; the one of the package index needs the libraries of
    CUDA, and fails beside a torch without them.
    """
    stands_in = "torchaudio" not in sys.modules
    if stands_in:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        yield
    finally:
        if stands_in:
            del sys.modules["torchaudio"]


class Dnsmos:
    """Overall score, from 1 to 5, of DNSMOS P.835 (Reddy et al. 2022) by `speechmos` (weights in the package, MIT).

    A sound is repeated until it fills the 9.01 s that the network hears. The package doubles it until it is at least as
    long and averages windows a second apart, of what is mostly the same sound again: up to nine times the cost.

    Raises:
        ConfigError: The extra is not installed.
    """

    def __init__(self) -> None:
        self.module = package("speechmos.dnsmos", "speechmos")
        onnxruntime = package("onnxruntime", "onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        path = Path(self.module.__file__).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, sounds: Sequence[torch.Tensor]) -> torch.Tensor:
        """Predict scores (B,) of sounds (N,), 16 kHz, each of its own length."""
        return torch.tensor([self._score(sound) for sound in sounds])

    def _score(self, sound: torch.Tensor) -> float:
        window = int(self.module.INPUT_LENGTH * HEARD)
        heard = sound.clamp(-1, 1).float().repeat(-(-window // len(sound)))[:window]
        raw = self.session.run(None, {"input_1": heard.numpy()[None]})[0][0]
        return float(self.module.DNSMOS.get_polyfit_val(None, *raw, False)[2])


class Recogniser:
    """Words that `pocketsphinx` understands with the English models in its package (BSD).

    Raises:
        ConfigError: The extra is not installed.
    """

    def __init__(self) -> None:
        self.decoder = package("pocketsphinx", "pocketsphinx").Decoder(samprate=HEARD, loglevel="FATAL")

    def __call__(self, sound: torch.Tensor) -> list[str]:
        """Understand a sound (N,) at 16 kHz."""
        self._hear(sound)
        found = self.decoder.hyp()
        return words_of(found.hypstr) if found else []

    def align(self, sound: torch.Tensor, text: str) -> list[tuple[float, float]]:
        """Find where the words of `text`, which is what is said, begin and end in a sound (N,), in seconds."""
        self.decoder.set_align_text(" ".join(words_of(text)))
        self._hear(sound)
        rate = self.decoder.config["frate"]
        spans = [(s.start_frame / rate, (s.end_frame + 1) / rate) for s in self.decoder.seg() if s.word[0] != "<"]
        self.decoder.activate_search("_default")
        return spans

    def _hear(self, sound: torch.Tensor) -> None:
        values = (sound / sound.abs().max().clamp_min(1e-8) * 20_000).round().short().numpy()
        self.decoder.start_utt()
        self.decoder.process_raw(values.astype("<i2").tobytes(), full_utt=True)
        self.decoder.end_utt()


def words_of(text: str) -> list[str]:
    """Split a text into words in small letters, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def word_errors(said: Sequence[str], heard: Sequence[str]) -> float:
    """Compute the word error rate: substitutions, deletions and insertions for each word said."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said):
        last, row[0] = row[:], i + 1
        for j, other in enumerate(heard):
            row[j + 1] = min(last[j] + (word != other), last[j + 1] + 1, row[j] + 1)
    return row[-1] / max(len(said), 1)
