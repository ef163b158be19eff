"""flowrl fine-tunes flow-matching generators with rewards, and compares the ways to do it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowrl.models.imports import without_garbage_collection

with without_garbage_collection():
    from flowrl.config import FlowConfig
    from flowrl.envs import darcy as _darcy
    from flowrl.envs import digits as _digits
    from flowrl.envs import emoji as _emoji
    from flowrl.envs import gaussians as _gaussians
    from flowrl.envs import plans as _plans
    from flowrl.envs import speech as _speech
    from flowrl.envs import text_to_image as _text_to_image
    from flowrl.envs.base import GenerationEnv, GenerationVecEnv
    from flowrl.envs.prompts import Prompt
    from flowrl.envs.registration import make, make_vec, register, register_env
    from flowrl.envs.rewards.catalogue import register_reward
    from flowrl.evaluation.measure import EvaluationResult, evaluate
    from flowrl.models.base import VelocityModel
    from flowrl.models.prior import PriorFlow
    from flowrl.registry import algorithm_class, register_algorithm
    from flowrl.shipped import SHIPPED
    from flowrl.training.algorithm import FlowAlgorithm
    from flowrl.training.policy import FlowPolicy
    from flowrl.types import Batch, RewardOutput
    from flowrl.version import __version__ as __version__

if TYPE_CHECKING:
    from flowrl.baselines.adjoint import AdjointMatching
    from flowrl.baselines.adrpo import ADRPO
    from flowrl.baselines.awm import AWM
    from flowrl.baselines.crd import CRD
    from flowrl.baselines.ddpo import DDPO
    from flowrl.baselines.dgpo import DGPO
    from flowrl.baselines.dpok import DPOK
    from flowrl.baselines.draft import DRaFT
    from flowrl.baselines.flow_dpo import FlowDPO
    from flowrl.baselines.flow_grpo import FlowGRPO
    from flowrl.baselines.fpo import FPO
    from flowrl.baselines.kl import ExactKL
    from flowrl.baselines.nft import NFT
    from flowrl.baselines.raft import RAFT
    from flowrl.baselines.ram import RAM
    from flowrl.baselines.refl import ReFL
    from flowrl.baselines.rvm import RVM
    from flowrl.baselines.rwr import RWR
    from flowrl.orw_w2 import ORWCFM, ORWCFMKL, ORWCFMW2
    from flowrl.tilt import Tilt

for _module in (_darcy, _digits, _emoji, _gaussians, _plans, _speech, _text_to_image):
    for _spec in _module.SPECS:
        register(_spec)

__all__ = [
    "ADRPO",
    "AWM",
    "CRD",
    "DDPO",
    "DGPO",
    "DPOK",
    "FPO",
    "NFT",
    "ORWCFM",
    "ORWCFMKL",
    "ORWCFMW2",
    "RAFT",
    "RAM",
    "RVM",
    "RWR",
    "AdjointMatching",
    "Batch",
    "DRaFT",
    "EvaluationResult",
    "ExactKL",
    "FlowAlgorithm",
    "FlowConfig",
    "FlowDPO",
    "FlowGRPO",
    "FlowPolicy",
    "GenerationEnv",
    "GenerationVecEnv",
    "PriorFlow",
    "Prompt",
    "ReFL",
    "RewardOutput",
    "Tilt",
    "VelocityModel",
    "algorithm_class",
    "evaluate",
    "make",
    "make_vec",
    "register_algorithm",
    "register_env",
    "register_reward",
]


def __getattr__(name: str) -> Any:
    """Import the class of an algorithm when it is first asked for."""
    for shipped in SHIPPED.values():
        if name == shipped.name:
            return globals().setdefault(name, getattr(import_module(shipped.module), name))
    raise AttributeError(f"module 'flowrl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
