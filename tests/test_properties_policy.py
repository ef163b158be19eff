"""Properties of policies: moving averages, and samples by their seeds."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from properties import (
    few,
    numbers,
    seeded,
    seeds,
    solvers,
)

import flowrl
from flowrl.sample import draw, seeded_noise

pytestmark = pytest.mark.on_device


@pytest.fixture(scope="module")
def model() -> flowrl.ORWCFMW2:
    settings = {"n_samples": 8, "batch_size": 4, "rollout_steps": 3, "ema_decay": 0.9}
    return flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings)


@given(numbers(0, 1), seeds)
def test_an_average_lies_between_what_it_was_and_what_is_trained(model, decay, seed) -> None:
    policy, noise = model.policy, seeded(seed)
    for role in ("current", "ema"):
        for p in policy.parameters_of(role).values():
            p.data.copy_(torch.randn(p.shape, generator=noise))
    before = {name: p.clone() for name, p in policy.parameters_of("ema").items()}
    policy.networks.update_copy("ema", decay)
    for name, p in policy.parameters_of("ema").items():
        current = policy.parameters_of("current")[name]
        torch.testing.assert_close(p, decay * before[name] + (1 - decay) * current, atol=1e-5, rtol=1e-5)
    policy.networks.update_copy("ema")
    assert all(torch.equal(p, policy.parameters_of("current")[n]) for n, p in policy.parameters_of("ema").items())


@few
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.integers(1, 9), solvers)
def test_a_sample_is_that_of_its_seed_whatever_the_batches(model, seeds, batch_size, solver) -> None:
    contexts = [None] * len(seeds)
    drawn = torch.cat(list(draw(model.policy, contexts, seeds, batch_size, role="reference")))
    singly = [next(draw(model.policy, [None], [seed], role="reference")) for seed in seeds]
    torch.testing.assert_close(drawn, torch.cat(singly), atol=1e-5, rtol=1e-5)
    x_0 = seeded_noise(seeds, (2,)).to(DEVICE)
    indices = torch.zeros(len(seeds), dtype=torch.long)
    whole = model.policy.sample_latents(indices, x_0=x_0, solver=solver, role="reference")
    parts = zip(indices.split(batch_size), x_0.split(batch_size))
    split = [model.policy.sample_latents(c, x_0=x, solver=solver, role="reference") for c, x in parts]
    torch.testing.assert_close(torch.cat(split), whole, atol=1e-5, rtol=1e-5)
