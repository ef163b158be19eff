"""CUDA graphs without CUDA: a tape of the operations, which is played again on the very same tensors, stands in.

As a graph it does nothing on the host: whatever a step does there is missing from the replay, and whatever changes
its address is not seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowrl
from flowrl.registry import ALGORITHMS
from flowrl.training import graphs

REPLAYABLE = sorted(name for name, cls in ALGORITHMS.items() if vars(cls).get("replayable"))


class Recorder(TorchDispatchMode):
    """Operations as they are done, and what the tensors that they write to held before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("the host waits for the device")
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                self.before += [(t, t.clone()) for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


class Tape:
    """What `CudaGraph` is, of operations on the CPU."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.recorder, self.generators = Recorder(), [torch.default_generator, *generators]

    @contextmanager
    def capturing(self) -> Iterator[None]:
        states = [generator.get_state() for generator in self.generators]
        with self.recorder:
            yield
        for tensor, content in reversed(self.recorder.before):  # a graph captures work without doing it
            tensor.detach().copy_(content)
        for generator, state in zip(self.generators, states):
            generator.set_state(state)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)

    @staticmethod
    @contextmanager
    def strict() -> Iterator[None]:
        with Recorder():
            yield

    @staticmethod
    def default_generator(device: torch.device) -> torch.Generator:
        return torch.default_generator


def trained(cls: type[Any], env: str, iterations: int, with_graphs: bool, **settings: Any) -> Any:
    settings = {"n_samples": 24, **settings}
    model = cls("FlowPolicy", env, seed=0, device="cpu", **settings)
    model.policy.graphs.is_on = with_graphs
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="The weights are worth|Nothing was learnt|The flow fits its own")
        model.learn(settings["n_samples"] * iterations)
    return model


def assert_same(model: Any, other: Any) -> None:
    for role in model.policy.roles:
        for name, parameter in model.policy.parameters_of(role).items():
            assert torch.equal(parameter, other.policy.parameters_of(role)[name]), (role, name)
    assert model.policy.evaluations == other.policy.evaluations
    assert torch.equal(model.generator.get_state(), other.generator.get_state())
    for name, value in model.last_logged.items():
        assert name == "time/samples_per_second" or value == other.last_logged[name], name


@pytest.fixture(autouse=True)
def _tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CudaGraph", Tape)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"batch_size": 8},
    "several passes, a smaller last minibatch": {"batch_size": 9, "n_epochs": 2},
    "warm-up, average": {"batch_size": 12, "warmup_updates": 100, "ema_decay": 0.9},
    "accumulation": {"batch_size": 4, "accumulation": 3},
    "lagging": {"batch_size": 12, "refresh_every": 2},
}


CASES = [("orw_w2", case) for case in SETTINGS] + [(name, "accumulation") for name in REPLAYABLE if name != "orw_w2"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_replays_give_the_same_run(name: str, case: str) -> None:
    cls, settings = ALGORITHMS[name], SETTINGS[case]
    if "steps" in cls.kind:
        settings = {**settings, "batch_size": 9 * settings["batch_size"]}
    if cls.Config.group_size > 1:
        settings = {"group_size": 4, **settings}
    if name == "tilt":
        settings = {"pool": 64, **settings}
    eager, replayed = (trained(cls, "gaussians-linear", 6, is_on, **settings) for is_on in (False, True))
    assert len(replayed.policy.graphs._captured) >= 2
    assert_same(eager, replayed)


def test_working_copies_are_up_to_date_in_replays() -> None:
    settings = {
        "env_settings": {"flow": "mini-sd3", "resolution": 32},
        "lora_rank": 4,
        "rollout_steps": 2,
        "n_samples": 4,
    }
    settings |= {
        "group_size": 2,
        "batch_size": 2,
        "guidance_scale": 2.0,
        "learning_rate": 1e-2,
        "lr_schedule": "constant",
    }
    eager, replayed = (trained(flowrl.ORWCFMW2, "sd3-count", 4, is_on, **settings) for is_on in (False, True))
    assert len(replayed.policy.graphs._captured) == 3  # sampling, updates, gradient steps
    assert_same(eager, replayed)


def test_a_falling_rate_takes_no_graph_for_each_of_its_values() -> None:
    settings = {"batch_size": 6, "lr_schedule": "linear"}
    eager, replayed = (trained(flowrl.ORWCFMW2, "gaussians-linear", 5, is_on, **settings) for is_on in (False, True))
    assert sorted(key[0] for key in replayed.policy.graphs._captured) == ["An update", "Sampling"]
    assert_same(eager, replayed)


def test_samples_without_guidance_are_no_replay_of_guided_ones() -> None:
    settings = {"flow": "mini-sd3", "resolution": 32}
    policy = flowrl.FlowPolicy.of(
        "sd3-count", flowrl.FlowConfig(guidance_scale=3.0), device="cpu", seed=0, env_settings=settings
    )
    ids, x_0 = torch.tensor([0, 1]), policy.noise(2)
    plain = policy.sample_latents(ids, x_0=x_0, steps=2, guidance_scale=0.0)
    policy.graphs.is_on = True
    guided = [policy.sample_latents(ids, x_0=x_0, steps=2) for _ in range(4)]
    assert policy.graphs._captured
    assert torch.equal(policy.sample_latents(ids, x_0=x_0, steps=2, guidance_scale=0.0), plain)
    assert not torch.equal(guided[-1], plain)


class ReadsNumbers(flowrl.ORWCFMW2):
    replayable = True

    def loss(self, batch: Any) -> Any:
        loss, figures = super().loss(batch)
        return loss * (1 + 0 * loss.item()), figures


def test_a_loss_that_waits_for_the_device_is_not_captured() -> None:
    settings = {"batch_size": 8, "baseline": "clipped"}  # a critic would have learnt from the call that was given up
    eager = trained(ReadsNumbers, "gaussians-linear", 4, False, **settings)
    model = ReadsNumbers("FlowPolicy", "gaussians-linear", seed=0, device="cpu", n_samples=24, **settings)
    model.policy.graphs.is_on = True
    with pytest.warns(UserWarning, match="An update runs without CUDA graphs, which cannot hold it: the host waits"):
        model.learn(24 * 4)
    assert_same(eager, model)


def test_a_subclass_says_for_itself_that_it_can_be_replayed() -> None:
    class Scheduled(flowrl.ORWCFMW2):
        def penalty(self, t: torch.Tensor) -> torch.Tensor:
            return torch.full_like(t, float(self.iteration))

    eager, other = (trained(Scheduled, "gaussians-linear", 4, is_on, batch_size=8) for is_on in (False, True))
    assert not [key for key in other.policy.graphs._captured if "An update" in key]
    assert_same(eager, other)


def test_prompts_that_come_later_are_seen() -> None:
    policy = flowrl.FlowPolicy.of("sd3-count", device="cpu", seed=0, env_settings={"flow": "mini-sd3"})
    policy.graphs.is_on = True
    first, x_0 = policy.contexts[0], policy.noise(2)
    wanted = [policy.sample([first, first], x_0=x_0, steps=2) for _ in range(4)]
    assert all(torch.equal(wanted[0], again) for again in wanted)
    assert policy.graphs._captured
    policy.sample(["a star"], steps=2)
    assert not policy.graphs._captured  # the encoded prompts have moved
    assert torch.equal(policy.sample([first, first], x_0=x_0, steps=2), wanted[0])
    assert torch.equal(policy.sample([first, first], x_0=x_0, steps=2), wanted[0])
    assert not torch.equal(policy.sample(["a star", "a star"], x_0=x_0, steps=2), wanted[0])
