"""How often the trained flow's sample beats the reference's of the same context and noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run

import flowrl
from flowrl.envs.rewards.groups import PairwiseReward, WinRateReward
from flowrl.envs.rewards.mixture import make_mixture
from flowrl.errors import RewardError
from flowrl.evaluation.win_rates import comparisons, outcomes
from flowrl.functional.metrics import wins


def red(images: torch.Tensor, prompts: Sequence[Any]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


def red_for_the_first(one: torch.Tensor, other: torch.Tensor, prompts: Sequence[Any]) -> torch.Tensor:
    """A judge of pairs that favours the first place."""
    return (0.5 + red(one, prompts) - red(other, prompts)).clamp(0, 0.8) + 0.2


def model(reward: Any, **settings: Any) -> flowrl.ORWCFMW2:
    from flowrl.envs.text_to_image import TextToImageEnv
    from flowrl.models.loading import source_of

    env = TextToImageEnv(source_of("mini-sd3"), ["two red stars", "a circle"], reward, name="pictures")
    small = {"n_samples": 8, "group_size": 4, "batch_size": 8, "rollout_steps": 2, "n_epochs": 1, "seed": 0}
    return flowrl.ORWCFMW2("FlowPolicy", env, device="cpu", **{**small, **settings})


def test_by_hand() -> None:
    one, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])
    assert wins(one, other).tolist() == [0, 0.5, 1]
    values = {"reward": other, "held-out a": one}, {"reward": one, "held-out a": other}
    found = outcomes({"reward": None, "held-out a": None}, values, (one, one), [None] * 3, 2)
    assert {name: value.tolist() for name, value in found.items()} == {"reward": [0, 0.5, 1], "held-out a": [1, 0.5, 0]}


def test_an_untrained_flow_ties_and_a_better_one_wins() -> None:
    env = "gaussians-linear"
    trained = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cpu", n_samples=64, rollout_steps=4)
    before = flowrl.evaluate(trained, n_samples=32)
    assert before.win_rates == {"reward": 0.5}
    assert before.win_rate_cis == {"reward": (0.5, 0.5)}
    trained.learn(20 * 64)
    result = flowrl.evaluate(trained, n_samples=400, eval_rewards={"less": lambda x, c: -x[:, 0]})
    core = trained.env.core
    one, other = (core.reward(x, [None] * 400).reward for x in (result.samples, result.reference_samples))
    share = (one > other).float().mean().item()
    assert 0.7 < share <= 1
    assert result.win_rates["reward"] == pytest.approx(share)
    low, high = result.win_rate_cis["reward"]
    z = 1.9659272**2 / 399  # Student's t of 399 degrees
    middle, half = share + z / 2, (share * (1 - share) * z + z**2 / 4) ** 0.5
    assert (low, high) == pytest.approx(((middle - half) / (1 + z), (middle + half) / (1 + z)), abs=1e-5)
    less = (result.samples[:, 0] < result.reference_samples[:, 0]).float().mean().item()
    assert result.win_rates["held-out less"] == pytest.approx(less)
    assert f"win rate over the reference: reward {share:.3g} ({low:.3g} to {high:.3g}), held-out less" in result.table()


def test_few_samples_that_all_win_leave_room_for_some_that_do_not() -> None:
    trained = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device="cpu", n_samples=64, rollout_steps=4)
    trained.learn(20 * 64)
    result = flowrl.evaluate(trained, n_samples=6, eval_rewards={"none": lambda x, c: 0 * x[:, 0]})
    rate, (low, high) = result.win_rates["reward"], result.win_rate_cis["reward"]
    assert rate == 1  # so it was "1 to 1", which the rate of more samples is not
    assert high == 1
    assert 0.3 < low < flowrl.evaluate(trained, n_samples=400).win_rates["reward"] < 1
    assert result.win_rate_cis["held-out none"] == (0.5, 0.5)


def test_those_that_compare_samples_compare_with_the_reference() -> None:
    """A win rate within a call is one half whatever the flow does; over the reference it is not."""
    judges = {
        "red": red,
        "winrate": WinRateReward(red, "red"),
        "pairs": PairwiseReward(red_for_the_first, "pairs"),
        "mixed": make_mixture("colourfulness:1:group+compress:1"),
    }
    trained = model(WinRateReward(red, "red"))
    with torch.no_grad():
        for weight in trained.policy.parameters_of("current").values():
            weight.mul_(1 + 0.02 * torch.randn_like(weight))
    result = flowrl.evaluate(trained, n_samples=16, samples_per_context=8, batch_size=4, n_kept=16, eval_rewards=judges)
    one, other = red(result.samples, ()), red(result.reference_samples, ())
    share = wins(one, other).mean().item()
    assert share not in (0.5, 1)
    assert result.side["held-out winrate"] == pytest.approx(0.5)
    expected = {"reward": share, "held-out red": share, "held-out winrate": share}
    expected["held-out pairs"] = (
        (red_for_the_first(one_of := result.samples, result.reference_samples, ()) + 1
         - red_for_the_first(result.reference_samples, one_of, ())) / 2
    ).mean().item()  # fmt: skip
    assert result.win_rates == pytest.approx(expected)
    assert "held-out mixed" in result.side


def test_pairs_of_videos() -> None:
    """By the videos' own values; a judge of pairs of pictures compares frame by frame."""
    videos, others = torch.rand(2, 5, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    judges = (WinRateReward(red, "red"), PairwiseReward(red_for_the_first, "pairs"))
    by_value, by_frame = (comparisons({"a": (True, judge)})["a"] for judge in judges)
    assert by_value is not None
    assert by_frame is not None
    one, other = (given[:, :, 0].mean((2, 3)) for given in (videos, others))
    torch.testing.assert_close(by_value(videos, others, ["a"] * 5), wins(one.mean(1), other.mean(1)))
    first = [(0.5 + sign * (one - other)).clamp(0, 0.8) + 0.2 for sign in (1, -1)]
    torch.testing.assert_close(by_frame(videos, others, ["a"] * 5), ((first[0] + 1 - first[1]) / 2).mean(1))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, b, c: torch.ones(1), r"'held-out mine, win_rate'"),
        (lambda a, b, c: a[:, 0, 0, 0] * torch.nan, r"'held-out mine, win_rate'"),
        (lambda a, b, c: 1 / 0, r"The win_rate of 'held-out mine' raised ZeroDivisionError"),
    ],
)
def test_a_judge_of_ones_own_that_fails(answer: Any, message: str) -> None:
    compare, x = {"held-out mine": answer}, torch.rand(4, 3, 2, 2)
    with pytest.raises(RewardError, match=message):
        outcomes(compare, ({}, {}), (x, x), ["a"] * 4, 2)


def test_files_and_pages_have_it(tmp_path: Path, run_in: Run) -> None:
    small = ["--algo.n-samples", 8, "--algo.rollout-steps", 2, "--total-timesteps", 8, "--eval-samples", 8]
    done = run_in(tmp_path, "flowrl.run", "--algo", "orw_w2", "--env", "gaussians-linear", "--name", "a", *small)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "runs" / "a" / "evaluation.json").read_text())
    rate, interval = numbers["win_rates"]["reward"], numbers["win_rate_cis"]["reward"]
    assert 0 <= rate <= 1
    assert len(interval) == 2
    assert f"win rate over the reference: reward {rate:.3g}" in done.stdout
    page = (tmp_path / "runs" / "a" / "report.html").read_text()
    assert f"Win rate over the reference, ties counting half: reward {rate:.4g} (" in page
