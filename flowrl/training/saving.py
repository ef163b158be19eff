"""Writing of checkpoints: a folder of JSON and safetensors, written atomically, never a pickle.

config.json         algorithm, settings, environment, seed
state.json          counters, optimizer settings, shapes of what the tensors mean
policy.safetensors  weights of every role ("current.NAME", "behaviour.NAME", ...)
optimizer.safetensors
random.safetensors  states of all random generators
algorithm.safetensors  what else an algorithm keeps (running statistics, a critic); only where it keeps any
environment.safetensors  what an environment keeps (running statistics of its reward); only where it keeps any
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowrl.distributed.sharding import unsharded
from flowrl.envs.prompts import fingerprint
from flowrl.errors import CheckpointError
from flowrl.registry import ALGORITHMS
from flowrl.storage import revisions
from flowrl.storage.files import host_copies, replace_folder, save_tensors, write_json
from flowrl.training.formulas import CHANGES
from flowrl.training.random_states import random_states
from flowrl.version import __version__

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm
    from flowrl.training.policy import FlowPolicy

FORMAT = 1
COUNTERS = ("num_timesteps", "iteration", "_n_updates", "_total_timesteps", "_current_progress_remaining")


def save_checkpoint(model: FlowAlgorithm, path: str | Path) -> Path:
    """Write the whole training state into the folder `path` (a `.zip` ending is dropped); see `Snapshot`.

    Raises:
        CheckpointError: The folder cannot be written; what was there before is left as it was.
    """
    return Snapshot.of(model).write(path)


@dataclass(frozen=True)
class Snapshot:
    """The whole training state at a moment, which need not be the moment when it is written.

    Nothing in it depends on how many ranks there are: others can go on with it. Ranks other than the main one have an
    empty one.

    Attributes:
        documents: Content of the JSON files, by name.
        tensors: Tensors of the safetensors files, by name; the run's own, unless `copied`.
        export: Writes the adapter for other libraries into a folder.
    """

    documents: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    export: Callable[[Path, Mapping[str, torch.Tensor]], None] | None
    is_copied: bool = False

    @classmethod
    def of(cls, model: FlowAlgorithm) -> Snapshot:
        """Take the state now. With several ranks all of them have to ask."""
        weights, moments = _weights(model), _moments(model)  # of sharded networks every rank gives its part
        if not model.ranks.is_main:
            return cls({}, {}, None)
        state, generators = _counters(model)
        tensors = {
            "policy.safetensors": weights,
            "optimizer.safetensors": moments,
            "random.safetensors": generators,
            "algorithm.safetensors": model.extra_state.state(),
            "environment.safetensors": model.env.core.extra_state(),
        }
        export = None if model.policy.lora is None else partial(_export, model.policy)  # full weights: not twice
        documents = {"config.json": description(model), "state.json": state}
        return cls(documents, {name: file for name, file in tensors.items() if file or name not in OPTIONAL}, export)

    def copied(self) -> Snapshot:
        """Copy the tensors to the host: training may go on before they are written."""
        tensors = {name: host_copies(file) for name, file in self.tensors.items()}
        return replace(self, tensors=tensors, is_copied=True)

    def write(self, path: str | Path) -> Path:
        """Write the folder `path` (a `.zip` ending is dropped), on the main rank.

        Everything goes to a temporary folder beside it first, which is then renamed: `path` is either the old
        checkpoint or the new one.

        Raises:
            CheckpointError: The folder cannot be written, or holds something else than a checkpoint; what was there
                before is left as it was.
        """
        folder = Path(path)
        folder = folder.with_suffix("") if folder.suffix == ".zip" else folder
        if not self.documents:
            return folder
        try:
            if folder.exists() and not _may_be_replaced(folder):
                raise OSError(f"it is there and no checkpoint, and would be deleted; take '{folder}-model', say")
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise CheckpointError(f"Cannot write a checkpoint to '{folder}': {error}.") from error
        try:
            for name, content in self.documents.items():
                write_json(temporary / name, content)
            for name, tensors in self.tensors.items():
                save_tensors(temporary / name, tensors if self.is_copied else host_copies(tensors))
            if self.export is not None:
                self.export(temporary, self.tensors["policy.safetensors"])
            replace_folder(temporary, folder)
        except Exception as error:
            raise CheckpointError(
                f"Writing the checkpoint '{folder}' failed: {error}. An older checkpoint there is as it was."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder


def _may_be_replaced(folder: Path) -> bool:
    """Tell whether a folder is empty or a checkpoint, whole or damaged."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or bool(names & {"state.json", "policy.safetensors", "optimizer.safetensors"})


OPTIONAL = ("algorithm.safetensors", "environment.safetensors")
"""Files that are left out where there is nothing to be in them."""


def _export(policy: FlowPolicy, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    role = policy.sampling_role
    adapter = {name.removeprefix(f"{role}."): t for name, t in weights.items() if name.startswith(f"{role}.")}
    policy.networks.export(folder, role, adapter)


def description(model: FlowAlgorithm) -> dict[str, Any]:
    """Describe the algorithm for `config.json`: enough to build it again."""
    origin = model.env.core.origin
    cls = type(model)
    return {
        "format": FORMAT,
        "flowrl": __version__,
        "algorithm": (algorithm := algorithm_name(cls)),
        **({"formulas": len(CHANGES[algorithm])} if algorithm in CHANGES else {}),
        "settings": asdict(model.config),
        **({"policy": name} if (name := policy_name(type(model.policy))) else {}),
        "environment": None if origin is None else {"name": origin[0], "settings": _plain(origin[1])},
        "prompts": fingerprint(model.env.core.contexts),
        "flow": model.env.core.flow.source,
        "flow_files": dict(model.policy.model.files),
        "init_lora": model.policy.model.init_lora_hash or None,
        **({"given": model.given_hash} if model.given_hash else {}),
        "hub": dict(revisions.READ),
        "seed": model.seed,
    }


def algorithm_name(cls: type) -> str:
    """Give the registered name, or `module:Class`; a subclass of a registered class is not that class."""
    name = getattr(cls, "name", "")
    return name if ALGORITHMS.get(name) is cls else f"{cls.__module__}:{cls.__qualname__}"


def policy_name(policy: Any) -> str | None:
    """Give `module:Class` of a policy of one's own; None for FlowPolicy, by its class or its name."""
    is_own = isinstance(policy, type) and (policy.__module__, policy.__name__) != (
        "flowrl.training.policy",
        "FlowPolicy",
    )
    return f"{policy.__module__}:{policy.__qualname__}" if is_own else None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that JSON can hold; a factory or any other object is left out (the caller gives it again)."""
    plain = {}
    for key, value in settings.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        plain[key] = value
    return plain


def _weights(model: FlowAlgorithm) -> dict[str, torch.Tensor]:
    policy = model.policy
    tensors = {
        f"{role}.{name}": tensor for role in policy.roles for name, tensor in policy.networks.tensors_of(role).items()
    }
    if not model.env.core.flow.reloadable:
        tensors |= {f"frozen.{name}": tensor for name, tensor in policy.networks.frozen_state().items()}
    return _whole(model, tensors)


def _moments(model: FlowAlgorithm) -> dict[str, torch.Tensor]:
    states = [model.policy.optimizer.state.get(p, {}) for p in model.policy.parameters_of("current").values()]
    return _whole(model, {f"{i}.{k}": torch.as_tensor(v) for i, entry in enumerate(states) for k, v in entry.items()})


def _whole(model: FlowAlgorithm, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Unshard tensors onto the main rank's host, where networks are sharded."""
    if not model.ranks.is_sharded:
        return dict(tensors)
    gathered = ((name, unsharded(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if model.ranks.is_main}


def _counters(model: FlowAlgorithm) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Collect what `state.json` and `random.safetensors` hold."""
    policy = model.policy
    tensors, kept = random_states(model)
    state = {name: getattr(model, name) for name in COUNTERS} | kept
    state |= {
        "evaluations": policy.evaluations * model.ranks.world_size,
        "n_dropped": model.n_dropped,
        "bad_updates": [model.bad_updates.total, model.bad_updates.in_a_row],
        "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in policy.optimizer.param_groups],
        "reward": model.rollout_reward,
        "ess": _number(model.rollout_figures.get("rollout/ess")),
    }
    return state, tensors


def _number(value: torch.Tensor | None) -> float | None:
    """Convert a scalar for JSON, None where there is none or it is not finite."""
    return None if value is None or not bool(value.isfinite()) else float(value)
