"""The text reward: its likelihood by brute force, and pictures of words that Pillow draws."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from flowrl.envs.prompts import Prompt
from flowrl.envs.rewards import make_reward
from flowrl.envs.rewards.ocr import LEAST, OCRReward, asked_text, log_likelihood
from flowrl.errors import ConfigError

WORDS = ["CAT", "DOG", "sun", "HELLO", "box", "TREE"]


def picture(word: str, y: float = 0.5, ink: tuple[int, int, int] = (255, 255, 255), size: int = 64) -> torch.Tensor:
    image = Image.new("RGB", (size, size), (40, 60, 120))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=size * 0.28)
    left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
    draw.text(((size - right - left) / 2, size * y - (bottom + top) / 2), word, fill=ink, font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return make_reward("ocr")


def test_likelihood_by_all_ways_to_spell() -> None:
    probability = torch.rand(2, 4, 3).softmax(2)
    target = torch.tensor([1, 2])
    total = torch.zeros(2)
    for path in itertools.product(range(3), repeat=4):
        spelled = [k for k, _ in itertools.groupby(path) if k != 0]
        if spelled == [1, 2]:
            total += torch.stack([probability[:, t, k] for t, k in enumerate(path)]).prod(0)
    expected = total.log() / 2
    torch.testing.assert_close(log_likelihood(probability, [target, target]), expected, rtol=1e-4, atol=1e-5)


def test_likelihood_stays_finite_where_the_text_is_impossible() -> None:
    certain = torch.zeros(1, 4, 3)
    certain[..., 1] = 1
    worst = log_likelihood(certain, [torch.tensor([2, 2, 2])])  # needs five frames
    assert worst.item() == pytest.approx(math.log(LEAST))


def test_the_asked_text() -> None:
    assert asked_text(Prompt("a sign", {"text": "OPEN"})) == "OPEN"
    assert asked_text('a sign that says "NO WAY" in red') == "NO WAY"
    assert asked_text(Prompt('a sign that says "OPEN"', {"colour": "red"})) == "OPEN"
    for prompt in ("a sign", 'a ""sign', Prompt("a sign", {"text": " "})):
        with pytest.raises(ConfigError, match=r"'a .*sign'.*double quotes"):
            asked_text(prompt)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a "red" sign that says "stop"', "stop"),
        ('a sign that says "NO WAY" in "comic sans"', "NO WAY"),
        ('a "cool" cat holding a card reading: "HI"', "HI"),
        ('a "vintage" poster with the words "OPEN LATE"', "OPEN LATE"),
        ('The text is "A" on a "blue" wall', "A"),
        ('a sign that says "STOP" beside one that says "GO"', "STOP"),
        ('a "cool" cat beside "DOG"', "DOG"),  # nothing says which: the last
        ('"SUN" in red on white', "SUN"),
    ],
)
def test_which_of_several_quotations_is_asked_for(prompt: str, text: str) -> None:
    assert asked_text(prompt) == text
    assert asked_text(Prompt(prompt, {"text": "else"})) == "else"


def test_words_are_read(reward: OCRReward) -> None:
    images = torch.stack([picture(word) for word in WORDS])
    prompts = [f'"{word}" on blue' for word in WORDS]
    right = reward(images, prompts)
    wrong = reward(images, prompts[1:] + prompts[:1])
    assert right.components["exact"].mean() >= 5 / 6
    assert wrong.components["exact"].sum() == 0
    assert (right.reward > wrong.reward + 1).all()
    assert right.reward.mean() > -0.5
    assert (right.reward <= 0).all()
    assert (wrong.reward >= math.log(LEAST)).all()


def test_nearly_right_is_better_than_wrong(reward: OCRReward) -> None:
    images = torch.stack([picture(word) for word in ("TREE", "TREF", "TKXQ")] + [torch.zeros(3, 64, 64)])
    scores = reward(images, ['"TREE"'] * 4).reward
    assert scores[0] > scores[1] > scores[2]
    assert scores[1] > scores[3]


@pytest.mark.parametrize("y", [0.2, 0.8])
def test_a_word_may_stand_anywhere(reward: OCRReward, y: float) -> None:
    image = picture("DOG", y)[None]
    assert reward(image, ['"DOG"']).components["exact"].item() == 1
    assert make_reward("ocr", {"strips": "1", "share": "0.3"})(image, ['"DOG"']).components["exact"].item() == 0


def test_each_sample_has_its_own_score(reward: OCRReward) -> None:
    """Longer texts, which are read in wider lines, change nothing of the others'."""
    images = torch.stack([picture(word) for word in WORDS[:4]])
    prompts = [f'"{word}"' for word in ("DOG", "an elephant", "sun", "HELLO")]
    together = reward(images, prompts)
    for i in range(4):
        alone = reward(images[i : i + 1], prompts[i : i + 1])
        assert alone.components["exact"][0] == together.components["exact"][i]
        torch.testing.assert_close(alone.reward[0], together.reward[i], rtol=1e-4, atol=1e-5)


def test_letters_that_are_not_known(reward: OCRReward) -> None:
    with pytest.raises(ConfigError, match="does not know"):
        reward(picture("A")[None], ['"\U00013000"'])  # a hieroglyph


@pytest.mark.parametrize("options", [{"strips": "0"}, {"share": "1.5"}])
def test_options_without_meaning(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"ocr\.strips.*ocr\.share"):
        make_reward("ocr", options)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match=r"pip install 'flowrl-torch\[ocr\]'"):
        make_reward("ocr")
