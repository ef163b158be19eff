"""The field beyond `max_time`, held to the reference's (`late_anchor`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import DEVICE
from toys import RATE, narrow_linear

import flowrl
from flowrl.errors import ConfigError
from flowrl.functional.flow import interpolate
from flowrl.functional.losses import squared_error
from flowrl.training.noising import late_rows

pytestmark = pytest.mark.on_device

SMALL: dict[str, Any] = {"n_samples": 256, "batch_size": 64, "rollout_steps": 4, "max_time": 0.4}


def make(name: str = "orw_w2", env: Any = "gaussians-linear", **settings: Any) -> Any:
    return flowrl.algorithm_class(name)("FlowPolicy", env, seed=0, device=DEVICE, **SMALL | settings)


@torch.no_grad()
def distance(model: Any, first: float, last: float) -> float:
    """E|v - v_ref|^2 of points at times of that range."""
    g = torch.Generator(DEVICE).manual_seed(1)
    x_1 = model.policy.sample_latents(torch.zeros(512, dtype=torch.long, device=DEVICE), role="reference", generator=g)
    t = first + (last - first) * torch.rand(512, generator=g, device=DEVICE)
    x_t, _ = interpolate(torch.randn(x_1.shape, generator=g, device=DEVICE), x_1, t)
    cond = model.policy.condition(torch.zeros(512, dtype=torch.long, device=DEVICE))
    fields = (model.policy.velocity(x_t, t, cond, role) for role in ("current", "reference"))
    return float(squared_error(*fields).mean())


@pytest.mark.parametrize("n", [1, 6, 7, 8, 14, 15, 16, 64])
def test_rows_are_divided_once_in_whole_pairs_and_alike_on_ranks(n: int) -> None:
    late, early = (rows.tolist() for rows in late_rows(n, "cpu"))
    assert sorted(late + early) == list(range(n))
    assert late == [i for i in range(n) if i % 8 >= 6]
    assert early == sorted(early)


def test_late_times_go_back_to_the_reference_and_early_ones_stay() -> None:
    """From a policy far from the reference, with a reward that moves nothing."""
    model = make(env=narrow_linear(), max_time=1.0, alpha=0.0, tau=1.0, learning_rate=RATE, n_epochs=4)
    model.learn(4 * 256)
    model.policy.networks.update_copy("behaviour", 0.0)
    moved = [distance(model, 0.0, 0.3), distance(model, 0.5, 1.0)]
    model.config = replace(model.config, max_time=0.4, late_anchor=1.0, tau=0.0)
    model.learn(6 * 256, reset_num_timesteps=False)
    early, late = distance(model, 0.0, 0.3), distance(model, 0.5, 1.0)
    assert late < 0.1 * moved[1]
    assert early == pytest.approx(moved[0], rel=0.35)


def test_the_gradient_is_that_of_both_parts() -> None:
    """The early rows by the loss, the late ones by a distance that is computed here."""
    model, c = make(late_anchor=0.3, alpha=0.0, baseline="mean"), 0.3
    model.learn(256)
    batch = next(model.minibatches())
    late, early = late_rows(64, DEVICE)
    state = model.generator.get_state()

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in model.policy.parameters_of("current").values()]
        model.policy.optimizer.zero_grad()
        return found

    model.policy.optimizer.zero_grad()
    figures = model.gradient(batch)
    whole = gradients()

    model.generator.set_state(state)
    part = type(batch)(*(field[early] for field in batch[:5]), extra={k: v[early] for k, v in batch.extra.items()})
    loss, _ = model.loss(part)
    x_1 = batch.x_1[late]
    x_0, t = model.policy.noise(len(late), model.generator), torch.rand(16, generator=model.generator, device=DEVICE)
    t = 0.4 + 0.6 * t
    x_t, _ = interpolate(x_0, x_1, t)
    cond = model.policy.condition(batch.context_ids[late])
    v, v_ref = (model.policy.velocity(x_t, t, cond, role, exact=True) for role in ("current", "reference"))
    strayed = (v - v_ref.detach()).square().mean()
    (loss + c * strayed).backward()
    torch.testing.assert_close(whole, gradients(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(figures["late_drift"], strayed.detach(), atol=1e-7, rtol=1e-5)


def test_samples_that_passes_take_more_often_count_less_at_late_times() -> None:
    model = make("nft", group_size=8, priority=0.75, late_anchor=0.3)
    model.learn(256)
    batch, (late, _), size = next(model.minibatches()), late_rows(64, DEVICE), model.buffer.coefficient.abs()
    model.loss = lambda part: (sum(p.sum() for p in model.policy.parameters_of("current").values()), {})
    state = model.generator.get_state()
    figures = model.gradient(batch)
    model.generator.set_state(state)
    x_0, t = model.policy.noise(len(late), model.generator), torch.rand(16, generator=model.generator, device=DEVICE)
    x_t, _ = interpolate(x_0, batch.x_1[late], 0.4 + 0.6 * t)
    cond = model.policy.condition(batch.context_ids[late])
    v, v_ref = (model.policy.velocity(x_t, 0.4 + 0.6 * t, cond, role) for role in ("current", "reference"))
    importance = 1 / (0.25 + 0.75 * size.mean().reciprocal() * batch.coefficient[late].abs())
    expected = (importance * (v - v_ref).square().mean(1)).mean()
    torch.testing.assert_close(figures["late_drift"], expected.detach(), atol=1e-7, rtol=1e-4)


def test_a_small_last_minibatch_has_no_late_rows() -> None:
    model = make(n_samples=68, late_anchor=0.5)
    model.learn(68)
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters_of("current").values())
    assert model.last_logged["train/late_drift"] >= 0


@pytest.mark.parametrize("name", ["orw_w2", "tilt", "nft"])
def test_it_costs_no_more_and_is_logged(name: str) -> None:
    own = {"pool": 64} if name == "tilt" else {"group_size": 8} if name == "nft" else {"alpha": 0.0}
    with_it, without = (make(name, **own, **extra) for extra in ({"late_anchor": 0.5}, {}))
    for model in (with_it, without):
        model.learn(2 * 256)
    assert with_it.last_logged["train/late_drift"] >= 0
    assert with_it.policy.evaluations <= without.policy.evaluations


def test_processes_take_whole_eights() -> None:
    config = flowrl.ORWCFMW2.configure(
        settings={"n_samples": 48, "batch_size": 24, "max_time": 0.4, "late_anchor": 0.1}
    )
    config.check_ranks(1)
    config.check_ranks(3)
    with pytest.raises(ConfigError, match="8 rows together for late_anchor: batch_size = 24 must be a multiple of 16"):
        config.check_ranks(2)
    replace(config, n_samples=36, batch_size=32).check_ranks(2)  # of four rows none are late, whoever takes them
    with pytest.raises(ConfigError, match="the last minibatch of an epoch = 24 must be a multiple of 16"):
        replace(config, n_samples=56, batch_size=32).check_ranks(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"late_anchor": -0.1}, r"late_anchor must not be negative, not -0\.1"),
        (
            {"late_anchor": 0.1, "batch_size": 4},
            "two of 8 rows: batch_size = 4 must be at least that, or late_anchor 0",
        ),
        ({"late_anchor": 0.1, "max_time": 1.0}, r"late_anchor = 0\.1 does nothing without a max_time below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)
