"""Working copies: passes without gradients on merged adapters, in the type that is computed in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_large_models import algorithm, folder, point

from flowrl.errors import ConfigError
from flowrl.training import role_networks
from flowrl.training.working_copies import rounded_at_random

__all__ = ["folder"]  # a fixture


def moved(model, size: float = 0.05) -> None:
    """Move every role's adapter, each another way."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in model.policy.roles:
            for parameter in model.policy.parameters_of(role).values():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_merged_is_what_adapters_compute(folder: Path, precision: str, bound: float) -> None:
    policy = algorithm(folder, lora_rank=4, precision=precision, ema_decay=0.5, refresh_every=2).policy
    model = policy.model.network
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    moved(type("", (), {"policy": policy}))
    with torch.no_grad():
        reference = policy.velocity(*point(policy), "reference")
        for role in ("current", "behaviour", "ema"):
            merged, apart = (policy.velocity(*point(policy), role, exact=exact) for exact in (False, True))
            assert (merged - apart).norm() <= bound * apart.norm(), role
            assert (apart - reference).norm() > 5 * bound * apart.norm(), "the adapter does something"
        assert torch.equal(reference, policy.velocity(*point(policy), "reference", exact=True))
    frozen = [name for name in before if ".base_layer." in name]
    assert frozen
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in frozen), "never merged in place"


def test_the_trained_pass_is_the_exact_one(folder: Path) -> None:
    model = algorithm(folder, lora_rank=4)
    moved(model)
    with_gradients = model.policy.velocity(*point(model.policy))
    with torch.no_grad():
        assert torch.equal(with_gradients, model.policy.velocity(*point(model.policy), exact=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_copies_follow_their_role(folder: Path, precision: str) -> None:
    model = algorithm(folder, lora_rank=4, precision=precision, refresh_every=2, learning_rate=0.05)
    policy = model.policy

    @torch.no_grad()
    def is_up_to_date() -> bool:
        pairs = [[policy.velocity(*point(policy), r, exact=e) for e in (0, 1)] for r in ("current", "behaviour")]
        return all((a - b).norm() <= (1e-5 if precision == "float32" else 0.02) * b.norm() for a, b in pairs)

    assert is_up_to_date()
    model.learn(4)  # gradient steps
    assert is_up_to_date()
    moved(model)  # in place, by anyone
    assert is_up_to_date()
    policy.networks.update_copy("behaviour")
    assert is_up_to_date()
    state = model.get_parameters()
    moved(model)
    assert is_up_to_date()
    model.set_parameters(state)
    assert is_up_to_date()


def test_full_fine_tuning_in_bfloat16_computes_on_copies(folder: Path) -> None:
    model = algorithm(folder, precision="bfloat16", refresh_every=2)
    policy = model.policy
    moved(model, 0.02)
    with torch.no_grad():
        for role in ("current", "behaviour"):
            copied, own = (policy.velocity(*point(policy), role, exact=exact) for exact in (False, True))
            assert (copied - own).norm() <= 0.03 * own.norm(), role
    assert policy.networks.working("behaviour").network.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.networks.model_of("behaviour").network.parameters())
    size = sum(p.numel() for p in policy.model.network.parameters())
    assert policy.networks.working_bytes >= 2 * 2 * size  # two roles, two bytes each


def test_no_copy_where_the_network_itself_serves(folder: Path) -> None:
    model = algorithm(folder)
    model.learn(4)
    assert model.policy.networks.working_bytes == 0
    lora = algorithm(folder, lora_rank=4, refresh_every=2)
    lora.learn(4)
    assert set(lora.policy.networks._working) == {"reference", "behaviour"}  # the trained one draws nothing


@pytest.mark.parametrize(("precision", "small", "copies"), [("float32", 0, 1), ("bfloat16", 0, 1), ("float32", 1e8, 3)])
def test_roles_of_large_networks_take_turns_in_one_merged_copy(
    folder: Path, precision: str, small: float, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are drawn by the moving average: a copy for it, too, would be as large as that of the rollouts.

    Small networks, of which an update may be one CUDA graph, have one for each role: a graph holds where they are, but
    not whose adapter is in them.
    """
    monkeypatch.setattr(role_networks, "SMALL", small)
    model = algorithm(folder, lora_rank=4, precision=precision, ema_decay=0.5, refresh_every=2)
    moved(model)
    policy, roles = model.policy, ("ema", "behaviour", "current")
    with torch.no_grad():
        first = [policy.velocity(*point(policy), role) for role in roles]
        size = sum(weight.nbytes for weight, _ in policy.networks._working["ema"].pairs)  # type: ignore[attr-defined]
        assert policy.networks.working_bytes == copies * size
        for role, v in [*zip(roles, first), ("ema", first[0])]:
            assert torch.equal(policy.velocity(*point(policy), role), v), role
    assert not torch.equal(first[0], first[1])


def test_rounding_at_random_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1.0, 1.0 + 2**-10, -1.0 - 2**-10, 3e-5, 0.0]).repeat(40_000, 1)  # bfloat16 steps by 2**-7 at 1
    rounded = rounded_at_random(x.clone(), generator)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert (rounded - x).abs().max() <= 2**-7
    torch.testing.assert_close(rounded.mean(0), x[0], rtol=2e-4, atol=0)
    assert torch.equal(rounded[:, 0], x[:, 0])
    assert torch.equal(rounded[:, 4], x[:, 4])


def test_small_changes_are_not_lost_in_bfloat16() -> None:
    """To the nearest, weights on bfloat16's grid would forget an adapter of less than half a step."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator).bfloat16().float()
    change = 1e-3 * torch.randn(256, 1, generator=generator) * torch.randn(1, 256, generator=generator) * weight.abs()
    rounded = rounded_at_random(weight + change, generator) - weight
    kept = (rounded * change).sum() / change.square().sum()
    assert abs(kept - 1) < 0.1
    nearest = (weight + change).bfloat16().float() - weight
    assert (nearest * change).sum() / change.square().sum() < 0.7


def test_ratios_of_paths_start_at_one_with_adapters(folder: Path) -> None:
    model = algorithm(folder, "flow_grpo", lora_rank=4)
    moved(model)
    assert _floor(model) <= 1e-6
    model.learn(4)
    assert "train/ratio_floor" not in model.last_logged


def test_the_floor_of_ratios_is_measured_in_low_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = algorithm(folder, "flow_grpo", lora_rank=4, precision="bfloat16", clip_range=0.05)
    model.learn(4)
    assert 0 <= model.last_logged["train/ratio_floor"] < 0.05
    strict = algorithm(folder, "flow_grpo", lora_rank=4, precision="bfloat16", clip_range=1e-4)
    monkeypatch.setattr(strict, "ratio_floor", lambda: torch.tensor(3e-4))
    with pytest.raises(
        ConfigError, match=r"clip_range = 0.0001 is below 0.0003, .* bfloat16 .* Take precision float32"
    ):
        strict.learn(4)
    masked = algorithm(folder, "flow_grpo", lora_rank=4, precision="bfloat16", mask="dppo")  # clips nothing
    monkeypatch.setattr(masked, "ratio_floor", lambda: torch.tensor(3e-4))
    masked.learn(4)
    assert masked.last_logged["train/ratio_floor"] == pytest.approx(3e-4)


def _floor(model) -> torch.Tensor:
    from stable_baselines3.common.callbacks import CallbackList

    callback = CallbackList([])
    model._setup_learn(4, callback, True, "", False)
    model.collect(callback)
    return model.ratio_floor()


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_without_working_copies_adapters_are_beside_the_weights(
    folder: Path, lora_rank: int, precision: str, bound: float
) -> None:
    settings = {"lora_rank": lora_rank, "precision": precision, "ema_decay": 0.5, "refresh_every": 2}
    settings |= {"lora_dropout": 0.3} if lora_rank else {}
    on, off = (algorithm(folder, working_copies=c, **settings).policy for c in ("on", "off"))
    for policy in (on, off):
        moved(SimpleNamespace(policy=policy), 0.05 if lora_rank else 0.02)
        policy.set_training_mode(True)  # passes by the weights have no dropout all the same
    with torch.no_grad():
        for role in (*on.roles, "reference"):
            merged, apart = (policy.velocity(*point(policy), role) for policy in (on, off))
            assert (merged - apart).norm() <= bound * (2 if not lora_rank else 1) * apart.norm(), role
            if role != "current":
                assert torch.equal(apart, off.velocity(*point(off), role, exact=True)), role
        x_0 = torch.randn(2, *on.model.latent_shape, generator=torch.Generator().manual_seed(1))
        drawn = [policy.sample_latents(torch.arange(2), x_0=x_0, role="behaviour") for policy in (on, off)]
        assert (drawn[0] - drawn[1]).norm() <= bound * drawn[1].norm()
    assert off.networks.working_bytes == 0
    assert bool(on.networks.working_bytes) == (bool(lora_rank) or precision == "bfloat16")


def test_training_without_working_copies_follows_the_roles(folder: Path) -> None:
    model = algorithm(folder, lora_rank=4, refresh_every=2, learning_rate=0.05, working_copies="off")
    model.learn(8)
    policy = model.policy
    with torch.no_grad():
        current, behaviour = (policy.velocity(*point(policy), role) for role in ("current", "behaviour"))
        assert torch.equal(current, policy.velocity(*point(policy), "current", exact=True))
        assert torch.equal(current, behaviour), "refreshed after two iterations"
        moved(model)
        assert not torch.equal(current, policy.velocity(*point(policy)))
    assert policy.networks.working_bytes == 0
