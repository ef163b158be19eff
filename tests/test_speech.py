"""Environment `speech-mos`: vocoder, voice, judges and environment, around a synthesiser and listeners of the test."""

from __future__ import annotations

import json
import math
import wave
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import flowrl
from flowrl.envs import speech
from flowrl.envs.speech_data import BASE, EACH, LEVEL, SENTENCES, TEXTS, WORDS, perturbed
from flowrl.envs.speech_judges import Dnsmos, Opinion, Recogniser, word_errors, words_of
from flowrl.envs.speech_pictures import SIZE, melodies
from flowrl.envs.speech_voice import HEARD, Voice, between, pitch_and_rate, resampled, spoken_prosody
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.functional.vocoder import BINS, HIGHEST, HOP, RATE, Frames, filled_pitch, pulses, synthesise, warp
from flowrl.models.loading import source_of
from flowrl.models.prosody import ProsodyFlow
from flowrl.pages.html import player
from flowrl.pages.run_files import RunFiles
from flowrl.pages.training_charts import before_after
from flowrl.runs.media import save_sounds


def needs(module: str) -> None:
    """Skip a test whose package is not installed."""
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed (extra [speech])")


def tone(n: int, pitch: float = BASE, level: float = 0.0) -> Frames:
    """An utterance of n frames that is its train of pulses, at one pitch."""
    silent, plain = torch.full((BINS, n), -100.0), torch.zeros(BINS, n)
    return Frames(plain + level, plain, silent, silent, plain, torch.full((n,), pitch))


class Humming:
    """A synthesiser that hums every sentence at BASE Hz."""

    def __call__(self, text: str, speed: float = 1.0) -> Frames:
        edges = next(sentence.edges for sentence in SENTENCES if sentence.text == text)
        return tone(edges[-1] + 10)


def loudness(sounds: torch.Tensor) -> torch.Tensor:
    """A listener who likes loud sounds."""
    return sounds.square().mean(1)


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voice(Humming)


@pytest.fixture(scope="module")
def env(voice: Voice) -> speech.SpeechEnv:
    def dnsmos() -> Any:
        return lambda sounds: torch.tensor([4.0 if len(sound) > 0 else 0.0 for sound in sounds])

    def recogniser() -> Any:
        return lambda sound: ["my", "sister", "plays", "the", "piano"]

    return speech.SpeechEnv(source_of("speech"), voice, loudness, dnsmos, recogniser)


def own(voice: Voice, texts: list[str]) -> torch.Tensor:
    return torch.stack([voice.say(text)[1] for text in texts])


def test_pulses_are_the_sum_of_all_harmonics() -> None:
    pitch = 400.0
    angle = 2 * math.pi * pitch / RATE * (torch.arange(6 * HOP, dtype=torch.float64) + 1)
    expected = sum((h * angle).cos() for h in range(1, int(HIGHEST / pitch) + 1))
    torch.testing.assert_close(pulses(torch.full((1, 6), pitch))[0], expected.float(), atol=2e-2, rtol=0)
    assert pulses(torch.zeros(1, 4)).abs().max() == 0


def test_a_flat_envelope_gives_the_pulses_back() -> None:
    n = 20
    frames, places, gain = tone(n, level=math.log(HOP)), torch.arange(n).float()[None], torch.full((1, n), 0.5)
    made = synthesise(frames, places, frames.pitch[None], gain, torch.zeros(BINS, n, dtype=torch.complex64))
    expected = 0.5 * pulses(frames.pitch[None])
    inner = slice(3 * HOP, -3 * HOP)
    torch.testing.assert_close(made[:, inner], expected[:, inner], atol=1e-2, rtol=1e-3)


def test_warp_finds_the_places_of_frames() -> None:
    even = warp(torch.ones(1, 5), 7)
    assert even[0].tolist() == pytest.approx([0, 1, 2, 3, 4, 4, 4])
    slow = warp(torch.full((1, 4), 2.0), 8)[0]
    assert slow.tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_pitch_is_filled_where_there_is_none() -> None:
    filled = filled_pitch(torch.tensor([0.0, 100.0, 0.0, 0.0, 400.0, -1.0]))
    assert filled.tolist() == pytest.approx([100, 100, 200, 300, 400, 400])
    assert filled_pitch(torch.zeros(3)).tolist() == [40.0] * 3


def test_values_between_words() -> None:
    found = between(torch.tensor([[0.0, 3.0]]), torch.tensor([1.0, 4.0]), 6)
    assert found[0].tolist() == pytest.approx([0, 0, 1, 2, 3, 3])


def test_resampling_keeps_a_tone() -> None:
    time = torch.arange(2400) / 24_000
    sound = (2 * math.pi * 1000 * time).sin()[None]
    expected = (2 * math.pi * 1000 * torch.arange(1600) / 16_000).sin()[None]
    torch.testing.assert_close(resampled(sound, 2 / 3), expected, atol=1e-4, rtol=0)


def frequency(sound: torch.Tensor) -> float:
    """Highest frequency in Hz, from 100 to 450, at which a sound repeats itself nearly as well as at any."""
    x = sound.numpy()
    lags = np.arange(HEARD // 450, HEARD // 100)
    alike = np.array([np.dot(x[:-lag], x[lag:]) for lag in lags])
    first = int(np.argmax(alike > 0.8 * alike.max()))
    return HEARD / float(lags[first + np.argmax(alike[first : first + 3])])


def test_a_voice_says_words_as_long_and_as_high_as_asked(voice: Voice) -> None:
    text, edges = TEXTS[0], SENTENCES[0].edges
    plain = own(voice, [text])
    assert plain[0, 0].tolist() == pytest.approx([0] * WORDS, abs=1e-4)
    assert plain[0, 1, 0].item() == pytest.approx(math.log2((edges[1] - edges[0]) / 80))
    higher, longer = plain.clone(), plain.clone()
    higher[:, 0] += 7
    longer[:, 1] += 1
    sounds = voice.speak(torch.cat([plain, higher, longer]), [text] * 3)
    middle = slice(HEARD // 2, HEARD)
    assert frequency(sounds[0, middle]) == pytest.approx(200, rel=0.02)
    assert frequency(sounds[1, middle]) == pytest.approx(200 * 2 ** (7 / 12), rel=0.02)
    ends = [int((sound.abs() > 0.01).nonzero().max()) / 200 for sound in sounds]  # frames are 200 values long
    assert ends[0] == pytest.approx(edges[-1] + 10, abs=3)
    assert ends[2] - ends[0] == pytest.approx(edges[-1] - edges[0], abs=3)
    assert (sounds[0, int(ends[0] + 20) * 200 :] == 0).all()


def test_louder_words(voice: Voice) -> None:
    text, edges = TEXTS[0], SENTENCES[0].edges
    loud = own(voice, [text])
    loud[:, 2] = 6.0
    plain, louder = voice.speak(torch.cat([own(voice, [text]), loud]), [text] * 2)
    word = slice(edges[4] * 200, edges[5] * 200)
    assert (louder[word].norm() / plain[word].norm()).item() == pytest.approx(10 ** (6 / 20), rel=0.01)


def test_a_sound_does_not_depend_on_its_batch(voice: Voice) -> None:
    texts = [TEXTS[i % 4] for i in range(6)]
    prosodies = perturbed(own(voice, texts), torch.Generator().manual_seed(0))
    together = voice.speak(prosodies, texts)
    for i in (0, 5):
        alone = voice.speak(prosodies[i : i + 1], texts[i : i + 1])[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=2e-3, rtol=0)
        assert together[i, len(alone) :].abs().sum() == 0


def test_a_voice_knows_its_sentences_only(voice: Voice) -> None:
    with pytest.raises(ConfigError, match=r"cannot say 'Hello there\.', only 'She has"):
        voice.speak(torch.zeros(1, 3, WORDS), ["Hello there."])


def test_prosody_of_frames() -> None:
    frames = tone(30, pitch=2 * BASE)
    found = spoken_prosody(frames, (0, 10, 30))
    assert found[0].tolist() == pytest.approx([12, 12])
    assert found[1].tolist() == pytest.approx([-3, -2])
    pitch, rate = pitch_and_rate(torch.stack([torch.full((3, WORDS), -1.0)]))
    assert (pitch.item(), rate.item()) == pytest.approx((-1, 2))


def test_random_prosodies_are_spread_as_stated() -> None:
    drawn = perturbed(torch.zeros(4000, 3, WORDS), torch.Generator().manual_seed(0))
    stated = [math.hypot(level, each) for level, each in zip(LEVEL, EACH)]
    assert drawn.std(0).mean(1).tolist() == pytest.approx(stated, rel=0.04)
    assert drawn.mean(2).std(0)[0].item() == pytest.approx(math.hypot(LEVEL[0], EACH[0] / math.sqrt(WORDS)), rel=0.05)


@pytest.mark.parametrize(
    ("said", "heard", "rate"),
    [
        ("a b c d", "a b c d", 0),
        ("a b c d", "a x c d", 0.25),
        ("a b c d", "a d", 0.5),
        ("a b", "c a b d", 1),
        ("a", "", 1),
    ],
)
def test_word_error_rate(said: str, heard: str, rate: float) -> None:
    assert word_errors(said.split(), heard.split()) == rate


def test_words_of_a_text() -> None:
    assert words_of("The man's fall, broken!") == ["the", "man's", "fall", "broken"]


def test_the_reward_is_the_listeners(env: speech.SpeechEnv) -> None:
    prosodies = own(env.voice, list(TEXTS)).repeat(5, 1, 1)
    prosodies[:, 2] = torch.linspace(-5, 5, 20)[:, None]
    ids = torch.arange(20) % 4
    output = env.evaluate(prosodies, ids)
    expected = loudness(env.voice.speak(prosodies[:3], [env.contexts[i] for i in ids[:3]]))
    assert output.reward[:3].tolist() == pytest.approx(expected.tolist(), rel=0.2)  # silence after it counts here
    assert (output.reward[4:] > output.reward[:-4]).all()
    assert output.components["pitch"].tolist() == pytest.approx([0] * 20, abs=1e-4)


def test_judges(env: speech.SpeechEnv) -> None:
    errors = env.errors(own(env.voice, list(TEXTS)), TEXTS)
    assert errors["DNSMOS below 5"].tolist() == [1.0] * 4
    assert errors["word error rate"].tolist() == pytest.approx([1, 1, 1, 0.2])


def test_narrowness(env: speech.SpeechEnv) -> None:
    contexts = list(TEXTS) * 200
    wide = perturbed(own(env.voice, contexts), torch.Generator().manual_seed(0))
    found = env.errors_of_all(wide, contexts, 0)
    assert list(found.values()) == pytest.approx([1, 1], rel=0.05)
    half = own(env.voice, contexts) + (wide - own(env.voice, contexts)) / 2
    assert list(env.errors_of_all(half, contexts, 0).values()) == pytest.approx([2, 2], rel=0.05)
    without = [i for i, context in enumerate(contexts) if context != TEXTS[0]]
    some = env.errors_of_all(wide[without], [contexts[i] for i in without], 0)
    single = [0, *without]  # a sample of the first sentence, which has no spread
    assert env.errors_of_all(wide[single], [contexts[i] for i in single], 0) == pytest.approx(some)
    assert all(map(math.isnan, env.errors_of_all(wide[:4], list(TEXTS), 0).values()))


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "find_spec", lambda name: None if name == "hibari" else SimpleNamespace())
    with pytest.raises(
        ConfigError, match=r"needs hibari-tts, which is not installed: pip install 'flowrl-torch\[speech"
    ):
        flowrl.make("speech-mos")


def test_a_flow_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "find_spec", lambda name: SimpleNamespace())
    with pytest.raises(ConfigError, match=r"prosodies of shape \(3, 5\), not \(50,\)"):
        flowrl.make("speech-mos", flow="plans")


def test_the_shipped_flow_draws_prosodies_of_the_data() -> None:
    flow = source_of("speech").load()
    assert isinstance(flow, ProsodyFlow)
    assert flow.sentences == list(TEXTS)
    x = torch.randn(3, 3, WORDS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow.encode_samples(flow.decode(x)), x)
    noise = torch.randn(256, 3, WORDS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for i in range(10):
            t = torch.full((256,), i / 10)
            noise = noise + flow(noise, t, flow.encode([TEXTS[1]] * 256)) / 10
    spread = flow.decode(noise).std(0).mean(1)
    stated = [math.hypot(level, each) for level, each in zip(LEVEL, EACH)]
    assert spread.tolist() == pytest.approx(stated, rel=0.2)
    with pytest.raises(ConfigError, match="none of 'Hello'"):
        flow.encode(["Hello"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"words": 0}, "words must be from 1"),
        ({"scale": [1.0, 0.0, 1.0]}, "scale positive"),
        ({"scale": 3}, "as many numbers"),
        ({"sentences": ["a", "a"]}, "different texts"),
        ({"width": "wide"}, "width must be"),
    ],
)
def test_a_damaged_folder(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    right = {"model": "prosody", "sentences": ["a", "b"], "words": 5, "centre": [0.0] * 3, "scale": [1.0] * 3}
    (tmp_path / "config.json").write_text(json.dumps({**right, "width": 8, "depth": 1, **wrong}))
    with pytest.raises(ModelLoadError, match=message):
        source_of(str(tmp_path))


def test_pictures_show_pitch_and_length(env: speech.SpeechEnv) -> None:
    prosody = torch.zeros(2, 3, WORDS)
    prosody[:, 1] = -1.0  # half a second each
    prosody[1, 0] = 6.0
    drawn = melodies(prosody)
    assert drawn.shape == (2, 1, *SIZE)
    rows = [(picture[0] < 0.5).nonzero()[:, 0].float().mean().item() for picture in drawn]
    assert rows[0] - rows[1] == pytest.approx((SIZE[0] - 4) / 4, abs=1)
    assert (drawn[0, 0] < 0.5).any(0).nonzero().max().item() == pytest.approx(2.5 / 3.2 * SIZE[1], abs=2)
    assert env.shows_images


def test_sounds_before_and_after(env: speech.SpeechEnv, tmp_path: Path) -> None:
    contexts = [TEXTS[0], TEXTS[0], TEXTS[2]]
    before = own(env.voice, contexts)
    result: Any = SimpleNamespace(samples=before + 1, reference_samples=before, sample_contexts=contexts)
    (folder,) = save_sounds(result, env, tmp_path / "sounds")
    assert sorted(path.name for path in folder.iterdir()) == [
        "0-after.wav", "0-before.wav", "1-after.wav", "1-before.wav", "contexts.json",
    ]  # fmt: skip
    with wave.open(str(folder / "1-before.wav")) as file:
        assert (file.getframerate(), file.getnchannels()) == (HEARD, 1)
        assert file.getnframes() > HEARD
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "before_after.png").write_bytes(b"x")
    run = RunFiles.read(tmp_path)
    shown = before_after(run)
    assert shown.count("<audio controls") == 4
    assert player((folder / "1-after.wav").read_bytes()) in shown
    assert TEXTS[2] in shown
    (folder / "0-after.wav").unlink()
    with pytest.raises(ConfigError, match=r"sounds in .* are damaged"):
        RunFiles.read(tmp_path)


@pytest.fixture(scope="module")
def spoken() -> tuple[Voice, torch.Tensor]:
    """What the real synthesiser says by itself."""
    needs("hibari")
    voice = Voice()
    return voice, voice.speak(own(voice, list(TEXTS)), TEXTS)


def test_the_voice_says_what_the_synthesiser_says(spoken: tuple[Voice, torch.Tensor]) -> None:
    """But for noise: magnitudes of the spectrum, and where words are."""
    hibari = pytest.importorskip("hibari")
    theirs = torch.from_numpy(hibari.Hibari()(TEXTS[0], seed=0))[None]
    theirs = resampled(theirs, HEARD / RATE)[0]
    mine = spoken[1][0, : len(theirs)]
    window = torch.hann_window(512)
    a, b = (torch.stft(sound, 512, window=window, return_complex=True).abs() for sound in (mine, theirs))
    assert ((a - b).square().sum() / b.square().sum()).item() < 0.02


def test_the_recogniser_understands_the_voice(spoken: tuple[Voice, torch.Tensor]) -> None:
    needs("pocketsphinx")
    recogniser = Recogniser()
    for sentence, sound in zip(SENTENCES, spoken[1]):
        assert word_errors(words_of(sentence.text), recogniser(sound)) == 0
        spans = recogniser.align(sound, sentence.text)
        starts = [start * RATE / HOP for start, _ in spans]
        assert starts == pytest.approx(list(sentence.edges[:-1]), abs=3)


def test_opinion_is_the_packages(spoken: tuple[Voice, torch.Tensor]) -> None:
    """Silence that is computed once changes nothing; bfloat16 little."""
    needs("distillmos")
    opinion = Opinion()
    padded = torch.nn.functional.pad(spoken[1], (0, opinion.length - spoken[1].shape[1]))
    with torch.no_grad():
        expected = opinion.model(padded)[:, 0]
    torch.testing.assert_close(opinion(spoken[1]), expected, atol=1e-4, rtol=0)
    assert expected.min() > 3.5
    opinion.dtype = torch.bfloat16
    torch.testing.assert_close(opinion(spoken[1]), expected, atol=0.1, rtol=0)


def test_dnsmos_is_the_packages(spoken: tuple[Voice, torch.Tensor]) -> None:
    """Of a sound that fills its window; of a shorter one it is that of the sound repeated."""
    module = pytest.importorskip("speechmos.dnsmos")
    judge, sound = Dnsmos(), spoken[1][0]
    window = int(module.INPUT_LENGTH * HEARD)
    long = sound.repeat(9)[:window]
    raw = judge.session.run(None, {"input_1": long.numpy()[None]})[0][0]
    expected = module.DNSMOS.get_polyfit_val(None, *raw, False)[2]
    assert judge([sound, long]).tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert 2 < expected < 4.5
