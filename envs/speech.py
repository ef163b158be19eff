"""Speech judged by a learned listener: prosodies of sentences, rewarded by predicted opinions of what they sound like.

A sample is a prosody: pitch, length and loudness of every word. A synthesiser says the sentence with it, and a network
that was trained on people's opinions of recordings says how good that sounds. Evaluations ask other judges (`errors`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch

from flowrl.envs.base import GenerationEnv
from flowrl.envs.speech_data import EACH, LEVEL, ROWS, TEXTS, WORDS
from flowrl.envs.speech_judges import Dnsmos, Opinion, Recogniser, word_errors, words_of
from flowrl.envs.speech_pictures import melodies
from flowrl.envs.speech_voice import HEARD, Voice, pitch_and_rate
from flowrl.errors import ConfigError
from flowrl.models.loading import FlowSource, source_of
from flowrl.registry import EnvSpec
from flowrl.types import Contexts, RewardOutput

PACKAGES = {"hibari": "hibari-tts"} | {name: name for name in ("distillmos", "speechmos", "pocketsphinx")}
"""Modules of the extra [speech], and their packages."""
AT_ONCE = 1
"""Sounds that the listener hears together: one, so that a score does not depend on the others of a batch."""
PERFECT = 5.0
"""Best opinion score."""


class SpeechEnv(GenerationEnv):
    """One-step environment whose sample is a prosody (3, WORDS) of a sentence; see `flowrl.envs.speech_data.ROWS`.

    Components are `pitch`, the mean of a sample's words in semitones above 200 Hz, and `rate`, in words per second.

    Args:
        flow: Source of the flow.
        voice: Says a sentence with a prosody.
        opinion: Predicts opinion scores (B,) of sounds (B, N) at 16 kHz.
        dnsmos: Makes the unseen judge of sounds, each (N,) at 16 kHz; called by the first evaluation.
        recogniser: Makes what understands words of such a sound; likewise.
    """

    def __init__(
        self,
        flow: FlowSource,
        voice: Voice,
        opinion: Callable[[torch.Tensor], torch.Tensor],
        dnsmos: Callable[[], Callable[..., torch.Tensor]] = Dnsmos,
        recogniser: Callable[[], Callable[[torch.Tensor], list[str]]] = Recogniser,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(flow, contexts=TEXTS, low=-12.0, high=12.0, name="speech-mos", render_mode=render_mode)
        self.renderer, self.sound_rate = melodies, HEARD
        self.voice, self.opinion = voice, opinion
        self._make_judges = dnsmos, recogniser
        self._judges: tuple[Any, ...] = ()

    def sounds(self, samples: torch.Tensor, contexts: Contexts) -> torch.Tensor:
        """Say sentences with prosodies (B, 3, WORDS): sounds (B, 1, N), 16 kHz, on the CPU."""
        return self.voice.speak(samples, contexts)[:, None]

    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Predict the mean opinion score (B,), from 1 to 5, of what prosodies sound like; without a gradient."""
        samples = samples.detach()
        spoken = [
            self.opinion(self.voice.speak(part, contexts[i * AT_ONCE : (i + 1) * AT_ONCE]))
            for i, part in enumerate(samples.split(AT_ONCE))
        ]
        pitch, rate = pitch_and_rate(samples)
        return RewardOutput(torch.cat(spoken).to(samples.device), {"pitch": pitch, "rate": rate})

    def errors(self, samples: torch.Tensor, contexts: Contexts) -> dict[str, torch.Tensor]:
        """Ask the judges that the reward never saw (B,).

        `DNSMOS below 5`: what its overall score lacks; `word error rate`: of the recogniser against the sentence.
        """
        if not self._judges:
            self._judges = tuple(make() for make in self._make_judges)
        dnsmos, recogniser = self._judges
        with torch.no_grad():
            sounds = [self.voice.speak(samples[i : i + 1], [context])[0] for i, context in enumerate(contexts)]
        wrong = [word_errors(words_of(context), recogniser(sound)) for context, sound in zip(contexts, sounds)]
        found = {"DNSMOS below 5": PERFECT - dnsmos(sounds), "word error rate": torch.tensor(wrong)}
        return {name: value.float().to(samples.device) for name, value in found.items()}

    def errors_of_all(self, samples: torch.Tensor, contexts: Contexts, seed: int) -> dict[str, float]:
        """Measure how much narrower than in the data the samples of a sentence are spread: 1 is as wide, 2 half.

        `narrowness of pitch`: of the mean pitches of words; `narrowness of rate`: of the logarithms of their lengths.
        A sentence with a single sample has no spread and does not count; NaN where all are such.
        """
        values = samples.detach().double().cpu()
        spreads = []
        for text in dict.fromkeys(contexts):
            mine = values[[context == text for context in contexts]]
            if len(mine) > 1:
                spreads.append(mine.var(0).mean(1))
        spread = torch.stack(spreads).mean(0).sqrt() if spreads else torch.full((len(ROWS),), torch.nan)
        data = (torch.tensor(LEVEL).square() + torch.tensor(EACH).square()).sqrt()
        narrow = data / spread.clamp_min(1e-6)
        return {f"narrowness of {name}": narrow[i].item() for i, name in enumerate(("pitch", "rate"))}

    def describe(self) -> list[str]:
        """Write lines for the head of a run."""
        return [*super().describe(), f"reward: opinion score predicted by distillmos, of {len(TEXTS)} sentences"]


@dataclass(frozen=True)
class SpeechConfig:
    """Settings of `speech-mos`."""

    flow: str = "speech"
    """Flow to fine-tune: "speech" (shipped), or a folder that `pretrain/speech.py` wrote."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Type that the listener's convolutions compute in: half their time, and scores differ by less than 0.1."""


@lru_cache(maxsize=2)
def _loaded(precision: str) -> tuple[Voice, Opinion]:
    return Voice(), Opinion(getattr(torch, precision))


def _make(config: SpeechConfig) -> SpeechEnv:
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"'speech-mos' needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'flowrl-torch[speech]'."
        )
    source = source_of(config.flow)
    if source.sample_shape != (len(ROWS), WORDS) or source.is_media:
        raise ConfigError(
            f"'speech-mos' needs a flow of prosodies of shape ({len(ROWS)}, {WORDS}), not {source.sample_shape}."
        )
    return SpeechEnv(source, *_loaded(config.precision))


RECOMMENDED: Mapping[str, Any] = {
    # a sample costs a hundred times what a gradient step does: few samples, gone over often
    "n_samples": 64,
    "batch_size": 64,
    "n_epochs": 16,
    "rollout_steps": 10,
    "learning_rate": 1e-3,
    "ema_decay": 0.9,
    "endpoint.standardise": "group",
    "endpoint.tau": 2.5,
    "endpoint.alpha": 0.1,
    "endpoint-free.standardise": "group",
    "endpoint-kl.standardise": "group",
    "mixture.reward_units": "std",
    "mixture.tau": 3.0,
    "mixture.pool": 256,
    "steps.group_size": 8,
    "steps.n_epochs": 4,
}

SPECS = [
    EnvSpec(
        name="speech-mos",
        differentiable=False,
        factory=_make,
        config=SpeechConfig(),
        recommended=lambda config: RECOMMENDED,
        total_timesteps=768,
        summary="prosody of a sentence, word by word: sound good to a learned listener (extra [speech])",
    )
]
