"""Rewards: functions of samples and their contexts, one file each. Importing this package registers them."""

from flowrl.envs.rewards import (
    aesthetic,
    classifier,
    clip,
    compress,
    count,
    even,
    hpsv2,
    imagereward,
    ocr,
    pickscore,
    remote,
    spatial,
)
from flowrl.envs.rewards.catalogue import REWARDS, make_reward, register_reward

__all__ = [
    "REWARDS",
    "aesthetic",
    "classifier",
    "clip",
    "compress",
    "count",
    "even",
    "hpsv2",
    "imagereward",
    "make_reward",
    "ocr",
    "pickscore",
    "register_reward",
    "remote",
    "spatial",
]
