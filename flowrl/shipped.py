"""The algorithms that flowrl ships, by name: the one that is asked for is imported, and no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Shipped(NamedTuple):
    """An algorithm of flowrl's own.

    Attributes:
        module: Module that registers it.
        name: Name of its class.
        summary: First line of the class's docstring, for the list of algorithms.
    """

    module: str
    name: str
    summary: str


SHIPPED: Mapping[str, Shipped] = {
    "adjoint": Shipped(
        "flowrl.baselines.adjoint",
        "AdjointMatching",
        "Regression of the velocity on the lean adjoint of memoryless paths (Adjoint Matching).",
    ),
    "adrpo": Shipped(
        "flowrl.baselines.adrpo",
        "ADRPO",
        "Velocity matching with a W2 regulariser that adapts to each sample's advantage (ADRPO).",
    ),
    "awm": Shipped(
        "flowrl.baselines.awm",
        "AWM",
        "Advantage-weighted matching: policy gradients with the flow-matching error as a log-likelihood.",
    ),
    "crd": Shipped(
        "flowrl.baselines.crd",
        "CRD",
        "Centred reward distillation: log-ratios fitted to rewards, both relative to the group.",
    ),
    "ddpo": Shipped("flowrl.baselines.ddpo", "DDPO", "Denoising diffusion policy optimisation."),
    "dgpo": Shipped(
        "flowrl.baselines.dgpo", "DGPO", "Direct preference optimisation of groups, with advantages for weights."
    ),
    "dpok": Shipped("flowrl.baselines.dpok", "DPOK", "Diffusion policy optimisation with KL regularisation."),
    "draft": Shipped("flowrl.baselines.draft", "DRaFT", "Direct reward fine-tuning."),
    "flow_dpo": Shipped(
        "flowrl.baselines.flow_dpo",
        "FlowDPO",
        "Direct preference optimisation on the best and the worst of each group, or on given pairs.",
    ),
    "flow_grpo": Shipped(
        "flowrl.baselines.flow_grpo", "FlowGRPO", "Group-relative policy optimisation of a flow's SDE sampler."
    ),
    "fpo": Shipped(
        "flowrl.baselines.fpo",
        "FPO",
        "PPO whose log-likelihood is the flow-matching error at kept draws of noise and time.",
    ),
    "orw_w2": Shipped(
        "flowrl.orw_w2",
        "ORWCFMW2",
        "Online reward-weighted conditional flow matching with Wasserstein-2 regularisation.",
    ),
    "orw": Shipped(
        "flowrl.orw_w2",
        "ORWCFM",
        "Online reward-weighted conditional flow matching without regularisation; collapses in the end.",
    ),
    "orw_kl": Shipped(
        "flowrl.orw_w2",
        "ORWCFMKL",
        "ORW-CFM whose penalty is the Kullback-Leibler divergence: the same, weighted by t / (1 - t).",
    ),
    "kl": Shipped(
        "flowrl.baselines.kl",
        "ExactKL",
        "Reward-weighted flow matching on the reward minus beta times the exact log-likelihood ratio.",
    ),
    "nft": Shipped(
        "flowrl.baselines.nft", "NFT", "Contrast of a positive and a negative policy around the old one (DiffusionNFT)."
    ),
    "raft": Shipped("flowrl.baselines.raft", "RAFT", "Reward-ranked fine-tuning."),
    "ram": Shipped(
        "flowrl.baselines.ram", "RAM", "Regression on the reference's velocity plus a step of reward (RAM)."
    ),
    "refl": Shipped("flowrl.baselines.refl", "ReFL", "Reward feedback learning."),
    "rvm": Shipped(
        "flowrl.baselines.rvm", "RVM", "Signed velocity matching: good samples attract, bad ones repel (RVM)."
    ),
    "rwr": Shipped("flowrl.baselines.rwr", "RWR", "Reward-weighted regression."),
    "tilt": Shipped("flowrl.tilt", "Tilt", "Self-consistent tilting."),
}
