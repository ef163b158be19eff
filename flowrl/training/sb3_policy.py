"""SB3Policy: a policy of stable-baselines3 around the networks of a flow, and the count of what they were asked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from flowrl.errors import ConfigError
from flowrl.training.role_networks import RoleNetworks
from flowrl.types import Role


class SB3Policy(BasePolicy):
    """A policy whose actions are samples drawn for contexts: what stable-baselines3 asks of one.

    Attributes:
        networks: The velocity network in its roles.
    """

    networks: RoleNetworks
    optimizer: Any  # of its algorithm

    @abstractmethod
    def sample(self, contexts: Any = None, n: int = 1, **kwargs: Any) -> torch.Tensor:
        """Draw samples (B, *sample_shape) for context indices (B,)."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles that have weights of their own."""
        return self.networks.roles

    @property
    def evaluations(self) -> int:
        """Network evaluations so far: a forward pass is 1 per sample, a backward pass 2."""
        return self.networks.spent[0]

    @evaluations.setter
    def evaluations(self, spent: int) -> None:
        self.networks.spent[0] = spent

    @property
    def sampling_role(self) -> Role:
        """The role that `sample` and `predict` use: the moving average where there is one."""
        return "ema" if "ema" in self.roles else "current"

    def parameters_of(self, role: Role) -> dict[str, nn.Parameter]:
        """Give a role's own parameters by name: the whole network's, or the adapter's."""
        return self.networks.parameters_of(role)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Make a context whose network evaluations do not count."""
        before = self.evaluations
        try:
            yield
        finally:
            self.evaluations = before

    @contextmanager
    def in_update(self) -> Iterator[None]:
        """Make a context in which the current network is in training mode.

        An error that ends it takes the gradients along: those of half a step would be added to the next one's.
        """
        self.set_training_mode(True)
        try:
            yield
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        finally:
            self.set_training_mode(False)  # whatever samples or measures now goes without dropout

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Draw samples for observed contexts, as arrays.

        A flow is random through its noise; `deterministic` has no meaning here and is ignored.
        """
        index = np.asarray(observation)
        samples = self.sample(torch.from_numpy(np.atleast_1d(index).astype(np.int64).reshape(-1)))
        actions = samples.cpu().numpy()
        return (actions if index.ndim else actions[0]), state

    def _predict(self, observation: Any, deterministic: bool = False) -> torch.Tensor:
        return self.sample(observation.reshape(-1).long())

    def save(self, path: Any) -> None:
        """Refuse to pickle a policy.

        Raises:
            ConfigError: Always; says what to do instead.
        """
        raise ConfigError(
            "A policy has no file of its own: model.save('folder') of its algorithm writes a checkpoint, from which "
            "load('folder').policy comes back; `python -m flowrl.export` writes weights for other libraries."
        )

    @classmethod
    def load(cls, path: Any, device: Any = "auto") -> Any:
        """Refuse to read a pickle.

        Raises:
            ConfigError: Always; says what to do instead.
        """
        raise ConfigError(
            "A policy has no file of its own: load the checkpoint of its algorithm, as in "
            "flowrl.ORWCFMW2.load('folder').policy."
        )

    def load_from_vector(self, vector: Any) -> None:
        """Refuse weights without names.

        Raises:
            ConfigError: Always; says what to do instead.
        """
        raise ConfigError("Weights have names here: model.set_parameters takes what model.get_parameters gives.")

    def set_training_mode(self, mode: bool) -> None:
        """Put the current network into training or evaluation mode; copies stay in evaluation mode."""
        self.networks.set_training_mode(mode)
