"""What training did besides raising its reward, and when that is a warning."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

import flowrl
from flowrl.envs.rewards.mixture import make_rewards
from flowrl.errors import RewardError, UnknownNameError
from flowrl.evaluation.side_effects import compare, held_out, looks
from flowrl.runs.callbacks import HeldOutCallback
from flowrl.runs.logs import logger, read_metrics

SMALL = ["--algo.n-samples", 8, "--algo.group-size", 2, "--algo.rollout-steps", 2, "--total-timesteps", 8]


def normal(mean: float, n: int = 200) -> torch.Tensor:
    return mean + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(round(1000 * abs(mean))))


RISEN, SAME = (normal(1.0), normal(1.5)), (normal(1.0), normal(1.0) + 1e-6)


def test_nothing_to_warn_of() -> None:
    parts = {"held-out other": normal(2.0)}, {"held-out other": normal(2.1)}
    found = compare(RISEN, parts, (5.0, 4.0), 1.1)
    assert found.warnings == ()
    assert found.before["held-out other"] == pytest.approx(2.0, abs=0.03)
    assert found.after["held-out other"] == pytest.approx(2.1, abs=0.03)


@pytest.mark.parametrize(
    ("name", "old", "new", "warned"),
    [
        ("held-out other", 2.0, 1.9, True),  # little, but sure
        ("entropy", 2.0, 1.9, False),  # sure, but little
        ("entropy", 2.0, 1.4, True),
        ("entropy", 1.4, 2.0, False),
    ],
)
def test_a_fall_beside_a_rise(name: str, old: float, new: float, warned: bool) -> None:
    parts = {name: normal(old)}, {name: normal(new)}
    found = compare(RISEN, parts, (5.0, 5.0), 1.0).warnings
    assert bool(found) == warned
    assert all(text.startswith(f"the reward rose while {name} fell from ") for text in found)
    assert compare(SAME, parts, (5.0, 5.0), 1.0).warnings == ()  # only beside a reward that rose


def test_a_fall_within_the_noise_is_none() -> None:
    few = {"held-out other": normal(2.0, 4)}, {"held-out other": normal(1.95, 4)}
    assert compare(RISEN, few, (5.0, 5.0), 1.0).warnings == ()


@pytest.mark.parametrize(
    ("diversity", "ratio", "what"), [(3.7, 1.0, "diversity"), (5.0, 2.1, "velocities"), (5.0, 0.4, "velocities")]
)
def test_diversity_and_velocities(diversity: float, ratio: float, what: str) -> None:
    (warning,) = compare(RISEN, ({}, {}), (5.0, diversity), ratio).warnings
    assert what in warning
    (warning,) = compare(SAME, ({}, {}), (5.0, diversity), ratio).warnings  # whatever the reward did
    assert what in warning
    assert "rose while" not in warning
    near = compare(RISEN, ({}, {}), (5.0, diversity), ratio, 0.5, w2=(2.0, 0.3))  # as the optimum itself is
    assert near.warnings == ()
    assert compare(RISEN, ({}, {}), (5.0, 3.8), 1.34).warnings == ()
    assert compare(RISEN, ({}, {}), (5.0, 5.0), math.nan).warnings == ()


@pytest.mark.parametrize(("new", "warned"), [(1.5, True), (1.2, False), (0.3, False)])
def test_an_error_that_rises_beside_the_reward(new: float, warned: bool) -> None:
    """Errors of each sample, and one of all samples together."""
    spread = 0.01 * torch.arange(100.0)
    errors = (
        {"each": spread + 0.5, "all": torch.tensor([1.0])},
        {"each": spread + new - 0.5, "all": torch.tensor([new])},
    )
    found = compare(RISEN, ({}, {}), (5.0, 5.0), 1.0, errors=errors)
    assert found.before["all"] == 1
    assert found.after["all"] == pytest.approx(new)
    expected = [f"the reward rose while {name} rose from" for name in ("each", "all")] if warned else []
    assert [text[: len(text) - len(text.split("from")[1])] for text in found.warnings] == expected
    assert compare(SAME, ({}, {}), (5.0, 5.0), 1.0, errors=errors).warnings == ()


def test_a_flow_that_diverged() -> None:
    for reward in (RISEN, SAME, RISEN[::-1]):
        texts = compare(reward, ({}, {}), (5.0, 1e9), 1e10, 4e20, w2=(2.0, 1e10)).warnings
        assert ["the flow has diverged" in text for text in texts].count(True) == 1
        assert any("diversity rose from 5 to 1e+09" in text for text in texts)
        assert any("velocities are 1e+10 times" in text for text in texts)
    assert "diverged" in compare(SAME, ({}, {}), (5.0, 5.0), math.inf, math.inf).warnings[0]
    assert compare(RISEN[::-1], ({}, {}), (5.0, 5.0), 1.0, 0.1).warnings == ("the reward fell from 1.501 to 0.9948",)


def test_an_evaluation_says_that_a_flow_diverged() -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device="cpu", rollout_steps=4)
    assert flowrl.evaluate(model, n_samples=64).warnings == ()
    with torch.no_grad():
        for parameter in model.policy.model.network.output.parameters():
            parameter.mul_(-4)
    assert any("diverged" in text for text in flowrl.evaluate(model, n_samples=64).warnings)


def test_the_drift_of_few_samples_is_of_several_noises_of_each() -> None:
    """And of the same, however many are measured at once."""
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device="cpu")
    model.learn(2048)
    one, many = (flowrl.evaluate(model, n_samples=n) for n in (1, 512))
    assert one.warnings == ()  # one velocity of the reference, where it is small, had a drift of 7 times its size
    assert one.drift == pytest.approx(many.drift, rel=0.5)
    assert flowrl.evaluate(model, n_samples=512, batch_size=100).drift == pytest.approx(many.drift, rel=1e-5)


def test_looks_fall_when_pictures_turn_flat() -> None:
    busy = torch.rand(3, 3, 16, 16)
    flat = torch.full((3, 3, 16, 16), 0.5)
    for name, value in looks(busy).items():
        assert value.shape == (3,)
        assert (value > looks(flat)[name]).all()


def test_held_out_rewards_are_held_to_the_contract() -> None:
    samples = torch.zeros(3, 3, 8, 8)
    assert held_out({"one": lambda x, c: x.mean((1, 2, 3)) + 1}, samples, [""] * 3)["held-out one"].tolist() == [1] * 3
    with pytest.raises(RewardError, match="bad"):
        held_out({"bad": lambda x, c: torch.full((3,), torch.nan)}, samples, [""] * 3)


def test_rewards_with_options() -> None:
    rewards = make_rewards(["compress", "colourfulness"], ["compress.quality=40"])
    assert list(rewards) == ["compress", "colourfulness"]
    assert rewards["compress"].quality == 40
    with pytest.raises(UnknownNameError, match="'compres'"):
        make_rewards(["compress"], ["compres.quality=40"])


def test_velocity_ratio_of_a_longer_velocity() -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device="cpu", ema_decay=0.0)
    assert flowrl.evaluate(model, n_samples=64).velocity_ratio == pytest.approx(1)
    with torch.no_grad():
        for parameter in list(model.policy.model.network.output.parameters()):
            parameter.mul_(1.5)
    assert flowrl.evaluate(model, n_samples=64).velocity_ratio == pytest.approx(1.5, rel=1e-3)


def test_a_run_scores_with_rewards_that_it_did_not_see(run_here, tmp_path: Path) -> None:
    args = ["--algo", "orw_w2", "--env", "sd3-aesthetic", "--name", "run", *SMALL, "--eval-samples", 8]
    held = ["--eval-rewards", "compress", "--eval-reward-options", "compress.quality=40"]
    done = run_here("flowrl.run", *args, *held)
    assert done.returncode == 0, done.stderr
    assert "held-out compress" in done.stdout
    assert "edge density" in done.stdout
    side = json.loads((tmp_path / "runs" / "run" / "evaluation.json").read_text())["side"]
    assert side.keys() == {"entropy", "edge density", "colourfulness", "held-out compress"}
    first, *_ = read_metrics(tmp_path / "runs" / "run" / "metrics.csv")
    assert -5 < first["held_out/compress"] < -0.5  # kB
    assert "held-out compress" in (tmp_path / "runs" / "run" / "report.html").read_text()
    done = run_here("flowrl.evaluate", "runs/run", "--n-samples", 8, "--eval-rewards", "incompress")
    assert done.returncode == 0, done.stderr
    assert "held-out incompress" in done.stdout
    wrong = run_here("flowrl.run", *args, "--eval-rewards", "compres")
    assert wrong.returncode == 2
    assert "Did you mean 'compress'" in wrong.stderr


def test_held_out_rewards_are_of_the_samples_of_the_iteration(tmp_path: Path) -> None:
    """Where the judge is the reward itself, the two curves are one."""
    sizes = []

    def judge(samples: torch.Tensor, contexts: list[None]) -> torch.Tensor:
        sizes.append((len(samples), len(contexts)))
        return samples[:, 0]

    def pairs(samples: torch.Tensor, contexts: list[None]) -> torch.Tensor:
        raise AssertionError("it compares samples")

    pairs.groupwise = True
    settings = {"n_samples": 64, "rollout_batch_size": 16, "batch_size": 64}
    model = flowrl.ORWCFM("FlowPolicy", "gaussians-linear", seed=0, device="cpu", **settings)
    model.set_logger(logger(tmp_path, 0))
    model.learn(192, callback=HeldOutCallback({"judge": judge, "pairs": pairs}, every=2))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row.get("held_out/judge") for row in rows] == [
        pytest.approx(rows[0]["rollout/reward_mean"], rel=1e-4),
        None,
        pytest.approx(rows[2]["rollout/reward_mean"], rel=1e-4),
    ]
    assert sizes == [(16, 16)] * 8
    assert "held_out/pairs" not in rows[0]


def test_held_out_rewards_stand_beside_their_own_iteration_with_few_rows(tmp_path: Path) -> None:
    """Due at iterations 1, 5, 9 of 11, with a row for every third: that of row 3, 6 and 9, each of that iteration."""
    settings = {"n_samples": 64, "rollout_steps": 2, "batch_size": 64}
    model = flowrl.ORWCFM("FlowPolicy", "gaussians-linear", seed=0, device="cpu", **settings)
    model.set_logger(logger(tmp_path, 0))
    callback = HeldOutCallback({"judge": lambda samples, contexts: samples[:, 0]}, every=4)
    model.learn(64 * 12, callback=callback, log_interval=3)
    rows = read_metrics(tmp_path / "metrics.csv")
    own = [pytest.approx(row["rollout/reward_mean"], rel=1e-4) for row in rows]
    assert [row.get("held_out/judge") for row in rows] == [*own[:3], None]


def test_a_held_out_reward_that_raises_is_named() -> None:
    def judge(samples: torch.Tensor, contexts: list[None]) -> torch.Tensor:
        raise ValueError("unknown word 'travel'")

    policy = flowrl.FlowPolicy.of("gaussians-linear", device="cpu", seed=0)
    message = "held-out reward 'judge' raised ValueError: unknown word 'travel'.* 16 contexts, the first None"
    with pytest.raises(RewardError, match=message):
        flowrl.evaluate(policy, "gaussians-linear", n_samples=16, eval_rewards={"judge": judge})
    with pytest.raises(UnknownNameError, match="options of the reward 'compress', and no reward is named"):
        make_rewards((), ("compress.quality=3",))


def test_rewards_of_an_evaluation_are_asked_in_batches_of_whole_groups() -> None:
    sizes = []

    def judge(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        sizes.append(len(images))
        assert all(prompts.count(prompt) % 2 == 0 for prompt in prompts)
        return images.mean((1, 2, 3))

    judge.groupwise = True
    settings = {"n_samples": 4, "group_size": 2, "rollout_steps": 2, "batch_size": 4}
    model = flowrl.ORWCFMW2("FlowPolicy", "sd3-compress", seed=0, device="cpu", **settings)
    result = flowrl.evaluate(model, n_samples=10, batch_size=5, samples_per_context=2, eval_rewards={"judge": judge})
    assert sizes == [4, 4, 2] * 2  # of the reference and of the trained flow
    assert result.side["held-out judge"] == pytest.approx(result.reference.side["held-out judge"], abs=1e-4)


def test_the_interval_of_an_evaluation_is_over_all_prompts() -> None:
    """Also over those that were not drawn: of six, two with four samples each."""
    prompts = ("a", "b", "c", "d", "e", "f")
    env = flowrl.make("sd3-compress", flow="mini-sd3", prompts=prompts, resolution=32)
    env.reward = lambda samples, contexts: flowrl.RewardOutput(  # type: ignore[method-assign]
        torch.tensor([float(ord(context)) for context in contexts])
    )
    policy = flowrl.FlowPolicy.of(env, device="cpu", seed=0)
    quantile = {n: float(stats.t.ppf(0.975, n - 1)) for n in (2, 48)}
    for n_samples, half_width in ((8, quantile[2] * 0.5), (48, None)):
        result = flowrl.evaluate(policy, env, n_samples=n_samples, samples_per_context=4, steps=1)
        means = torch.tensor([row["trained"] for row in result.per_prompt])
        low, high = result.reward_ci
        iid = quantile[48] * result.reward_std / math.sqrt(n_samples - 1)
        expected = iid if half_width is None else half_width * float(means.max() - means.min())
        assert (high - low) / 2 == pytest.approx(expected, rel=1e-5)
