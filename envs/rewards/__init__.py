"""Rewards: functions of samples and their contexts, one file each. Importing this package registers them."""

from flowrl.envs.rewards import aesthetic, compress, count, remote
from flowrl.envs.rewards.catalogue import REWARDS, make_reward, register_reward

__all__ = ["REWARDS", "aesthetic", "compress", "count", "make_reward", "register_reward", "remote"]
