"""Refreshes that are held while errors or the drift of the flow are too large (`max_own_loss`, `max_drift`)."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.errors import ConfigError
from flowrl.types import Role

pytestmark = pytest.mark.on_device

SMALL: dict[str, Any] = {"n_samples": 64, "batch_size": 32, "rollout_steps": 3, "learning_rate": 3e-3}
METHODS = [
    ("orw_w2", {"alpha": 0.1}),  # its loss gives own_loss
    ("orw", {"target": "plain"}),  # which keeps no v_old otherwise
    ("nft", {"group_size": 8}),
    ("tilt", {"pool": 64}),
    ("dgpo", {"group_size": 8}),
    ("flow_dpo", {"group_size": 8}),  # which draws from the policy in training otherwise
    ("fpo", {"group_size": 8, "draws": 2}),
]


def make(name: str, **settings: Any) -> Any:
    return flowrl.algorithm_class(name)("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **SMALL | settings)


def weights(model: Any, role: Role = "current") -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.policy.parameters_of(role).values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("setting", ["max_own_loss", "max_drift"])
@pytest.mark.parametrize(("name", "settings"), METHODS)
def test_beyond_the_limit_the_samples_come_from_the_policy_as_it_was(
    name: str, settings: dict[str, Any], setting: str
) -> None:
    model, free, never = (make(name, **settings, **{setting: limit}) for limit in (1e-6, 1e6, 0.0))
    before = weights(model, "behaviour")
    with pytest.warns(UserWarning, match=rf"not refreshed after iteration 1: .* 1e-06 times .*\({setting}\)"):
        model.learn(3 * 64)
    assert equal(weights(model, "behaviour"), before)
    assert not equal(weights(model), before)
    free.learn(3 * 64)
    never.learn(3 * 64)
    assert equal(weights(free), weights(never))
    if name != "nft":  # whose old policy lags behind
        assert equal(weights(free, "behaviour"), weights(free))


def test_the_log_has_the_figures_that_the_limits_are_of() -> None:
    """Also of a method whose loss knows the drift on other samples: those of the reference."""
    model = make("tilt", pool=64, max_drift=1e6).learn(3 * 64)
    model.iteration -= 1  # whose noise it is
    measured, logged = model.drift(), model.last_logged
    for name in ("drift", "own_loss", "reference_loss"):
        assert logged[f"train/{name}"] == pytest.approx(measured[name].item(), rel=1e-5)
    assert logged["train/reference_drift"] != logged["train/drift"]


@pytest.mark.parametrize(
    ("own", "reference", "may"),
    [(1.2, 1.0, True), (1.21, 1.0, False), (0.3, 0.25, True), (0.31, 0.25, False), (math.nan, 1.0, True), (0, 0, True)],
)
def test_the_limit_is_on_the_ratio_of_the_two_losses(own: float, reference: float, may: bool) -> None:
    model = make("orw_w2", max_own_loss=1.2000001)
    figures = {"own_loss": torch.tensor(float(own)), "reference_loss": torch.tensor(float(reference))}
    figures["drift"] = torch.tensor(5.0)
    assert model.may_refresh(figures) is may
    assert make("orw_w2").may_refresh(figures)


@pytest.mark.parametrize(("drift", "may"), [(0.3, True), (0.32, False), (math.nan, True)])
def test_the_other_limit_is_on_the_drift_in_units_of_the_references_loss(drift: float, may: bool) -> None:
    model = make("orw_w2", max_drift=0.5)
    figures = {"own_loss": torch.tensor(9.0), "reference_loss": torch.tensor(0.62), "drift": torch.tensor(drift)}
    assert model.may_refresh(figures) is may
    assert model.held_by == ("" if may else "drift")
    both = make("orw_w2", max_drift=0.5, max_own_loss=1.2)
    assert not both.may_refresh(figures)


@pytest.mark.parametrize(("settings", "log_interval"), [({}, 1), ({"max_drift": 1e6}, 1), ({"max_drift": 1e6}, None)])
def test_what_holds_refreshes_is_part_of_the_cost_and_the_log_is_not(
    settings: dict[str, Any], log_interval: int | None
) -> None:
    """Without a penalty neither loss nor update knows `v_ref`; the estimate of 4 samples, two passes each."""
    model = make("orw_w2", alpha=0.0, baseline="clipped", **settings)
    model.learn(3 * 64, log_interval=log_interval)
    plain = 3 * 64 * (3 + 1 + 3)  # three steps to draw, v_old, v and its gradient
    assert model.policy.evaluations == plain + 3 * 2 * 4 * bool(settings)


def test_it_goes_on_once_the_loss_is_small_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations 2 and 3 are held; the fourth refreshes, and what was told is told once."""
    model, losses = make("orw_w2", max_own_loss=1.5), iter([1.0, 2.0, 2.0, 1.0])
    update, drawn_by = type(model).update, []

    def with_loss(self: Any) -> dict[str, torch.Tensor]:
        drawn_by.append(weights(self, "behaviour"))
        told = {"own_loss": torch.tensor(next(losses)), "reference_loss": torch.tensor(1.0)}
        told["drift"] = torch.tensor(0.0)
        return {**update(self), **told}

    monkeypatch.setattr(type(model), "update", with_loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(4 * 64)
    assert [equal(drawn_by[i], drawn_by[i + 1]) for i in range(3)] == [False, True, True]
    assert equal(weights(model, "behaviour"), weights(model))
    assert sum("was not refreshed after iteration 2" in str(w.message) for w in caught) == 1


def test_a_held_run_resumes_exactly(tmp_path: Path) -> None:
    whole, half = (make("orw_w2", max_own_loss=1e-6) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.learn(4 * 64)
        half.learn(2 * 64)
        half.save(tmp_path / "half")
        again = flowrl.ORWCFMW2.load(tmp_path / "half", device=DEVICE).learn(2 * 64, reset_num_timesteps=False)
    for role in ("current", "behaviour"):
        assert equal(weights(whole, role), weights(again, role))
    assert not equal(weights(whole), weights(whole, "behaviour"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("crd", {}, "'crd' draws samples from its current policy, which max_own_loss and max_drift do not hold"),
        ("rwr", {}, "'rwr' draws samples from its reference policy, which max_own_loss and max_drift do not hold"),
        ("orw_w2", {"max_own_loss": -1.0}, r"max_own_loss must not be negative, not -1\.0"),
        ("orw_w2", {"max_drift": -1.0}, r"max_drift must not be negative, not -1\.0"),
    ],
)
def test_where_there_is_nothing_to_hold(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **{"max_own_loss": 1.2, **settings})
