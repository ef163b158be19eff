"""Mixtures of rewards, and rewards that compare samples of the same context, against numpy and by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, forgetting

import flowrl
from flowrl.envs.rewards.catalogue import REWARDS, parse_options, register_reward
from flowrl.envs.rewards.groups import PairwiseReward, WinRateReward
from flowrl.envs.rewards.mixture import MixtureReward, Part, PartSpec, RunningStatistics, make_mixture, parse_mixture
from flowrl.errors import CheckpointError, ConfigError, RewardError, UnknownNameError
from flowrl.types import RewardOutput

PROMPTS = ["a", "b", "a", "a", "b", "a"]


def red(images: torch.Tensor, prompts: list[str]) -> RewardOutput:
    """Mean of the red channel, by its least value too."""
    return RewardOutput(images[:, 0].mean((1, 2)), {"least": images[:, 0].amin((1, 2))})


class Green:
    """Mean of the green channel, with a scale."""

    scale = 0.25

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.factor * images[:, 1].mean((1, 2))


def bright(a: torch.Tensor, b: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Probability that a is brighter than b, by a logistic curve, with a bonus for what comes first."""
    return torch.sigmoid(0.5 + 8 * (a.mean((1, 2, 3)) - b.mean((1, 2, 3))))


bright.pairwise = True  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    known = dict(REWARDS)
    for name, reward in (("red", red), ("green", Green), ("bright", bright)):
        register_reward(name)(reward)
    yield
    REWARDS.clear()
    REWARDS.update(known)


def images() -> torch.Tensor:
    return torch.rand(6, 3, 4, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clip", [PartSpec("clip")]),
        ("my.module:mine", [PartSpec("my.module:mine")]),
        ("clip:0.5+aesthetic:-2", [PartSpec("clip", weight=0.5), PartSpec("aesthetic", weight=-2.0)]),
        ("my.module:mine:.5:group", [PartSpec("my.module:mine", weight=0.5, normalisation="group")]),
        (
            "clip+my:mine:1:running",
            [PartSpec("clip"), PartSpec("my:mine", weight=1.0, normalisation="running")],
        ),
        ("winrate(my:mine):3", [PartSpec("my:mine", True, 3.0)]),
    ],
)
def test_what_a_mixture_means(text: str, expected: list[PartSpec]) -> None:
    assert parse_mixture(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "clip+", "clip:1:2", "clip:1:runing", "clip:running", "1:clip", "clip:1:group:3", "winrate()", "best(clip)"],
)
def test_what_is_no_mixture(text: str) -> None:
    with pytest.raises(ConfigError, match=r"NAME\[:WEIGHT\[:NORMALISATION\]\]"):
        parse_mixture(text)


def test_names_and_options_of_parts() -> None:
    options = parse_options(["green.factor=3"])
    x = images()
    torch.testing.assert_close(make_mixture("green", options)(x, PROMPTS), 3 * x[:, 1].mean((1, 2)))
    mixture = make_mixture("red:1+green:0.5", options)
    torch.testing.assert_close(mixture(x, PROMPTS).reward, x[:, 0].mean((1, 2)) + 0.5 * 3 * x[:, 1].mean((1, 2)) / 0.25)
    with pytest.raises(UnknownNameError, match="reward to give options to 'green'"):
        make_mixture("red:1", options)
    with pytest.raises(UnknownNameError, match="Did you mean 'factor'"):
        make_mixture("red:1+green:1", parse_options(["green.facto=3"]))
    with pytest.raises(UnknownNameError, match="Did you mean 'green'"):
        make_mixture("red:1+gren:1")
    with pytest.raises(ConfigError, match="'red' more than once"):
        make_mixture("red:1+red:2")


def test_a_plain_name_is_the_reward_itself() -> None:
    assert make_mixture("red") is red
    assert isinstance(make_mixture("red:1"), MixtureReward)


def test_fixed_mixture_and_its_components() -> None:
    x = images()
    output = make_mixture("red:-2+green:0.5")(x, PROMPTS)
    r, g = x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))
    torch.testing.assert_close(output.reward, -2 * r + 0.5 * g / 0.25)
    torch.testing.assert_close(output.components, {"red": r, "red.least": x[:, 0].amin((1, 2)), "green": g})


def test_a_part_that_changes_the_images_leaves_them_to_the_next() -> None:
    def darker(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mul_(0.5)[:, 0].mean((1, 2))

    given = images()
    before = given.clone()
    mixed = MixtureReward([Part("darker", darker), Part("red", red)])(given, PROMPTS)
    assert torch.equal(given, before)
    assert torch.equal(mixed.components["red"], red(given, PROMPTS).reward)


def test_group_normalisation_by_hand() -> None:
    x = images()
    x[[1, 4]] = 0.3  # all of context b alike
    values = x[:, 0].mean((1, 2)).double().numpy()
    expected = np.zeros(6)
    own = [0, 2, 3, 5]
    expected[own] = (values[own] - values[own].mean()) / values[own].std()
    reward = make_mixture("red:3:group")(x, PROMPTS).reward
    np.testing.assert_allclose(reward.numpy(), 3 * expected, rtol=1e-5)


def test_running_normalisation_is_over_all_that_training_saw() -> None:
    mixture = make_mixture("red:2:running+green:1:running")
    assert isinstance(mixture, MixtureReward)
    x = images()
    r, g = x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))
    torch.testing.assert_close(mixture(x, PROMPTS).reward, 2 * r + g / 0.25)  # nothing seen: as fixed
    seen = [images() * scale for scale in (1.0, 0.2, 3.0)]
    for batch in seen:
        rewards = mixture.observe(batch, PROMPTS).reward
    expected = torch.zeros(6, dtype=torch.float64)
    for weight, channel in ((2, 0), (1, 1)):
        values = torch.cat(seen)[:, channel].mean((1, 2)).tolist()
        mean, spread = statistics.fmean(values), statistics.pstdev(values)
        expected += weight * (torch.tensor(values[-6:], dtype=torch.float64) - mean) / spread
    np.testing.assert_allclose(rewards.numpy(), expected.numpy(), rtol=1e-5)
    before = {name: tensor.clone() for name, tensor in mixture.extra_state().items()}
    assert torch.equal(mixture(seen[-1], PROMPTS).reward, rewards)  # by the same statistics, which stay
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.extra_state().items())


def test_running_statistics_are_exact_far_from_zero() -> None:
    """A sum of squares would lose everything here."""
    values = 1e8 + torch.randn(1000, dtype=torch.float64)
    running = RunningStatistics()
    for batch in values.split([1, 499, 7, 493]):
        running.update(batch)
    n, mean, squares = running.state.tolist()
    assert n == 1000
    assert mean == pytest.approx(statistics.fmean(values.tolist()), rel=1e-15)
    assert squares / n == pytest.approx(statistics.pvariance(values.tolist()), rel=1e-6)


def test_equal_rewards_have_score_zero() -> None:
    for normalisation in ("running", "group"):
        mixture = make_mixture(f"red:1:{normalisation}")
        assert isinstance(mixture, MixtureReward)
        assert mixture.observe(torch.full((6, 3, 4, 4), 0.1), PROMPTS).reward.tolist() == [0.0] * 6


@pytest.mark.parametrize("normalisation", ["running", "group"])
def test_gradients_know_statistics_as_numbers(normalisation: str) -> None:
    """Through the mean of the call itself they would cancel, and statistics would keep the graphs of all calls."""
    mixture = make_mixture(f"red:2:{normalisation}")
    assert isinstance(mixture, MixtureReward)
    for _ in range(2):  # statistics hold nothing of a graph that is gone
        x = images().requires_grad_()
        reward = mixture.observe(x, PROMPTS).reward
        reward.sum().backward()
        pulls = x.grad.sum((1, 2, 3)).double()
    values = x.detach()[:, 0].mean((1, 2)).double()
    spreads = [values[[i for i, p in enumerate(PROMPTS) if p == own]].std(correction=0) for own in PROMPTS]
    if normalisation == "running":
        _, _, squares = mixture.extra_state()["red"]
        spreads = [(squares / 12).sqrt()] * 6
    torch.testing.assert_close(pulls, 2 / torch.stack(spreads), rtol=1e-4, atol=0)


def test_a_gradient_of_some_parts_alone_is_none_of_the_mixture() -> None:
    """A win rate has none: the mixture was followed as if that part were not there."""
    mixture, x = make_mixture("winrate(red):2+red:1"), images()
    with pytest.raises(ConfigError, match=r"is that of red alone: winrate\(red\) gives none"):
        mixture(x.requires_grad_(), PROMPTS)
    with torch.no_grad():
        assert mixture(x, PROMPTS).reward.shape == (6,)
    idle = make_mixture("winrate(red):0+red:1")
    assert isinstance(idle, MixtureReward)
    assert idle(x, PROMPTS).reward.requires_grad


def test_share_of_wins_by_hand() -> None:
    x = torch.zeros(6, 3, 4, 4)
    x[:, 0] = torch.tensor([0.1, 0.7, 0.5, 0.5, 0.2, 0.9])[:, None, None]  # a: 0.1, 0.5, 0.5, 0.9; b: 0.7, 0.2
    output = make_mixture("winrate(red)")(x, PROMPTS)
    assert output.reward.tolist() == pytest.approx([0, 1, 0.5, 0.5, 0, 1])
    assert output.components["red"].tolist() == pytest.approx(x[:, 0, 0, 0].tolist())
    mixed = make_mixture("winrate(red):2+red:1")(x, PROMPTS)
    assert mixed.reward.tolist() == pytest.approx((2 * output.reward + x[:, 0, 0, 0]).tolist())
    assert {"winrate(red)", "winrate(red).red", "red"} <= mixed.components.keys()


def test_one_text_with_two_pictures_is_two_contexts() -> None:
    prompts = [flowrl.Prompt("a hat on it", {"image": name}) for name in ("cat.png", "dog.png", "cat.png", "dog.png")]
    x = torch.zeros(4, 3, 4, 4)
    x[:, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
    for text, expected in (("winrate(red)", [0, 0, 1, 1]), ("red:1:group", [-1, -1, 1, 1])):
        assert make_mixture(text)(x, prompts).reward.tolist() == pytest.approx(expected, abs=1e-5)


def test_pairwise_probabilities_by_hand() -> None:
    """The mean over the others, each asked in both orders: what favours a place cancels."""
    x = images()
    level = x.mean((1, 2, 3)).double().numpy()
    expected = np.zeros(6)
    for i in range(6):
        others = [j for j in range(6) if j != i and PROMPTS[j] == PROMPTS[i]]
        first = [1 / (1 + np.exp(-0.5 - 8 * (level[i] - level[j]))) for j in others]
        second = [1 - 1 / (1 + np.exp(-0.5 - 8 * (level[j] - level[i]))) for j in others]
        expected[i] = np.mean(first + second)
    reward = make_mixture("bright")
    assert isinstance(reward, PairwiseReward)
    np.testing.assert_allclose(reward(x, PROMPTS).reward.numpy(), expected, rtol=1e-5)
    assert torch.equal(make_mixture("bright:2")(x, PROMPTS).reward, 2 * reward(x, PROMPTS).reward)


@pytest.mark.parametrize(
    "answer",
    [lambda a, b, p: a.mean((1, 2, 3)) + 1, lambda a, b, p: torch.zeros(1), lambda a, b, p: torch.nan * a[:, 0, 0, 0]],
)
def test_a_pairwise_reward_gives_probabilities(answer: Callable) -> None:
    with pytest.raises(RewardError, match="mine"):
        PairwiseReward(answer, "mine")(images(), PROMPTS)


@pytest.mark.parametrize("text", ["winrate(red)", "bright", "red:1:group", "red:1+winrate(green):1"])
def test_groups_of_one(text: str) -> None:
    reward = make_mixture(text)
    assert reward.groupwise  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"single one of 'b'.*group_size"):
        reward(images()[:3], ["a", "b", "a"])


def test_rewards_that_need_no_groups() -> None:
    assert not make_mixture("red:1+green:1:running").groupwise  # type: ignore[attr-defined]


def test_a_part_that_is_not_finite_is_named() -> None:
    parts = [Part("red", red), Part("odd", lambda x, p: x[:, 0, 0, 0] / 0)]
    with pytest.raises(RewardError, match="'odd' is inf"):
        MixtureReward(parts)(images(), PROMPTS)


def test_a_scale_has_to_be_positive() -> None:
    class Odd(Green):
        scale = 0.0

    with pytest.raises(ConfigError, match="scale of the reward 'odd' must be positive"):
        MixtureReward([Part("odd", Odd())])


SMALL: dict[str, Any] = {
    "n_samples": 8,
    "group_size": 4,
    "rollout_batch_size": 4,
    "batch_size": 8,
    "n_epochs": 1,
    "rollout_steps": 2,
    "ema_decay": 0.0,
}


def algorithm(reward: str, **settings: Any) -> flowrl.FlowAlgorithm:
    env_settings = {"flow": "mini-sd3", "reward": reward}
    return flowrl.ORWCFMW2(
        "FlowPolicy", "sd3-compress", env_settings=env_settings, seed=0, device="cpu", **{**SMALL, **settings}
    )


def state_of(model: flowrl.FlowAlgorithm) -> list[torch.Tensor]:
    statistics_of_env = model.env.core.extra_state()
    return [*model.policy.parameters_of("current").values(), *statistics_of_env.values()]


def test_running_statistics_resume_exactly(tmp_path: Path) -> None:
    reward = "red:1:running+compress:0.5:running"
    whole = algorithm(reward).learn(4 * 8)
    algorithm(reward).learn(2 * 8).save(tmp_path / "half")
    resumed = flowrl.ORWCFMW2.load(tmp_path / "half", device="cpu").learn(2 * 8, reset_num_timesteps=False)
    assert whole.env.core.extra_state()["red"][0] == 32
    assert all(torch.equal(a, b) for a, b in zip(state_of(whole), state_of(resumed)))
    (tmp_path / "half" / "environment.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"environment\.safetensors"):
        flowrl.ORWCFMW2.load(tmp_path / "half", device="cpu")


def test_evaluation_leaves_running_statistics_alone() -> None:
    model = algorithm("red:1:running").learn(8)
    before = model.env.core.extra_state()["red"].clone()
    first = flowrl.evaluate(model, n_samples=8, steps=2)
    second = flowrl.evaluate(model, n_samples=8, steps=2)
    assert torch.equal(model.env.core.extra_state()["red"], before)
    assert first.reward_mean == second.reward_mean
    assert "red" in first.components


def test_nothing_is_kept_where_there_is_nothing(tmp_path: Path) -> None:
    algorithm("red:1+compress:1").save(tmp_path / "a")
    assert not (tmp_path / "a" / "environment.safetensors").exists()


@pytest.mark.parametrize("settings", [{"group_size": 1}, {"group_size": 4, "rollout_batch_size": 2}])
def test_group_rewards_need_whole_groups(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"group_size must be 2 or more and divide rollout_batch_size"):
        algorithm("winrate(red)", **settings)
    algorithm("red", **settings)


def test_group_rewards_train_and_are_evaluated() -> None:
    """Also where the samples drawn at once would split a group."""
    model = algorithm("winrate(red)").learn(8)
    assert model.last_logged["rollout/reward_mean"] == pytest.approx(0.5)
    assert 0 < model.last_logged["reward/red"] < 1
    result = flowrl.evaluate(model, n_samples=12, batch_size=5, samples_per_context=4, steps=2)
    assert result.reward_mean == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="single one"):
        flowrl.evaluate(model, n_samples=5, samples_per_context=4, steps=2)


def test_counting_in_a_mixture_has_prompts_that_say_what_to_count() -> None:
    alone = flowrl.make("sd3-compress", flow="mini-sd3", reward="count")
    mixed = flowrl.make("sd3-compress", flow="mini-sd3", reward="compress:0.1+count:1")
    assert mixed.contexts == alone.contexts
    assert mixed.describe()[1] == "reward: 0.1 compress / 1 + 1 count / 0.15"


def test_win_rate_takes_any_reward() -> None:
    reward = WinRateReward(lambda x, p: x[:, 0, 0, 0], "first pixel")
    assert reward(images(), ["a"] * 6).reward.mean().item() == pytest.approx(0.5)


def test_the_page_on_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module works as it says, and its table has every reward that ships."""
    page = (REPOSITORY / "docs" / "rewards.md").read_text()
    (tmp_path / "my_rewards.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    text = page.rpartition('--env.reward "')[2].partition('"')[0]
    with forgetting("my_rewards"):
        env = flowrl.make("sd3-compress", flow="mini-sd3", reward=text, reward_options=("my_rewards:dark.power=2",))
    x = torch.rand(2, *env.sample_shape)
    output = env.evaluate(x, torch.zeros(2, dtype=torch.long))
    level = x.mean((1, 2, 3))
    wins = (level < level.flip(0)).float()
    torch.testing.assert_close(output.reward, -level.square() / 0.2 + 0.5 * wins)
    assert output.components.keys() == {"dark", "darker"}
    assert env.groupwise
    for name, entry in REWARDS.items():
        if entry.factory.__module__.startswith("flowrl.") and name not in ("red", "bright"):
            assert f"\n| `{name}` |" in page, name


def test_a_mixture_on_samples_that_are_no_images(tmp_path: Path) -> None:
    """Its statistics stayed empty, so that "running" was "fixed" without a word, and no checkpoint had them."""
    name = "mixture-of-points"
    settings = {"n_samples": 32, "batch_size": 16, "rollout_steps": 2, "seed": 0, "device": "cpu"}

    def registered() -> MixtureReward:
        parts = [Part("x", lambda p, c: 100 * p[:, 0], 1.0, "running"), Part("y", lambda p, c: p[:, 1])]
        return flowrl.register_env(name, flow="gaussians")(MixtureReward(parts))  # type: ignore[return-value]

    mixture = registered()
    whole = flowrl.ORWCFMW2("FlowPolicy", name, **settings).learn(96)
    n, mean, squares = mixture.running["x"].state.tolist()
    assert n == 96
    assert (squares / n) ** 0.5 > 10 > abs(mean) / 10
    registered()
    flowrl.ORWCFMW2("FlowPolicy", name, **settings).learn(64).save(tmp_path / "two")
    registered()
    resumed = flowrl.FlowAlgorithm.load(tmp_path / "two", device="cpu").learn(32, reset_num_timesteps=False)
    assert resumed.rollout_reward == whole.rollout_reward
    assert torch.equal(state_of(resumed)[0], state_of(whole)[0])
