"""Which wrong formulas the tests notice: python tests/mutation_score.py [--only NAME] [--list]

Each mutation changes one sign, index or constant of a formula in a copy of the tree, and runs the tests that should
then fail. The exit code is 0 when they do for every mutation, 1 when one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT = 300
"""Seconds for the tests of one mutation."""


class Mutation(NamedTuple):
    """A wrong formula.

    Attributes:
        name: For `--only`.
        file: Relative to the repository.
        old: Text that occurs exactly once in it.
        new: What takes its place.
        tests: Files or nodes, below `tests/`, that must notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The file's text with the mutation.

        Raises:
            ValueError: The old text does not occur exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.old)} times, not once:\n{self.old}")
        return text.replace(self.old, self.new)


ADVANTAGES = "flowrl/functional/advantages.py"
STEPS = "flowrl/functional/solver_steps.py"
LOSSES, SAMPLER, FLOW = "flowrl/functional/losses.py", "flowrl/functional/solvers.py", "flowrl/functional/flow.py"
ORW, STEERING, ALGORITHM = "flowrl/orw_w2.py", "flowrl/evaluation/steering.py", "flowrl/training/algorithm.py"
SDE, TRANSPORT = "flowrl/functional/sde.py", "flowrl/functional/transport.py"
OF_LOSSES, OF_FLOW, OF_METRICS = ("test_losses.py",), ("test_flow.py",), ("test_metrics.py",)
NOISING, OF_SAMPLES = "flowrl/training/noising.py", "flowrl/training/endpoint_samples.py"
OF_ADVANTAGES = "test_couplings.py::test_transport_of_advantages_keeps_their_pull_and_the_noise_normal"
ENDPOINT, ENDPOINTS = "flowrl/functional/endpoint.py", "flowrl/training/endpoints.py"
ROW = "test_endpoint.py::test_one_refresh_ends_at_the_minimiser_of_the_row"
GRADIENT = "test_transitions.py::test_policy_gradient_is_the_gradient_of_the_expected_reward"
LOSS_BY_HAND = "test_transitions.py::test_losses_by_hand"
THREE_NETWORKS = "test_oracles.py::test_the_loss_is_that_of_the_three_networks"
MARGINALS = "test_transitions.py::test_sde_keeps_the_spread_of_a_gaussian"
SMC = "test_baselines.py::test_smc_reaches_the_tilt"
DENSITY = "test_baselines.py::test_log_prob_of_the_exact_field"

RBF = "test_steering.py::test_rbf_has_the_law_of_its_rules"
ROLLS = "test_steering.py::test_what_a_step_leaves_rolls_over"
D_FLOW = "test_steering.py::test_d_flow_finds_the_best_noise"

MUTATIONS = (
    # weights and losses
    Mutation("weight-sign", LOSSES, "exponent = tau * reward", "exponent = -tau * reward", OF_LOSSES),
    Mutation(
        "weight-normalisation", LOSSES, "weight = weight / weight.mean()", "weight = weight / weight.sum()", OF_LOSSES
    ),
    Mutation(
        "w2-penalty-sign",
        LOSSES,
        "_weighted_sum(errors, weight, penalty)",
        "_weighted_sum(errors, weight, -penalty)",
        OF_LOSSES,
    ),
    Mutation("residual-fit", LOSSES, "(errors, weight - baseline, ", "(errors, weight, ", OF_LOSSES),
    Mutation(
        "residual-baseline", LOSSES, "torch.minimum(weight + penalty", "torch.maximum(weight + penalty", OF_LOSSES
    ),
    Mutation("kl-time-weight", LOSSES, "(t / (1 - t)).clamp_max", "((1 - t) / t).clamp_max", OF_LOSSES),
    Mutation(
        "group-advantage-scale",
        ADVANTAGES,
        "std = group_mean(centred.square(), group, n_groups).sqrt()",
        "std = group_mean(centred.square(), group, n_groups)",
        ("test_transitions.py::test_group_advantage_by_hand",),
    ),
    Mutation(
        "group-advantage-sign",
        ADVANTAGES,
        "return (centred / (std + 1e-4))",
        "return (-centred / (std + 1e-4))",
        ("test_transitions.py::test_group_advantage_by_hand",),
    ),
    Mutation(
        "effective-sample-size",
        LOSSES,
        "weight.sum().square() / weight.square().sum()",
        "weight.sum() / weight.square().sum()",
        OF_LOSSES,
    ),
    Mutation(
        "best-of-groups",
        ADVANTAGES,
        "topk(min(n_best, table.shape[1]), dim=1)",
        "topk(min(n_best, table.shape[1]), dim=1, largest=False)",
        ("test_transitions.py::test_best_of_groups_by_hand",),
    ),
    # the loss of ORW-CFM-W2
    Mutation(
        "w2-anchor",
        ORW,
        'self.velocity(pair, "reference")',
        "self.velocity(pair, self.behaviour_role)",
        (THREE_NETWORKS,),
    ),
    Mutation(
        "residual-anchor",
        ORW,
        "base = self.velocity(pair, self.behaviour_role)",
        'base = self.velocity(pair, "reference")',
        (THREE_NETWORKS,),
    ),
    Mutation(
        "kl-penalty",
        ORW,
        "return self.config.alpha * kl_time_weight(t)",
        "return self.config.alpha / kl_time_weight(t)",
        ("test_oracles.py::test_orw_kl_weights_the_same_penalty_by_time",),
    ),
    Mutation(
        "coupled-weights",
        NOISING,
        "own(size.mean() * sign)",
        "own(coefficient[index])",
        (
            "test_oracles.py::test_the_loss_carries_the_reward",
            "test_oracles.py::test_optimal_transport_keeps_the_noise_standard_normal",
        ),
    ),
    Mutation(
        "coupled-sample",
        NOISING,
        "x_1, ids, sign = x_1[index], ids[index], coefficient[index].sign()",
        "ids, sign = ids[index], coefficient[index].sign()",
        ("test_oracles.py::test_the_loss_carries_the_reward",),
    ),
    Mutation("coupled-sign", NOISING, "own(size.mean() * sign)", "own(size.mean().expand(n))", (OF_ADVANTAGES,)),
    Mutation("coupled-sides", NOISING, "2 * ids + (sign < 0)", "ids", (OF_ADVANTAGES,)),
    Mutation("c2ot-sides", NOISING, "(sign < 0) * 1)", "ids * 0)", (OF_ADVANTAGES,)),
    Mutation(
        "c2ot-weight",
        TRANSPORT,
        "weight * torch.cdist(c, c).square()",
        "weight * torch.cdist(c, c)",
        ("test_couplings.py::test_conditional_transport_costs_least_of_all_permutations",),
    ),
    Mutation(
        "c2ot-mean",
        TRANSPORT,
        "x_0).square() / x_0.shape[1]",
        "x_0).square()",
        ("test_couplings.py::test_conditional_transport_costs_least_of_all_permutations",),
    ),
    Mutation(
        "c2ot-unit",
        NOISING,
        "c / (2 * spread).sqrt()",
        "c / spread.sqrt()",
        ("test_couplings.py::test_embeddings_are_one_apart_in_the_mean",),
    ),
    Mutation(
        "rectified-noise",
        NOISING,
        'return batch, batch.extra["x_0"]',
        'return batch, batch.extra["x_0"].flip(0)',
        ("test_couplings.py::test_a_sample_keeps_the_noise_that_it_came_from",),
    ),
    Mutation(
        "largest-time",
        OF_SAMPLES,
        "x_0, t if self.config.max_time == 1 else self.config.max_time * t",
        "x_0, t",
        ("test_couplings.py::test_times_are_weighed_and_end_at_the_largest",),
    ),
    # the path, its times and samplers
    Mutation("velocity-sign", FLOW, "    u = x_1 - x_0\n", "    u = x_0 - x_1\n", OF_FLOW),
    Mutation(
        "one-step-estimate", FLOW, "return x_t + (1 - expand(t, x_t)) * v", "return x_t + expand(t, x_t) * v", OF_FLOW
    ),
    Mutation("score-sign", FLOW, "return (t * v - x_t) / (1 - t)", "return (x_t - t * v) / (1 - t)", OF_FLOW),
    Mutation(
        "even-times",
        FLOW,
        "+ torch.rand(rows, generator=generator, device=device)) / rows",
        "* torch.rand(rows, generator=generator, device=device)) / rows",
        OF_FLOW,
    ),
    Mutation(
        "drift-share",
        "flowrl/training/method.py",
        "DRIFT_SHARE * 3 / 2 *",
        "DRIFT_SHARE * 3 *",
        ("test_algorithm.py::test_a_drift_for_the_log_costs_a_fiftieth_of_an_update_and_is_not_counted",),
    ),
    Mutation(
        "drift-mean",
        "flowrl/training/method.py",
        "squared_error(a, b).sum() for a, b in pairs",
        "squared_error(a, b).mean() for a, b in pairs",
        ("test_algorithm.py::test_the_drift_of_the_log_is_that_of_the_flow",),
    ),
    Mutation("ot-contexts", TRANSPORT, "own = (context_ids == context)", "own = (context_ids >= 0)", OF_FLOW),
    Mutation(
        "ot-direction",
        TRANSPORT,
        "linear_sum_assignment(costs.numpy())",
        "linear_sum_assignment(costs.numpy().T)",
        OF_FLOW,
    ),
    Mutation("ot-scale", TRANSPORT, "scale = (same @ x.square().mean", "scale = (x.square().mean", OF_FLOW),
    Mutation(
        "timestep-shift",
        SAMPLER,
        "shift * sigma / (1 + (shift - 1) * sigma)",
        "sigma / (shift - (shift - 1) * sigma)",
        ("test_sampler.py",),
    ),
    Mutation("heun", STEPS, "return x + h / 2 * (v_0 + v_1)", "return x + h * v_1", ("test_sampler.py",)),
    Mutation("adams-bashforth", STEPS, "h / (2 * before[1])", "0.5", ("test_sampler.py",)),
    Mutation("adams-bashforth-memory", STEPS, "before[:] = slope, h", "before[:] = slope, t[0]", ("test_sampler.py",)),
    Mutation(
        "gradients-of-last-steps", SAMPLER, ">= len(h) - grad_steps", "> len(h) - grad_steps", ("test_sampler.py",)
    ),
    Mutation(
        "guidance",
        "flowrl/functional/guidance.py",
        "return v_null + scale * (v - v_null)",
        "return v + scale * (v - v_null)",
        ("test_policy.py::test_guidance",),
    ),
    Mutation(
        "sde-drift-sign",
        SDE,
        "expand(0.5 * std.square()",
        "expand(-0.5 * std.square()",
        ("test_transitions.py::test_step_is_the_euler_step_of_the_sde",),
    ),
    Mutation(
        "sde-drift-half",
        SDE,
        "expand(0.5 * std.square()",
        "expand(1.0 * std.square()",
        (MARGINALS,),
    ),
    Mutation(
        "sde-noise",
        SDE,
        "self.diffusion(t, t_next) * (t_next - t).sqrt()",
        "self.diffusion(t, t_next) * (t_next - t)",
        ("test_transitions.py::test_step_is_the_euler_step_of_the_sde",),
    ),
    Mutation(
        "sde-first-step",
        SDE,
        "torch.where(start, 1 / t_next,",
        "torch.where(start, t_next,",
        ("test_transitions.py::test_first_step_as_published",),
    ),
    Mutation(
        "cps-kept-noise",
        SDE,
        "(1 - t_next) * math.cos(self.noise_level * math.pi / 2)",
        "(1 - t_next) * math.cos(self.noise_level * math.pi / 2) ** 2",
        ("test_transitions.py::test_cps_keeps_the_share_of_noise",),
    ),
    Mutation(
        "log-prob",
        SDE,
        "self.std.square() - self.std.log()",
        "self.std.square() + self.std.log()",
        ("test_transitions.py::test_log_probability_and_divergence_against_torch",),
    ),
    Mutation(
        "step-kl",
        SDE,
        "return 0.5 * (self.mean - other.mean)",
        "return (self.mean - other.mean)",
        ("test_transitions.py::test_log_probability_and_divergence_against_torch",),
    ),
    # policy gradients
    Mutation(
        "ratio-sign",
        "flowrl/training/transitions.py",
        "(step.mean_log_prob(steps.x_next) - steps.log_prob).exp()",
        "(steps.log_prob - step.mean_log_prob(steps.x_next)).exp()",
        (GRADIENT,),
    ),
    Mutation(
        "clip-direction",
        LOSSES,
        "torch.maximum(-advantage * ratio",
        "torch.minimum(-advantage * ratio",
        ("test_transitions.py::test_clipped_objective_by_hand",),
    ),
    Mutation(
        "pairs-turned",
        ADVANTAGES,
        "torch.stack([best.indices, worst.indices], dim=1)",
        "torch.stack([worst.indices, best.indices], dim=1)",
        ("test_transitions.py::test_pairs_are_the_best_and_the_worst_of_a_group",),
    ),
    Mutation(
        "pairs-of-ties",
        ADVANTAGES,
        "[best.values > worst.values]",
        "[best.values >= worst.values]",
        ("test_transitions.py::test_pairs_are_the_best_and_the_worst_of_a_group",),
    ),
    # rows and gradients
    Mutation(
        "rows-of-dropped-samples",
        "flowrl/training/rollout.py",
        "{name: row[index] for name, row in rows.items()}",
        "{name: row for name, row in rows.items()}",
        ("test_outside.py::test_each_survives_a_reward_that_fails_for_some",),
    ),
    Mutation(
        "strays-compared",
        "flowrl/training/reward_calls.py",
        "copy_(strays[rollout.group] > 0)",
        "copy_(strays[rollout.group] > 1e9)",
        ("test_hooks.py::test_a_group_whose_samples_all_failed_carries_no_weight",),
    ),
    Mutation(
        "steps-with-gradient",
        SAMPLER,
        ">= len(h) - grad_steps",
        "> len(h) - grad_steps",
        ("test_outside.py::test_draft_is_the_derivative_through_a_linear_flow",),
    ),
    Mutation(
        "refresh-by-a-share",
        "flowrl/training/method.py",
        'update_copy("behaviour", self.refresh_decay())',
        'update_copy("behaviour", 1 - self.refresh_decay())',
        ("test_hooks.py::test_the_behaviour_policy_can_move_by_a_share",),
    ),
    Mutation(
        "next-state",
        "flowrl/training/transitions.py",
        'rows["states"][sample, part + 1]',
        'rows["states"][sample, part]',
        ("test_transitions.py::test_recomputed_log_probability_is_the_stored_one",),
    ),
    Mutation(
        "step-index",
        "flowrl/training/transitions.py",
        'extra["first_step"] + extra["part"]',
        'extra["part"]',
        ("test_transitions.py::test_grpo_window_slides_and_returns",),
    ),
    Mutation(
        "ddpo-score-function",
        "baselines/ddpo.py",
        "-advantage * step.mean_log_prob",
        "advantage * step.mean_log_prob",
        (GRADIENT,),
    ),
    Mutation(
        "ddpo-running-mean",
        "baselines/ddpo.py",
        "self.mean += step * (n / count.clamp_min(1))",
        "self.mean += step",
        ("test_transitions.py::test_ddpo_statistics_are_those_of_all_rewards_of_a_context",),
    ),
    Mutation(
        "dpok-penalty",
        "baselines/dpok.py",
        "objective + config.beta * kl",
        "objective - config.beta * kl",
        (LOSS_BY_HAND,),
    ),
    Mutation(
        "dpok-critic",
        "baselines/dpok.py",
        "(advantage - value) * counts(batch)",
        "(advantage + value) * counts(batch)",
        (LOSS_BY_HAND,),
    ),
    Mutation(
        "grpo-penalty",
        "baselines/flow_grpo.py",
        "(objective + config.beta * kl).mean()",
        "(objective - config.beta * kl).mean()",
        (LOSS_BY_HAND,),
    ),
    Mutation(
        "grpo-guard",
        "baselines/flow_grpo.py",
        "step.std * log_ratio + distance",
        "step.std * log_ratio - distance",
        ("test_transitions.py::test_guarded_ratio_has_a_logarithm_of_mean_zero",),
    ),
    # endpoint methods
    Mutation("kernel-sign", ENDPOINT, "total = _times(weighed", "total = -_times(weighed", (ROW,)),
    Mutation("kernel-gain", ENDPOINT, "weighed(advantage, self.gain), vel", "advantage, vel", (ROW,)),
    Mutation(
        "kernel-base",
        ENDPOINT,
        "velocities[self.base].detach() - u",
        'velocities["current"].detach() - u',
        (ROW,),
    ),
    Mutation(
        "kernel-time-weight",
        ENDPOINT,
        "return _times(time_weight, total)",
        "return _times(time_weight**2, total)",
        ("test_endpoint.py::test_the_loss_has_the_gradient_and_is_not_negative",),
    ),
    Mutation(
        "kernel-detached",
        ENDPOINT,
        "(gradient.detach() + (v - v.detach()))",
        "(v - (v - gradient).detach())",
        ("test_endpoint.py::test_the_loss_has_the_gradient_and_is_not_negative",),
    ),
    Mutation("kernel-minimiser", ENDPOINT, "pulled - _times(self", "pulled + _times(self", (ROW,)),
    Mutation(
        "kernel-residual-orw",
        ENDPOINT,
        '{"behaviour": weight, "reference": alpha}',
        '{"behaviour": 1.0, "reference": alpha}',
        ("test_endpoint.py::test_orw_w2_is_a_row",),
    ),
    Mutation(
        "adrpo-base", ENDPOINT, 'Row("reference", {"reference": beta})', 'Row("behaviour", {"reference": beta})', (ROW,)
    ),
    Mutation(
        "awm-anchor",
        ENDPOINT,
        '"awm": lambda beta_ref, beta_old, gain: Row("current", {"reference": beta_ref',
        '"awm": lambda beta_ref, beta_old, gain: Row("current", {"reference": beta_old',
        (ROW,),
    ),
    Mutation("rvm-gain", "baselines/rvm.py", "self.beta_old, self.gain)", "self.beta_old, 1.0)", (ROW,)),
    Mutation(
        "ram-strength",
        ENDPOINT,
        'Row(base, {"reference": 1.0}, strength)',
        'Row(base, {"reference": strength})',
        (ROW,),
    ),
    Mutation(
        "advantages-centred",
        ENDPOINT,
        "own = reward - group_mean(reward, group, len(reward))",
        "own = reward - reward.mean()",
        ("test_endpoint.py::test_advantages_by_hand",),
    ),
    Mutation(
        "advantages-slope",
        ENDPOINT,
        "return (1 - 1 / n) / (std + 1e-4)",
        "return 1 / (std + 1e-4)",
        ("test_endpoint.py::test_the_slope_of_advantages",),
    ),
    Mutation(
        "early-times",
        ENDPOINT,
        "return 1 - (1 - u).sqrt()",
        "return u.sqrt()",
        ("test_endpoint.py::test_times_fall_one_into_each_part",),
    ),
    Mutation(
        "stratified-times",
        ENDPOINT,
        "(u + torch.arange(strata, device=u.device)) / strata",
        "(u + u.new_zeros(strata)) / 1",
        ("test_endpoint.py::test_times_fall_one_into_each_part",),
    ),
    Mutation(
        "lagging-decay",
        ENDPOINT,
        "min(max(0.0, (step - flat) * rate), hold)",
        "min(max(0.0, step * rate), hold)",
        ("test_endpoint.py::test_the_old_policy_follows_as_published",),
    ),
    Mutation(
        "nft-adaptive",
        "baselines/nft.py",
        "for side in (step, -step)",
        "for side in (-step, step)",
        ("test_endpoint.py::test_nft_is_its_contrast_as_written",),
    ),
    Mutation(
        "nft-scale",
        "baselines/nft.py",
        "scale = self.max_advantage if self.scale_by_clip else 1.0",
        "scale = 1.0 if self.scale_by_clip else self.max_advantage",
        (ROW, "test_endpoint.py::test_nft_is_its_contrast_as_written"),
    ),
    Mutation("nft-time", "baselines/nft.py", "near.square() * bad", "near * bad", (ROW,)),
    Mutation(
        "awm-ghuber",
        "baselines/awm.py",
        ".pow(config.ghuber_power - 1)",
        ".pow(config.ghuber_power)",
        ("test_endpoint.py::test_awm_is_its_objective_as_written",),
    ),
    Mutation(
        "awm-clip",
        "baselines/awm.py",
        "torch.where(a > 0, ratio > 1",
        "torch.where(a < 0, ratio > 1",
        ("test_endpoint.py::test_awm_clips_ratios_as_ppo_does",),
    ),
    Mutation(
        "awm-ratio",
        "baselines/awm.py",
        "a = (a * ratio).masked_fill(clipped, 0)",
        "a = a.masked_fill(clipped, 0)",
        ("test_endpoint.py::test_awm_clips_ratios_as_ppo_does",),
    ),
    Mutation(
        "endpoint-critic",
        ENDPOINTS,
        "advantage = advantage - value\n",
        "advantage = advantage + value\n",
        ("test_endpoint.py::test_a_critic_leaves_the_covariance_and_holds_every_row",),
    ),
    Mutation(
        "endpoint-strays",
        ENDPOINTS,
        "advantage = weighed(advantage, counts(batch))",
        "advantage = weighed(advantage, 1.0)",
        ("test_endpoint.py::test_samples_that_stand_in_for_others_carry_nothing",),
    ),
    Mutation(
        "endpoint-noisings",
        ENDPOINTS,
        "batch = some_rows(batch, row)",
        "batch = some_rows(batch, row.flip(0))",
        ("test_endpoint.py::test_each_sample_is_noised_several_times",),
    ),
    Mutation(
        "endpoint-tilt",
        ENDPOINTS,
        "return row.gain * slope / held",
        "return slope / held",
        ("test_endpoint.py::test_the_stated_tilt_stands_still_for_a_linear_reward",),
    ),
    # other baselines and likelihoods
    Mutation(
        "raft-mean-weight",
        "baselines/raft.py",
        "return weight / weight.mean().clamp_min(1e-6)",
        "return weight",
        ("test_baselines.py::test_raft_weights_by_hand",),
    ),
    Mutation(
        "raft-kept",
        "baselines/raft.py",
        "self.buffer.coefficient.topk(n_kept)",
        "(-self.buffer.coefficient).topk(n_kept)",
        ("test_baselines.py::test_raft_fits_only_what_it_keeps",),
    ),
    Mutation(
        "rwr-offline",
        "baselines/rwr.py",
        'return "reference" if self.config.mode == "offline"',
        'return "current" if self.config.mode == "offline"',
        ("test_baselines.py::test_who_draws_for_rwr",),
    ),
    Mutation(
        "exact-kl-sign",
        "baselines/kl.py",
        "rollout.reward - self.config.beta",
        "rollout.reward + self.config.beta",
        ("test_baselines.py::test_exact_kl_is_taken_off_the_reward",),
    ),
    Mutation(
        "change-of-variables",
        "flowrl/functional/likelihood.py",
        "return normal + gained",
        "return normal - gained",
        (DENSITY,),
    ),
    Mutation("hutchinson", "flowrl/functional/likelihood.py", "/ math.sqrt(n_probes)", "/ n_probes", (DENSITY,)),
    # preferences within groups
    Mutation(
        "dpo-sign",
        "baselines/flow_dpo.py",
        "logsigmoid(-self.config.beta / 2",
        "logsigmoid(self.config.beta / 2",
        ("test_preference.py::test_dpo_by_hand",),
    ),
    Mutation(
        "dpo-half",
        "baselines/flow_dpo.py",
        "logsigmoid(-self.config.beta / 2",
        "logsigmoid(-self.config.beta",
        ("test_preference.py::test_dpo_at_the_reference_is_half_way",),
    ),
    Mutation(
        "dpo-reference",
        "baselines/flow_dpo.py",
        'self.error(pair, "reference")',
        "self.error(pair).detach()",
        ("test_preference.py::test_dpo_by_hand",),
    ),
    Mutation(
        "dpo-noise",
        "baselines/flow_dpo.py",
        "x_0.repeat_interleave(2, dim=0)",
        "x_0.repeat(2, 1)",
        ("test_preference.py::test_dpo_at_the_reference_is_half_way",),
    ),
    Mutation(
        "dpo-ties",
        "baselines/flow_dpo.py",
        "best.values > worst.values",
        "best.values >= worst.values",
        ("test_preference.py::test_dpo_pairs_are_the_best_and_the_worst_and_ties_are_none",),
    ),
    Mutation(
        "dpo-stand-ins",
        "baselines/flow_dpo.py",
        'is_pair &= ~rollout.extra["stray"]',
        'is_pair |= ~rollout.extra["stray"]',
        ("test_preference.py::test_dpo_makes_no_pair_of_stand_ins",),
    ),
    Mutation(
        "dpo-given",
        "baselines/flow_dpo.py",
        "torch.where(wins, winner[pair], loser[pair])",
        "torch.where(wins, loser[pair], winner[pair])",
        ("test_preference.py::test_given_pairs_keep_their_contexts",),
    ),
    Mutation(
        "dgpo-score",
        "baselines/dgpo.py",
        "doubt = score.sigmoid()",
        "doubt = (-score).sigmoid()",
        ("test_preference.py::test_dgpo_by_hand",),
    ),
    Mutation(
        "dgpo-mean",
        "baselines/dgpo.py",
        "self.in_groups(advantage * gap).mean(1)",
        "self.in_groups(advantage * gap).sum(1)",
        ("test_preference.py::test_dgpo_by_hand",),
    ),
    Mutation(
        "dgpo-advantage",
        "baselines/dgpo.py",
        "(config.group_size) * advantage * d",
        "(config.group_size) * d",
        ("test_preference.py::test_dgpo_at_the_reference_is_half_way",),
    ),
    Mutation(
        "dgpo-frozen",
        "baselines/dgpo.py",
        "loss.masked_fill(frozen, 0)",
        "loss.masked_fill(~frozen, 0)",
        ("test_preference.py::test_dgpo_by_hand",),
    ),
    Mutation(
        "dgpo-ratio",
        "baselines/dgpo.py",
        "self.error(pair, self.behaviour_role) - d.detach()",
        "d_ref - d.detach()",
        ("test_preference.py::test_dgpo_by_hand",),
    ),
    Mutation(
        "crd-centre",
        "baselines/crd.py",
        "return groups - groups.mean(1, keepdim=True)",
        "return groups - groups.mean()",
        ("test_preference.py::test_crd_vanishes_where_the_log_ratio_is_the_centred_reward",),
    ),
    Mutation(
        "crd-sign",
        "baselines/crd.py",
        "(config.beta * log_ratio) - self.centred(batch.advantage)",
        "(config.beta * log_ratio) + self.centred(batch.advantage)",
        ("test_preference.py::test_crd_vanishes_where_the_log_ratio_is_the_centred_reward",),
    ),
    Mutation(
        "crd-size",
        "baselines/crd.py",
        "(v - u).detach().abs()",
        "(v - u).abs()",
        ("test_preference.py::test_crd_at_the_old_policy_is_a_linear_combination",),
    ),
    Mutation(
        "crd-sum",
        "baselines/crd.py",
        "(v - u).square().flatten(1).sum(1)",
        "(v - u).square().flatten(1).mean(1)",
        ("test_preference.py::test_crd_means_the_same_tilt_in_any_dimension",),
    ),
    Mutation(
        "crd-anchor",
        "baselines/crd.py",
        "loss + config.anchor * drift",
        "loss - config.anchor * drift",
        ("test_preference.py::test_crd_with_an_anchor",),
    ),
    Mutation(
        "crd-decay",
        "baselines/crd.py",
        "return self.config.decay",
        "return 0.9",
        ("test_preference.py::test_crd_compares_with_a_policy_that_may_lag_behind",),
    ),
    Mutation(
        "crd-stand-ins",
        "baselines/crd.py",
        "miss = miss.masked_fill",
        "_ = miss.masked_fill",
        ("test_preference.py::test_groups_of_stand_ins_teach_nothing",),
    ),
    Mutation(
        "fpo-ratio",
        "baselines/fpo.py",
        "(old - self.kept_errors(batch, x_0, t)).mean(1).exp()",
        "(self.kept_errors(batch, x_0, t) - old).mean(1).exp()",
        ("test_preference.py::test_fpo_starts_at_a_ratio_of_one",),
    ),
    Mutation(
        "fpo-mean-of-ratios",
        "baselines/fpo.py",
        ".mean(1).exp()",
        ".exp().mean(1)",
        ("test_preference.py::test_fpo_by_hand",),
    ),
    Mutation(
        "fpo-fresh-draws",
        "baselines/fpo.py",
        "pair = self.pair(batch, x_0[:, i], t[:, i])",
        "pair = self.pair(batch)",
        ("test_preference.py::test_fpo_starts_at_a_ratio_of_one",),
    ),
    Mutation(
        "fpo-noise-weight",
        "baselines/fpo.py",
        "pair.t.square() * error",
        "pair.t * error",
        ("test_preference.py::test_fpo_starts_at_a_ratio_of_one",),
    ),
    Mutation(
        "fpo-strata",
        "baselines/fpo.py",
        ".view(n, config.draws)",
        ".view(config.draws, n).T",
        ("test_preference.py::test_fpo_shares_draws_in_a_group_at_times_of_every_part",),
    ),
    Mutation(
        "dppo-asymmetry",
        "flowrl/functional/advantages.py",
        "return ~(outward & (divergence > delta))",
        "return divergence <= delta",
        ("test_preference.py::test_the_mask_leaves_out_what_is_far_and_moves_out",),
    ),
    Mutation(
        "dppo-direction",
        "flowrl/functional/advantages.py",
        "(advantage < 0) & (ratio < 1)",
        "(advantage < 0) & (ratio > 1)",
        ("test_preference.py::test_the_mask_leaves_out_what_is_far_and_moves_out",),
    ),
    Mutation(
        "dppo-old-mean",
        "flowrl/training/transitions.py",
        'step.kl(self.step(steps, batch.context_ids, "behaviour"))',
        'step.kl(self.step(steps, batch.context_ids, "current"))',
        ("test_preference.py::test_masked_losses_by_hand",),
    ),
    Mutation(
        "dppo-kept",
        "flowrl/training/transitions.py",
        "torch.where(kept, -advantage * ratio, 0)",
        "torch.where(~kept, -advantage * ratio, 0)",
        ("test_preference.py::test_masked_losses_by_hand",),
    ),
    Mutation(
        "gdpo-weights",
        "flowrl/functional/advantages.py",
        "(weights[:, None] * each).sum(0)",
        "each.sum(0)",
        ("test_preference.py::test_rewards_are_compared_each_by_itself",),
    ),
    Mutation(
        "gdpo-decoupled",
        "flowrl/functional/advantages.py",
        "total = (weights[:, None] * each).sum(0)",
        "total = group_advantage((weights[:, None] * rewards).sum(0), group, math.inf)",
        ("test_preference.py::test_rewards_are_compared_each_by_itself",),
    ),
    Mutation(
        "gdpo-scale",
        "flowrl/functional/advantages.py",
        "total / (total.square().mean().sqrt() + 1e-4)",
        "total",
        ("test_preference.py::test_rewards_are_compared_each_by_itself",),
    ),
    Mutation(
        "gdpo-unit",
        "flowrl/training/groups.py",
        "given, rollout.group, maximum, self.compared)",
        "given, rollout.group, maximum)",
        ("test_preference.py::test_components_are_rows_that_stay_with_their_samples",),
    ),
    Mutation(
        "gdpo-rows",
        "flowrl/training/groups.py",
        "rollout.extra[COMPONENT + name] for name in weights",
        "rollout.reward for name in weights",
        ("test_preference.py::test_components_are_rows_that_stay_with_their_samples",),
    ),
    # steering
    Mutation(
        "best-of-n",
        STEERING,
        "view(-1, steering.n).argmax(dim=1)",
        "view(-1, steering.n).argmin(dim=1)",
        ("test_baselines.py::test_best_of_n_is_the_law_of_the_best",),
    ),
    Mutation("smc-increment", STEERING, "(reward - reached) / steering", "reward / steering", (SMC,)),
    Mutation("smc-temperature", STEERING, "reached) / steering.temperature", "reached) * steering.temperature", (SMC,)),
    Mutation("smc-reset", STEERING, "    log_weight.masked_fill_(needed[:, None], 0.0)\n", "", (SMC,)),
    Mutation("smc-reached", STEERING, "reward.flatten()[rows]", "reward.flatten()", (SMC,)),
    Mutation("rbf-rollover", STEERING, "left += steering.n", "left = torch.full_like(left, steering.n)", (ROLLS, RBF)),
    Mutation("rbf-stops", STEERING, "goes_on & (found[rows] <= best[rows])", "goes_on", (ROLLS, RBF)),
    Mutation("rbf-last-step", STEERING, "goes_on if k + 1 == last else ", "", (RBF,)),
    Mutation("rbf-best", STEERING, "best = torch.maximum(best, found)", "best = found", (ROLLS,)),
    Mutation("rbf-of-the-step", STEERING, "better = reward > found[rows]", "better = reward > -torch.inf", (RBF,)),
    Mutation("d-flow-sign", STEERING, "-(reward / steering.temperature + prior)", "(prior - reward)", (D_FLOW,)),
    Mutation("d-flow-temperature", STEERING, "-(reward / steering.temp", "-(reward * steering.temp", (D_FLOW,)),
    Mutation("d-flow-norm", STEERING, "(x_0[0].numel() - 1) * norm", "x_0[0].numel() * norm", (D_FLOW,)),
    # the loop, copies, measures
    Mutation(
        "moving-average",
        "flowrl/training/role_networks.py",
        "torch._foreach_lerp_(target, source, 1 - decay)",
        "torch._foreach_lerp_(target, source, decay)",
        ("test_policy.py::test_update_copy",),
    ),
    Mutation(
        "average-warm-up",
        "flowrl/training/optimizers.py",
        "min(config.ema_decay, (1 + model._n_updates)",
        "max(config.ema_decay, (1 + model._n_updates)",
        ("test_algorithm.py::test_an_average_of_few_steps_forgets_its_start_sooner",),
    ),
    Mutation(
        "refresh",
        ALGORITHM,
        "if (self.iteration + 1) % self.config.refresh_every == 0",
        "if self.iteration % self.config.refresh_every == 0",
        ("test_algorithm.py::test_behaviour_follows_at_the_refresh_only",),
    ),
    Mutation(
        "accumulation",
        ALGORITHM,
        "share_of_step(self, loss, len(batch.x_1)).backward()",
        "loss.backward()",
        ("test_algorithm.py::test_accumulated_minibatches_have_the_gradient_of_a_large_one",),
    ),
    Mutation("diversity-pairs", "flowrl/functional/metrics.py", ".triu(1)", ".triu(0)", OF_METRICS),
    Mutation("exact-w2", "flowrl/functional/metrics.py", "(a[index] - b).square()", "(a[index] - b).abs()", OF_METRICS),
    # self-consistent tilting
    Mutation(
        "mixture-weight",
        "flowrl/functional/tilting.py",
        "rho / (1 + pi * (rho - 1))",
        "rho / (1 + pi * rho)",
        ("test_tilt.py::test_weights_of_agreeing_rewards_are_one_exactly",),
    ),
    Mutation(
        "tilt-level",
        "flowrl/functional/tilting.py",
        "least + (e - least[:, None]).mean(1)",
        "e.mean()",
        ("test_tilt.py::test_each_context_has_its_own_level",),
    ),
    Mutation(
        "tilt-bases",
        "flowrl/tilt.py",
        'self.velocity(own, "behaviour"), self.velocity(reference, "reference")',
        'self.velocity(own, "reference"), self.velocity(reference, "reference")',
        ("test_tilt.py::test_training_reaches_the_tilt_and_its_field",),
    ),
    Mutation(
        "tilt-shares",
        "flowrl/tilt.py",
        "loss = pi * error[:n].mean() + (1 - pi) * error[n:].mean()",
        "loss = (1 - pi) * error[:n].mean() + pi * error[n:].mean()",
        ("test_tilt.py::test_a_minibatch_is_the_mixture",),
    ),
    Mutation(
        "strays-learnt",
        "flowrl/training/reward_calls.py",
        'return 1 - batch.extra["stray"].float()',
        'return 1 - 0 * batch.extra["stray"].float()',
        ("test_training_faults.py::test_nothing_is_learnt_from_samples_that_stand_in_for_others",),
    ),
    Mutation(
        "strays-in-the-mean",
        "flowrl/training/reward_calls.py",
        "weight.sum() / (~stray[: buffer.size]).sum()",
        "weight.sum() / (stray[: buffer.size] >= 0).sum()",
        ("test_training_faults.py::test_equal_rewards_move_nothing_beside_samples_that_stand_in_for_others",),
    ),
    Mutation(
        "tilt-critic",
        "flowrl/training/networks.py",
        "(weight * (value - target).square())",
        "(weight * (value + target).square())",
        ("test_tilt.py::test_a_minibatch_is_the_mixture",),
    ),
    Mutation(
        "tilt-units",
        "flowrl/tilt.py",
        "self.config.tau / self.unit",
        "self.config.tau * self.unit",
        ("test_tilt.py::test_a_minibatch_is_the_mixture",),
    ),
    Mutation(
        "tilt-time-weight",
        NOISING,
        "weight = self.noise_at[1] / self.noise_at[0].clamp_min(1e-12)",
        "weight = self.noise_at[0] / self.noise_at[1].clamp_min(1)",
        ("test_tilt.py::test_times_of_much_noise_weigh_less",),
    ),
    Mutation(
        "late-anchor-times",
        NOISING,
        "self.config.max_time + (1 - self.config.max_time) * t)",
        "self.config.max_time * t)",
        ("test_late_anchor.py::test_the_gradient_is_that_of_both_parts",),
    ),
    Mutation(
        "late-anchor-coefficient",
        NOISING,
        "share_of_step(self, loss + self.config.late_anchor * strayed,",
        "share_of_step(self, loss + strayed,",
        ("test_late_anchor.py::test_the_gradient_is_that_of_both_parts",),
    ),
    Mutation(
        "held-refresh",
        OF_SAMPLES,
        "if limit and values[name] > limit * found[-1]]",
        "if limit and values[name] > limit]",
        ("test_held_refresh.py::test_the_limit_is_on_the_ratio_of_the_two_losses",),
    ),
    Mutation(
        "held-policy",
        OF_SAMPLES,
        'return copies | {"behaviour"} if config.max_own_loss or config.max_drift else copies',
        "return copies",
        ("test_held_refresh.py::test_beyond_the_limit_the_samples_come_from_the_policy_as_it_was",),
    ),
    Mutation(
        "errors-shared",
        LOSSES,
        "(v - torch.stack(fields)).square()",
        "(v - torch.stack(fields[::-1])).square()",
        ("test_losses.py::test_residual_loss_by_hand",),
    ),
    Mutation(
        "figures-names",
        LOSSES,
        "dict(zip(rows, every.mean(1)",
        "dict(zip(rows, every.flip(0).mean(1)",
        ("test_priority.py::test_time_weights_and_figures_are_of_all_samples_alike",),
    ),
    Mutation(
        "late-anchor-importance",
        NOISING,
        "weighed(strayed, self.importance(kept)).mean()",
        "strayed.mean()",
        ("test_late_anchor.py::test_samples_that_passes_take_more_often_count_less_at_late_times",),
    ),
    Mutation(
        "tilt-critic-shares",
        "flowrl/tilt.py",
        "w, share * counted)",
        "w, counted)",
        ("test_tilt.py::test_the_critic_learns_from_both_kinds_of_samples_by_their_shares",),
    ),
    Mutation(
        "priority-time-weight",
        NOISING,
        "share * noise.nan_to_num",
        "noise.nan_to_num",
        ("test_priority.py::test_time_weights_and_figures_are_of_all_samples_alike",),
    ),
    Mutation(
        "pairs-time",
        "flowrl/training/priority.py",
        ".repeat_interleave(2)",
        ".repeat(2)",
        ("test_priority.py::test_a_pair_has_noise_and_time_in_common_and_only_a_pair",),
    ),
    Mutation(
        "pairs-noise",
        "flowrl/training/priority.py",
        "self.generator).repeat_interleave(2, 0)",
        "self.generator).repeat(2, *[1] * len(self.policy.model.latent_shape))",
        ("test_priority.py::test_a_pair_has_noise_and_time_in_common_and_only_a_pair",),
    ),
    Mutation(
        "pairs-order",
        "flowrl/training/priority.py",
        "torch.minimum(below, above)",
        "below",
        ("test_priority.py::test_pairs_are_the_best_with_the_worst_of_a_group_and_so_on_inwards",),
    ),
    Mutation(
        "pairs-shuffled",
        "flowrl/training/priority.py",
        "return pairs[torch.randperm(len(pairs), generator=self.generator, device=self.device)].flatten()",
        "return pairs.flatten()",
        ("test_priority.py::test_pairs_take_each_sample_as_often_and_are_in_no_order",),
    ),
    Mutation(
        "clipped-gradients",
        "flowrl/training/optimizers.py",
        "(maximum / (norm + 1e-6))",
        "(norm / (maximum + 1e-6))",
        ("test_algorithm.py::test_gradients_are_clipped_as_torch_does",),
    ),
    Mutation(
        "own-loss",
        ORW,
        '"own_loss": seen[0]',
        '"own_loss": squared_error(v_ref, pair.u)',
        ("test_algorithm.py::test_a_flow_that_no_longer_fits_its_own_samples_is_told_of",),
    ),
    Mutation(
        "pool-spread",
        "flowrl/training/reference_pool.py",
        "self.reward - self.reward.mean(1, keepdim=True)",
        "self.reward - self.reward.mean()",
        ("test_tilt.py::test_the_spread_of_rewards_is_that_within_contexts",),
    ),
    # gradients of the reward
    Mutation(
        "draft-steps",
        "baselines/draft.py",
        "grad_steps=self.config.grad_steps\n",
        "grad_steps=self.config.grad_steps + 1\n",
        ("test_gradient_methods.py::test_draft_is_the_derivative_of_the_last_steps",),
    ),
    Mutation(
        "refl-steps",
        "baselines/refl.py",
        "times[first + late]",
        "times[first + late + 1]",
        ("test_gradient_methods.py::test_refl_is_the_derivative_of_the_estimate",),
    ),
    Mutation(
        "reward-gradient-sign",
        "flowrl/training/reward_gradients.py",
        "loss = -self.reward_of",
        "loss = self.reward_of",
        ("test_gradient_methods.py::test_draft_is_the_derivative_of_the_last_steps",),
    ),
    Mutation(
        "reward-gradient-penalty",
        "flowrl/training/reward_gradients.py",
        "loss + self.config.alpha * drift",
        "loss - self.config.alpha * drift",
        ("test_gradient_methods.py::test_the_penalty_pulls_to_the_reference",),
    ),
    Mutation(
        "adjoint-sign",
        "baselines/adjoint.py",
        "a = -torch.autograd.grad(self.reward_of",
        "a = torch.autograd.grad(self.reward_of",
        ("test_gradient_methods.py::test_the_lean_adjoint_gives_the_velocity_of_the_tilt",),
    ),
    Mutation(
        "adjoint-factor",
        "baselines/adjoint.py",
        "times[k] / times[k + 1] * a + 2",
        "times[k + 1] / times[k] * a + 2",
        ("test_gradient_methods.py::test_the_lean_adjoint_gives_the_velocity_of_the_tilt",),
    ),
    Mutation(
        "adjoint-one-gradient",
        "baselines/adjoint.py",
        "* a + 2 * self.pulled",
        "* a + self.pulled",
        ("test_gradient_methods.py::test_the_lean_adjoint_gives_the_velocity_of_the_tilt",),
    ),
    Mutation(
        "adjoint-last-step",
        "baselines/adjoint.py",
        "a = a + self.pulled(states",
        "a = a + 2 * self.pulled(states",
        ("test_gradient_methods.py::test_few_steps_give_less_than_the_tilt",),
    ),
    Mutation(
        "adjoint-euler",
        "baselines/adjoint.py",
        "a = times[k] / times[k + 1] * a",
        "a = (2 - times[k + 1] / times[k]) * a",
        ("test_gradient_methods.py::test_few_steps_give_less_than_the_tilt",),
    ),
    Mutation(
        "adjoint-of-the-current",
        "baselines/adjoint.py",
        'self.policy.condition(context_ids), "reference")\n        return',
        'self.policy.condition(context_ids), "current")\n        return',
        ("test_gradient_methods.py::test_adjoints_belong_to_the_reference",),
    ),
    Mutation(
        "adjoint-eta",
        "baselines/adjoint.py",
        "eta = (1 - t) / t\n",
        "eta = t / (1 - t)\n",
        ("test_gradient_methods.py::test_adjoint_matching_is_a_regression_on_the_controls",),
    ),
    Mutation(
        "adjoint-weight",
        "baselines/adjoint.py",
        "expand(eta, v) * a) / eta\n",
        "expand(eta, v) * a)\n",
        ("test_gradient_methods.py::test_adjoint_matching_is_a_regression_on_the_controls",),
    ),
    Mutation(
        "adjoint-control-sign",
        "baselines/adjoint.py",
        "v_ref - expand(eta, v) * a",
        "v_ref + expand(eta, v) * a",
        ("test_gradient_methods.py::test_adjoint_matching_is_a_regression_on_the_controls",),
    ),
    Mutation(
        "adjoint-time",
        "baselines/adjoint.py",
        "times()[k.flatten() + 1]",
        "times()[k.flatten() + 2]",
        ("test_gradient_methods.py::test_adjoint_matching_is_a_regression_on_the_controls",),
    ),
    Mutation(
        "adjoint-tau",
        "baselines/adjoint.py",
        "self.config.tau * adjoints[rows, k]",
        "adjoints[rows, k]",
        ("test_gradient_methods.py::test_adjoint_matching_is_a_regression_on_the_controls",),
    ),
    Mutation(
        "adjoint-tau-drawn",
        "baselines/adjoint.py",
        "a = -torch.autograd.grad(self.reward_of",
        "a = -self.config.tau * torch.autograd.grad(self.reward_of",
        ("test_gradient_methods.py::test_only_adjoint_matching_states_a_tilt",),
    ),
    # working copies
    Mutation(
        "merged-adapter",
        "flowrl/training/working_copies.py",
        "layer.get_base_layer().weight.float() + layer.get_delta_weight",
        "layer.get_base_layer().weight.float() - layer.get_delta_weight",
        ("test_working_copies.py::test_merged_is_what_adapters_compute",),
    ),
    Mutation(
        "rounding-at-random",
        "flowrl/training/working_copies.py",
        "(bits + noise).bitwise_and_",
        "bits.bitwise_and_",
        ("test_working_copies.py::test_rounding_at_random_is_right_on_average",),
    ),
    Mutation(
        "target-lambda",
        "flowrl/training/target.py",
        "factor**power",
        "factor",
        ("test_target.py::test_every_coefficient_can_be_given_as_the_tilt",),
    ),
    Mutation(
        "target-held",
        "flowrl/training/target.py",
        "coefficient * (model.config.target_lambda / now)",
        "coefficient * (now / model.config.target_lambda)",
        ("test_target.py::test_the_target_is_held_while_the_spread_of_rewards_changes",),
    ),
    Mutation(
        "target-given",
        "flowrl/training/construction.py",
        "cls.tilt_setting is None or cls.tilt_setting[0] in settings",
        "cls.tilt_setting is None",
        ("test_target.py::test_on_the_toys_all_that_state_a_tilt_aim_at_the_optimum",),
    ),
    # environments and adapters
    Mutation(
        "mixture-velocity",
        "envs/gaussians.py",
        "gain = (t[..., None] * scale - (1 - t[..., None]))",
        "gain = (t[..., None] * scale + (1 - t[..., None]))",
        ("test_gaussians.py::test_velocity_is_the_conditional_expectation",),
    ),
    Mutation(
        "mixture-tilt",
        "envs/gaussians.py",
        "weights = (self.weights.double().log() + log_z)",
        "weights = (self.weights.double().log() - log_z)",
        ("test_gaussians.py::test_linear_tilt",),
    ),
    Mutation("compress-sign", "envs/rewards/compress.py", "sign, what = -1,", "sign, what = 1,", ("test_rewards.py",)),
    Mutation("colourfulness", "envs/rewards/aesthetic.py", "spread + 0.3 *", "spread - 0.3 *", ("test_rewards.py",)),
    Mutation(
        "aesthetic-embedding",
        "envs/rewards/aesthetic.py",
        "nn.functional.normalize(embedding, dim=1)",
        "embedding",
        ("test_reward_networks.py::test_aesthetic_is_the_head_on_transformers_embedding",),
    ),
    Mutation(
        "pipeline-velocity-sign",
        "flowrl/models/pipeline.py",
        "return predicted if self.PREDICTS_VELOCITY else -predicted",
        "return predicted",
        ("test_sd3.py::test_time_and_sign",),
    ),
    Mutation(
        "pipeline-time",
        "flowrl/models/pipeline.py",
        "noise, ratio = 1 - t, self.timesteps / TIMESTEPS",
        "noise, ratio = t, self.timesteps / TIMESTEPS",
        ("test_sd3.py::test_time_and_sign",),
    ),
    Mutation(
        "pipeline-timesteps",
        "flowrl/models/pipeline.py",
        "noise, ratio = 1 - t, self.timesteps / TIMESTEPS",
        "noise, ratio = 1 - t, 1.0",
        ("test_saved_pipelines.py::test_training_timesteps_other_than_1000",),
    ),
    Mutation(
        "first-latents",
        "flowrl/models/first_frame.py",
        "(picture - x_t[:, :, :1]) / left",
        "picture - x_t[:, :, :1]",
        ("test_picture_prompts.py::test_first_latents_that_are_a_pictures_go_to_it_from_everywhere",),
    ),
    Mutation(
        "first-latents-seen",
        "flowrl/models/first_frame.py",
        "torch.cat([picture, x_t[:, :, 1:]], dim=2)",
        "x_t",
        ("test_picture_prompts.py::test_first_latents_that_are_a_pictures_go_to_it_from_everywhere",),
    ),
    Mutation(
        "repeated-levels",
        "flowrl/models/schedules.py",
        'torch.unique_consecutive(1 - levels if scheduler.config.get("invert_sigmas") else levels)',
        '(1 - levels if scheduler.config.get("invert_sigmas") else levels)',
        ("test_saved_pipelines.py::test_schedulers_of_other_solvers",),
    ),
)


def copied_tree(target: Path) -> None:
    """Copy the files that git tracks, as they are now; links stay links."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0")[:-1]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target / name, follow_symlinks=False)


def environment_of(tree: Path) -> dict[str, str]:
    """Variables with which Python imports the packages of `tree`, and leaves no compiled files of them."""
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def check_imports(tree: Path) -> None:
    """Whether the copy is what tests import, not an installed one.

    Raises:
        RuntimeError: It is not.
    """
    code = "import flowrl, flowrl.envs, flowrl.baselines as b; print(flowrl.__file__, flowrl.envs.__file__, b.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment_of(tree), capture_output=True, text=True, check=True
    )
    if not all(Path(file).resolve().is_relative_to(tree.resolve()) for file in done.stdout.split()):
        raise RuntimeError(f"Python imports other packages than those of '{tree}': {done.stdout}")


def run_tests(tree: Path, tests: Sequence[str], timeout: float | None = None) -> tuple[int, str]:
    """Exit code of pytest on these tests of the tree, and what it printed."""
    nodes = [f"tests/{test}" for test in tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *nodes],
        cwd=tree,
        env=environment_of(tree),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def outcome(tree: Path, mutation: Mutation) -> str:
    """ "killed", "survived", or what went wrong; the file is put back."""
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(mutation.applied(text), encoding="utf-8")
    try:
        code, printed = run_tests(tree, mutation.tests, TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no answer in {TIMEOUT} s"
    finally:
        file.write_text(text, encoding="utf-8")
    # 1 is a failed test; anything else (no such test, a module that cannot be imported) shows nothing of the formula
    return {0: "survived", 1: "killed"}.get(code, f"pytest ended with {code}: {printed[-500:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this mutation; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the mutations and exit")
    told = parser.parse_args(arguments)
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := set(told.only or ()) - known.keys():
        parser.error(f"no mutation {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    chosen = [known[name] for name in told.only or known]
    if told.list:
        for mutation in chosen:
            print(f"{mutation.name:22s} {mutation.file:28s} {' '.join(mutation.tests)}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return score(Path(folder), chosen)


def score(tree: Path, mutations: Sequence[Mutation]) -> int:
    """Try mutations in the empty folder `tree`; exit code."""
    copied_tree(tree)
    check_imports(tree)
    tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    code, printed = run_tests(tree, tests)
    if code:
        print(f"{printed}\nThe tests must pass without a mutation.")
        return 2
    outcomes = []
    for mutation in mutations:
        started = time.perf_counter()
        outcomes.append(outcome(tree, mutation))
        print(f"{mutation.name:22s} {outcomes[-1]}  ({time.perf_counter() - started:.0f} s)", flush=True)
    killed = outcomes.count("killed")
    print(f"{killed} of {len(mutations)} mutations killed: {100 * killed / len(mutations):.0f} %")
    return int(killed < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
