"""Environment `darcy`: stencil, solver, latents, reward and judges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flowrl
from flowrl.envs.darcy import FLOOR, DarcyEnv
from flowrl.envs.darcy_data import CONTRAST, KINDS, LENGTHS, random_log_k, solved_pairs
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.functional.darcy import LARGEST_LOG, conductances, energy, residual, sines, solve
from flowrl.functional.metrics import quantile_distance, spectrum, spectrum_distance
from flowrl.models.darcy import DarcyFlow
from flowrl.models.loading import source_of
from flowrl.models.unet import UNetShape


@pytest.fixture(scope="module")
def pairs() -> torch.Tensor:
    """Eight pairs that the solver made, kinds in turn."""
    return solved_pairs(8, 32, torch.Generator().manual_seed(3))[0]


@pytest.fixture(scope="module")
def env() -> flowrl.GenerationEnv:
    return flowrl.make("darcy", gradient="exact")


def manufactured(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log K = x + 2 y, p = sin(pi x) sin(2 pi y) at the nodes, and f = -div(K grad p) at the inner ones."""
    x, y = torch.meshgrid(*(torch.linspace(0, 1, n, dtype=torch.float64),) * 2, indexing="ij")
    p, k = (math.pi * x).sin() * (2 * math.pi * y).sin(), (x + 2 * y).exp()
    dx = math.pi * (math.pi * x).cos() * (2 * math.pi * y).sin()
    dy = 2 * math.pi * (math.pi * x).sin() * (2 * math.pi * y).cos()
    f = k * (5 * math.pi**2 * p - dx - 2 * dy)
    return (x + 2 * y)[None], p[None], f[None, 1:-1, 1:-1]


def test_the_stencil_is_of_second_order() -> None:
    errors = []
    for n in (17, 33, 65):
        log_k, p, f = manufactured(n)
        errors.append(residual(log_k, p, f).square().mean().sqrt().item())
        errors.append((solve(log_k, f) - p).square().mean().sqrt().item())
    for coarse, fine in zip(errors[:4], errors[2:]):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)
    assert errors[5] < 1e-3


def test_a_flux_through_layers_is_exact() -> None:
    """In series the harmonic mean is right: p falls by 1 / K in each layer, and div vanishes, whatever K does."""
    layers = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    log_k = layers[:, None].expand(5, 5)
    down, right = conductances(log_k)
    assert down[1].tolist() == pytest.approx([2 / (math.exp(-1.0) + math.exp(1.0))] * 5)
    assert right[1].tolist() == pytest.approx([math.e] * 4)
    p = torch.cat([torch.zeros(1), (1 / down[:, 0]).cumsum(0)])[:, None].expand(5, 5)
    assert residual(log_k, p, 0.0).abs().max() < 1e-12


@pytest.mark.parametrize("size", [8, 32])
def test_the_solvers_answer_has_no_residual(size: int) -> None:
    log_k = random_log_k(torch.arange(4) % 2, size, torch.Generator().manual_seed(0)).double()
    p = solve(log_k)
    assert residual(log_k, p).abs().max() < 1e-10
    assert p[:, 0].abs().max() == p[:, :, -1].abs().max() == 0
    assert p[:, 1:-1, 1:-1].min() > 0  # a maximum principle
    assert (solve(log_k.float()) - p).abs().max() < 1e-6
    twice = solve(log_k, 2.0)
    torch.testing.assert_close(twice, 2 * p)


def test_sines_diagonalise_the_stencil() -> None:
    vectors, values = sines(9)
    torch.testing.assert_close(vectors @ vectors, torch.eye(7, dtype=torch.float64))
    u = torch.randn(1, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.nn.functional.pad(u, (1, 1, 1, 1))
    spectral = vectors @ ((values[:, None] + values) * (vectors @ u @ vectors)) @ vectors
    torch.testing.assert_close(residual(torch.zeros(1, 9, 9), p, 0.0), spectral)


def test_fields_have_their_covariance() -> None:
    kinds = torch.arange(4000) % 2
    fields = random_log_k(kinds, 16, torch.Generator().manual_seed(0)) / CONTRAST
    for index, kind in enumerate(KINDS):
        mine = fields[kinds == index]
        assert mine.mean().abs() < 0.05
        assert mine.std().item() == pytest.approx(1, abs=0.03)
        for row, column in ((5, 5), (5, 7), (7, 7)):
            squared = ((row - 5) ** 2 + (column - 5) ** 2) / 15**2
            expected = math.exp(-squared / (2 * LENGTHS[kind] ** 2))
            if kind == "two-phase":
                expected = 2 / math.pi * math.asin(expected)  # of signs of Gaussians
            assert (mine[:, 5, 5] * mine[:, row, column]).mean().item() == pytest.approx(expected, abs=0.07)
    assert fields[kinds == 1].abs().unique().tolist() == [1.0]


def flow_of(size: int = 12, **scales: float) -> DarcyFlow:
    return DarcyFlow(UNetShape(2, size, (8, 8), classes=KINDS), **scales)


@pytest.mark.parametrize("order", [0.0, 1.5, 2.0])
def test_latents_and_samples_are_each_others_inverse(order: float) -> None:
    flow = flow_of(scale=0.3, order=order, log_scale=0.7)
    z = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow.encode_samples(flow.decode(z)), z, atol=1e-4, rtol=1e-4)


def test_the_zero_latent_is_the_pressure_of_uniform_permeability() -> None:
    log_k, p = flow_of(order=2.0).decode(torch.zeros(1, 2, 12, 12)).unbind(1)
    assert residual(log_k, p).abs().max() < 1e-4
    torch.testing.assert_close(p, solve(log_k), atol=1e-6, rtol=1e-4)


def test_latents_of_order_two_are_sources() -> None:
    """With K = 1 the residual is u itself."""
    flow = flow_of(scale=1.0, order=2.0)
    z = torch.randn(1, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    z[:, 0] = 0
    z[:, 1, [0, -1]] = 0
    z[:, 1, :, [0, -1]] = 0
    log_k, p = flow.decode(z).unbind(1)
    torch.testing.assert_close(residual(log_k, p).float(), z[:, 1, 1:-1, 1:-1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "scale must be a number"),
        ({"order": float("nan")}, "order must be a number"),
        ({"log_scale": "1"}, "log_scale must be a number"),
    ],
)
def test_scales_without_meaning(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flow_of(**settings)


def test_a_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": "darcy", "size": 12, "widths": [8, 8], "channels": 3}')
    with pytest.raises(ModelLoadError, match="2 channels and a size of at least 4, not 3 and 12"):
        source_of(str(tmp_path))


def test_reward_is_minus_the_logarithm_of_the_mean_squared_residual(env: DarcyEnv, pairs: torch.Tensor) -> None:
    wrong = pairs.clone()
    wrong[:, 1] *= 1.1  # the equation is linear in p: the residual is a tenth of f everywhere
    output = env.evaluate(wrong, torch.arange(8) % 2)
    assert output.reward.tolist() == pytest.approx([-math.log(0.01)] * 8, rel=1e-3)
    assert output.components["residual"].tolist() == pytest.approx([0.01] * 8, rel=2e-3)
    exact = env.evaluate(pairs, torch.arange(8) % 2).reward
    assert exact.min() > 15
    assert exact.max() <= -math.log(FLOOR)
    assert env.evaluate(torch.zeros(1, 2, 32, 32), torch.zeros(1, dtype=torch.long)).reward.item() == 0  # r = -f


def test_gradient_of_the_reward(env: DarcyEnv, pairs: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 0.001]).view(1, 2, 1, 1)
    x = (pairs[:2] + scale * torch.randn(2, 2, 32, 32, generator=generator)).double().requires_grad_()
    direction = scale * torch.randn(2, 2, 32, 32, generator=generator)

    def logarithm(samples: torch.Tensor) -> torch.Tensor:
        return -residual(samples[:, 0], samples[:, 1]).square().mean((1, 2)).log()

    torch.testing.assert_close(env.reward(x, ["lognormal", "two-phase"]).reward, logarithm(x).float())
    (gradient,) = torch.autograd.grad(env.reward(x, ["lognormal", "two-phase"]).reward.sum(), x)
    with torch.no_grad():
        step = 1e-5
        numeric = (logarithm(x + step * direction) - logarithm(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), numeric, rtol=1e-5, atol=1e-7)


def test_a_mixed_gradient_leaves_values_alone(pairs: torch.Tensor) -> None:
    """Half of the gradient is that of the energy's logarithm."""
    x = (pairs[:2] * 1.1).requires_grad_()
    exact, mixed = (flowrl.make("darcy", gradient=kind).reward(x, KINDS).reward for kind in ("exact", "mixed"))
    assert torch.equal(exact, mixed)
    of_energy = -energy(residual(x[:, 0], x[:, 1])).log()
    half = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] / 2 for part in (exact, of_energy)]
    torch.testing.assert_close(torch.autograd.grad(mixed.sum(), x)[0], half[0] + half[1], rtol=1e-4, atol=1e-4)


def test_energy_of_a_residual() -> None:
    """For K = 1 it is `|grad e|^2`, the sum of squared differences between neighbours."""
    e = torch.zeros(1, 9, 9, dtype=torch.float64)
    e[:, 1:-1, 1:-1] = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    differences = sum(8**2 * e.diff(dim=axis).square().sum() for axis in (1, 2))
    torch.testing.assert_close(energy(residual(torch.zeros_like(e), e, 0.0)), (differences / 49)[None])


def test_rewards_stay_finite(env: DarcyEnv) -> None:
    wild = 1e6 * torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    assert env.evaluate(wild, torch.zeros(4, dtype=torch.long)).reward.isfinite().all()
    assert conductances(torch.full((1, 3, 3), 50.0))[0].max().item() == pytest.approx(math.exp(LARGEST_LOG))


def test_judges(env: DarcyEnv, pairs: torch.Tensor) -> None:
    contexts = [KINDS[i % 2] for i in range(8)]
    right = env.errors(pairs, contexts)
    assert right["pressure error"].max() < 1e-5
    assert right["wall error"].max() == 0
    wrong = pairs.clone()
    wrong[:, 1] *= 1.1
    assert env.errors(wrong, contexts)["pressure error"].tolist() == pytest.approx([0.1] * 8, rel=1e-3)
    wrong = pairs.clone()
    size = pairs[:, 1].square().mean((1, 2)).sqrt()
    wrong[:, 1, 0] += size[:, None]  # one of four walls
    expected = math.sqrt(32 / (4 * 31))
    assert env.errors(wrong, contexts)["wall error"].tolist() == pytest.approx([expected] * 8, rel=1e-5)


def test_judges_of_all_samples_together(env: DarcyEnv) -> None:
    """Fields of the data are as near as other fields of the data; a flat field is as far as it can be."""
    kinds = torch.arange(256) % 2
    contexts = [KINDS[i] for i in kinds.tolist()]
    log_k = random_log_k(kinds, 32, torch.Generator().manual_seed(11))
    data = torch.stack([log_k, torch.zeros_like(log_k)], dim=1)
    near, flat = (env.errors_of_all(samples, contexts, seed=5) for samples in (data, torch.zeros_like(data)))
    again = random_log_k(kinds, 32, torch.Generator().manual_seed(5))
    same = env.errors_of_all(torch.stack([again, torch.zeros_like(again)], dim=1), contexts, seed=5)
    assert list(same.values()) == pytest.approx([0, 0, 0], abs=1e-5)
    assert flat["spectrum of log K"] == pytest.approx(1)
    assert flat["W2 of log K"] == pytest.approx(32 * CONTRAST, rel=0.05)
    assert flat["values of log K"] == pytest.approx(CONTRAST * (1 + math.sqrt(2 / math.pi)) / 2, rel=0.05)
    assert near["spectrum of log K"] < 0.2
    assert near["values of log K"] < 0.1


def test_distances_of_values_and_spectra() -> None:
    a = torch.randn(50, 8, 8, generator=torch.Generator().manual_seed(0))
    assert quantile_distance(a, a.flip(0) + 0.5) == pytest.approx(0.5)
    assert spectrum_distance(2 * a, a) == pytest.approx(3)
    assert spectrum(a).sum().item() == pytest.approx(a.double().square().sum((1, 2)).mean().item())  # orthonormal
    x = torch.arange(8) + 0.5
    wave = (3 * math.pi / 8 * x).cos().expand(1, 8, 8)
    assert int(spectrum(wave).argmax()) == 3
    with pytest.raises(ConfigError, match="as many"):
        quantile_distance(a, a[:1])


def test_the_shipped_flow(env: DarcyEnv) -> None:
    """It draws fields like the data, whose pressures break the equation a little."""
    policy = flowrl.FlowPolicy.of(env, device="cpu", seed=0)
    result = flowrl.evaluate(policy, env, n_samples=128, steps=10)
    reference = result.reference
    assert reference is not None
    assert 0.01 < reference.components["residual"] < 2
    assert 0.002 < reference.side["pressure error"] < 0.2
    assert reference.side["wall error"] < 0.1
    assert reference.side["spectrum of log K"] < 0.3
    assert list(result.side) == list(reference.side)


def test_a_flow_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pairs of shape \(2, n, n\), not \(50,\)"):
        flowrl.make("darcy", flow="plans")


def test_pictures_show_both_fields(env: DarcyEnv, pairs: torch.Tensor, tmp_path: Path) -> None:
    from flowrl.runs.pictures import save_picture

    pictures = env.pictures(pairs)
    assert pictures.shape == (8, 3, 96, 194)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    save_picture(pairs[:4], KINDS * 2, env, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (2 * 196 + 2, 2 * 98 + 2)
    made = flowrl.make("darcy", render_mode="rgb_array")
    made.reset(seed=0)
    made.step(pairs[0].numpy())
    drawn = made.render()
    assert isinstance(drawn, np.ndarray)
    assert drawn.shape == (96, 194, 3)
    np.testing.assert_allclose(drawn / 255, pictures[0].permute(1, 2, 0).numpy(), atol=0.003)
