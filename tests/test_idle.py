"""Settings that do nothing beside the others: they are refused where they are given, and do nothing indeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowrl
from flowrl.errors import ConfigError
from flowrl.registry import algorithm_class, environment_spec
from flowrl.runs.commandline import second_pass
from flowrl.suites.suite import load_suite
from flowrl.training.construction import check_idle

SMALL = {"n_samples": 16, "batch_size": 16}
IDLE = [
    ("orw_w2", "lora_targets", ("0",), {}, "without lora_rank"),
    ("orw_w2", "lora_dropout", 0.5, {}, "without lora_rank"),
    ("orw_w2", "context_weight", 2.0, {}, "unless coupling is 'c2ot'"),
    ("raft", "tau", 5.0, {"group_size": 8}, "where the best are kept"),
    ("rvm", "critic_width", 16, {"critic_learning_rate": 0.0}, "without critic_learning_rate"),
    ("rvm", "decay_rate", 0.3, {}, "without decay_hold"),
    ("adrpo", "decay_hold", 0.5, {}, "without decay_rate"),
    ("rvm", "decay_flat", 1, {}, "without decay_rate"),
    ("ram", "time_sampling", "logit_normal", {}, "with early_times"),
    ("awm", "ghuber_power", 0.5, {}, "unless error_weighting is 'ghuber'"),
    ("ddpo", "time_sampling", "logit_normal", {}, "for a loss at the sampler's own times"),
    ("ddpo", "dppo_delta", 1e-3, {}, "unless mask is 'dppo'"),
    ("ddpo", "clip_range", 0.3, {"variant": "sf", "rollout_steps": 2}, "unless variant is 'is'"),
    ("ddpo", "clip_range", 0.3, {"mask": "dppo"}, "with mask 'dppo'"),
    ("flow_grpo", "window_stride", 1, {}, "without window"),
    ("flow_grpo", "window_stride", 1, {"window": 2, "window_start": 1, "rollout_steps": 4}, "ends with the noisy"),
    ("orw_w2", "baseline", "mean", {"target": "plain"}, "unless target is 'residual'"),
    ("raft", "baseline", "mean", {"group_size": 8}, "unless target is 'residual'"),
    ("rwr", "refresh_every", 2, {}, "unless mode is 'online'"),
    ("dpok", "critic_learning_rate", 0.1, {"critic": False}, "without critic"),
    ("tilt", "critic_width", 16, {"control_variate": "one", "pool": 64}, "unless control_variate is 'critic'"),
    ("kl", "n_probes", 3, {"divergence": "exact"}, "for the exact divergence"),
    ("crd", "refresh_every", 3, {}, "unless decay is below 1"),
    ("draft", "refresh_every", 3, {}, "drawn anew"),
    ("refl", "half_buffer", True, {}, "drawn anew"),
    ("refl", "rollout_batch_size", 4, {}, "drawn anew"),
    ("draft", "offload", True, {}, "drawn anew"),
    ("orw", "reward_retries", 7, {}, "unless on_reward_error is 'retry'"),
    ("orw", "max_dropped", 0.5, {"on_reward_error": "retry"}, "unless on_reward_error is 'drop'"),
    ("adjoint", "time_sampling", "logit_normal", {"rollout_steps": 4}, "for a loss at the sampler's own times"),
]


def weights(name: str, settings: dict[str, Any]) -> torch.Tensor:
    cls = algorithm_class(name)
    steps = {} if name in ("kl", "adjoint") else {"rollout_steps": 4}
    model = cls("FlowPolicy", "gaussians-linear", config=cls.Config(**{**SMALL, **steps, **settings}), seed=0)
    model.learn(2 * SMALL["n_samples"])
    return torch.cat([parameter.detach().flatten() for parameter in model.policy.model.parameters()])


@pytest.mark.filterwarnings("ignore::UserWarning")  # about anchors and weights of so few samples
@pytest.mark.parametrize(("name", "setting", "value", "others", "reason"), IDLE)
def test_a_setting_that_does_nothing_is_refused_where_it_is_given(
    name: str, setting: str, value: Any, others: dict[str, Any], reason: str
) -> None:
    """In Python and on the command line; a stored config, which nobody gives now, is taken as it is."""
    cls = algorithm_class(name)
    with pytest.raises(ConfigError, match=rf"^{setting} = .* does nothing .*{reason}"):
        cls("FlowPolicy", "gaussians-linear", **{**SMALL, **others, setting: value})
    with pytest.raises(ConfigError, match=rf"^{setting} = .* does nothing .*{reason}"):
        second_pass(options(SMALL | others | {setting: value}), cls, None, None)
    assert torch.equal(weights(name, others), weights(name, {**others, setting: value}))


def options(settings: dict[str, Any]) -> list[str]:
    """Write settings as arguments of the command line."""
    found = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--algo.{option}" if value else f"--algo.no-{option}")
        else:
            found += [f"--algo.{option}", *(value if isinstance(value, tuple) else (str(value),))]
    return found


def test_settings_that_act_are_taken_and_so_are_those_that_are_off() -> None:
    for name, settings in {
        "nft": {"decay_rate": 0.0, "decay_hold": 0.0},
        "rvm": {"decay_rate": 0.1, "decay_hold": 0.5, "decay_flat": 1},
        "ram": {"early_times": False, "time_sampling": "logit_normal"},
        "orw_w2": {"lora_rank": 2, "lora_alpha": 3.0},
        "draft": {"alpha": 0.1, "time_sampling": "logit_normal"},
    }.items():
        algorithm_class(name)("FlowPolicy", "gaussians-linear", **SMALL, **settings)


def test_a_suite_with_a_setting_that_does_nothing_is_refused_before_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "idle.toml"
    file.write_text(
        "seeds = [0]\nbudget = 1000\n[envs.gaussians-linear]\n"
        '[rows.RAFT]\nalgo = "raft"\nsweep = { tau = [1.0, 2.0] }\n'
    )
    with pytest.raises(ConfigError, match=r"Row 'RAFT' on 'gaussians-linear': tau = 2\.0 does nothing"):
        load_suite(str(file))


def test_an_algorithm_of_ones_own_says_which_of_its_settings_do_nothing() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class OwnConfig(flowrl.FlowConfig):
        bonus: bool = False
        size: float = 1.0

        def idle(self) -> dict[str, str]:
            return super().idle() | ({} if self.bonus else {"size": "without bonus"})

    class Own(flowrl.FlowAlgorithm):
        Config = OwnConfig

        def loss(self, batch: Any) -> Any:
            return self.error(self.pair(batch)).mean(), {}

    with pytest.raises(ConfigError, match=r"size = 2\.0 does nothing without bonus"):
        Own("FlowPolicy", "gaussians-linear", size=2.0)
    Own("FlowPolicy", "gaussians-linear", size=2.0, bonus=True)


def test_what_an_environment_recommends_may_be_given() -> None:
    """The head of a run prints it, whether the algorithm has a use for it or not, and what is printed can be given."""
    spec, raft = environment_spec("sd3-count"), algorithm_class("raft")
    recommended = spec.recommended(spec.config)
    tau = recommended["tau"]
    assert tau != raft.Config().tau
    _, config, _ = second_pass(["--algo", "raft", "--env", spec.name, f"--algo.tau={tau}"], raft, spec, None)
    assert config.tau == tau
    check_idle(config, ["tau"], recommended)
    with pytest.raises(ConfigError, match=r"tau = .* does nothing"):
        check_idle(config, ["tau"], {})
