"""Loading checkpoints, which `flowrl.training.saving` writes.

Numbers and strings are read, and nothing else: a hostile folder cannot run code.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from flowrl.checks import is_finite, of_one_kind
from flowrl.distributed.sharding import is_sharded, sharded_like
from flowrl.envs.prompts import fingerprint
from flowrl.errors import CheckpointError, ConfigError, FlowRLError, did_you_mean
from flowrl.registry import ALGORITHMS, ENVIRONMENTS, environment_spec, named_by_a_file
from flowrl.storage import revisions
from flowrl.storage.files import read_json, read_tensors, standing
from flowrl.training.formulas import tell_changes
from flowrl.training.given import only_to_train
from flowrl.training.optimizers import laid_out_like, state_shapes
from flowrl.training.random_states import set_random_states
from flowrl.training.saving import COUNTERS, FORMAT, algorithm_name, description, policy_name

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm


def followed(folder: Path) -> Path:
    """Give the folder that a link leads to now, such as `best`: training may let it lead to another one."""
    return folder.parent / folder.readlink() if folder.is_symlink() else folder


def checkpoint_folder(path: str | Path) -> Path:
    """Find the checkpoint that a path means: itself, or the newest one of a run folder.

    Raises:
        CheckpointError: There is none; says what is there.
    """
    folder = Path(path)
    folder = folder.with_suffix("") if folder.suffix == ".zip" and not folder.exists() else folder
    folder = standing(followed(folder))
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder '{folder}'.")
    if (folder / "state.json").exists() or (folder / "policy.safetensors").exists():
        return folder
    found = [*folder.glob("checkpoints/[!.]*/state.json"), *folder.glob("final/state.json")]
    if not found:
        raise CheckpointError(f"'{folder}' holds no checkpoint (no state.json there, in checkpoints/ or in final/).")
    found = [file for file in found if not file.parent.is_symlink()] or found
    return max(found, key=lambda file: (_trained_samples(file), file.parent.name)).parent


def _trained_samples(file: Path) -> float:
    """Read how many samples a checkpoint was trained on; -1 where training has deleted it meanwhile."""
    try:
        number = read_json(file).get("num_timesteps", 0)
    except CheckpointError:
        if file.exists():
            raise
        return -1
    return number if is_finite(number) else 0


Loaded = TypeVar("Loaded")
MOST_NEWER = 20
"""How many newer checkpoints are tried where each is deleted while it is read."""


def of_newest(path: str | Path, load: Callable[[Path], Loaded]) -> Loaded:
    """Load from the checkpoint that a path means; where a run that goes on deletes it meanwhile, from its newest then.

    Raises:
        CheckpointError: There is none, or it is damaged or does not fit.
    """
    for _ in range(MOST_NEWER):
        folder = checkpoint_folder(path)
        try:
            return load(folder)
        except CheckpointError:
            if checkpoint_folder(path) == folder:
                raise
    return load(checkpoint_folder(path))


def load_checkpoint(
    cls: type[FlowAlgorithm],
    path: str | Path,
    *,
    env: Any = None,
    device: Any = "auto",
    to_train: bool = True,
    **kwargs: Any,
) -> FlowAlgorithm:
    """Load an algorithm from a checkpoint folder, or a run folder's newest checkpoint; see `FlowAlgorithm.load`.

    `to_train`: with random states, the attention backend and given samples, which only training needs. `kwargs`: of the
    constructor, such as `policy` and `policy_kwargs` of one's own, and settings in place of the checkpoint's.
    """
    folder = checkpoint_folder(path)
    _check_given(kwargs, folder)
    config = read_json(folder / "config.json")
    if config.get("format") != FORMAT:
        raise CheckpointError(f"'{folder}' has checkpoint format {config.get('format')}; this flowrl reads {FORMAT}.")
    check_description(config, folder / "config.json")
    cls = _class_of(cls, config, folder)
    env_settings = None
    stored = config.get("environment") or {}
    if isinstance(env, str) and environment_spec(env).name == stored.get("name"):
        env_settings = stored["settings"]
    if env is None:
        if not config.get("environment"):
            raise CheckpointError(f"'{folder}' was trained on an environment object: give it again as env=.")
        env, env_settings = config["environment"]["name"], config["environment"]["settings"]
        if env not in ENVIRONMENTS:
            raise CheckpointError(
                f"'{folder}' was trained on '{env}', which is not registered here. Code named by a checkpoint is never "
                "imported: import its module yourself, or name it (--env module:name)."
            )
    env_settings = pinned_settings(env, env_settings, config)
    _compare_settings(cls, config, folder)
    tell_changes(config, folder, to_train)
    policy = kwargs.pop("policy", "FlowPolicy")
    if (stored_policy := config.get("policy")) not in (None, policy_name(policy)):
        raise CheckpointError(
            f"'{folder}' was trained with the policy '{str(stored_policy)[:200]}': give that class as policy=."
        )
    try:
        settings = tupled(config["settings"])
        algorithm_config = cls.Config(**cast(Any, settings if to_train else settings | {"attention_backend": ""}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The settings in '{folder / 'config.json'}' do not fit {cls.__name__}: {error}."
        ) from error
    try:
        with (
            named_by_a_file(f"'{folder / 'config.json'}'", "import it yourself, or name it (--modules NAME)"),
            only_to_train(to_train),
        ):
            model = cls(
                policy,
                env,
                config=algorithm_config,
                seed=config.get("seed"),
                device=device,
                env_settings=env_settings,
                **kwargs,
            )
    except FlowRLError as error:
        _name_file(error, config["settings"], folder / "config.json")
        raise
    except Exception as error:
        raise CheckpointError(
            f"What '{folder / 'config.json'}' describes cannot be made: {type(error).__name__} {error}."
        ) from error
    _compare_start(model, config, folder, env_settings is not None, to_train)
    is_of_env = env_settings is not None or _is_of(model, config)
    load_state(model, folder, to_train, is_of_env)
    has_same_target = model.config.target_lambda == config["settings"].get("target_lambda", 0.0)
    model.is_aimed = model.iteration > 0 and is_of_env and has_same_target
    return model


def _is_of(model: FlowAlgorithm, config: Mapping[str, Any]) -> bool:
    """Tell whether an environment that was given is a checkpoint's own, by its name, settings and prompts."""
    own = json.loads(json.dumps(description(model)))  # as a file holds it: tuples are lists
    return all(own[key] == config.get(key, own[key]) for key in ("environment", "prompts"))


def _check_given(given: Mapping[str, Any], folder: Path) -> None:
    if own := {"config", "seed", "env_settings"} & given.keys():
        raise ConfigError(
            f"{', '.join(sorted(own))} of '{folder}' are its own. Give single settings by their names "
            "(learning_rate=1e-4), and another environment as env=."
        )


def _compare_start(
    model: FlowAlgorithm, config: Mapping[str, Any], folder: Path, of_file: bool, to_train: bool
) -> None:
    """Check that what is read again, and not in the checkpoint, is as it was.

    `of_file`: the environment is that of the checkpoint's settings.

    Raises:
        CheckpointError: Prompts, or weights that it was trained from, are others now.
    """
    if of_file and config.get("prompts") not in (None, fingerprint(model.env.core.contexts)):
        raise CheckpointError(
            f"'{folder}' was trained on other prompts than '{model.env.core.name}' has now: bring back its prompt "
            "file as it was, or give the environment to go on with as env= (an object)."
        )
    if config.get("init_lora") not in (None, model.policy.model.init_lora_hash):
        raise CheckpointError(
            f"'{folder}' was trained from other LoRA weights than '{model.config.init_lora}' holds now: bring them "
            "back as they were."
        )
    if to_train and config.get("given") not in (None, model.given_hash):
        raise CheckpointError(
            f"'{folder}' was trained on other samples than '{getattr(model.config, 'data', '')}' holds now: bring them "
            "back as they were."
        )
    stored, files = config.get("flow_files"), model.policy.model.files
    others = [name for name in stored if stored[name] != files.get(name)] if isinstance(stored, dict) else []
    if of_file and others:
        raise CheckpointError(
            f"'{folder}' (flowrl {config.get('flowrl')}) was trained from other weights than "
            f"'{model.env.core.flow.source}' holds now: {others[0][:200]} is not what it was. Bring them back, or give "
            "the environment to go on with as env= (an object)."
        )


def _name_file(error: FlowRLError, settings: Mapping[str, Any], file: Path) -> None:
    """Add the file to what an error says of a setting that cannot be used here."""
    if type(error) is ConfigError and any(name in str(error) for name in settings):
        error.args = (f"{error} The settings of a checkpoint are in its config.json: '{file}'.",)


def tupled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists in settings from JSON back into tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def pinned_settings(env: Any, settings: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Pin a hub flow in stored settings to the commit that was trained on; None without settings."""
    if settings is None:
        return None
    flow, read = config.get("flow"), config.get("hub")
    commit = read.get(flow) if isinstance(read, dict) and isinstance(flow, str) else None
    has_flow = "flow" in {field.name for field in fields(environment_spec(env).config)}
    if has_flow and isinstance(commit, str) and revisions.is_commit(commit) and not Path(str(flow)).exists():
        return {**settings, "flow": f"{flow}@{commit}"}
    return dict(settings)


def check_description(config: Mapping[str, Any], file: Path) -> None:
    """Check that `config.json` holds what `description` writes, as far as types go.

    Raises:
        CheckpointError: It does not.
    """
    environment, seed = config.get("environment"), config.get("seed")
    named = isinstance(environment, dict) and isinstance(environment.get("name"), str)
    sound = {
        "algorithm": isinstance(config.get("algorithm"), str),
        "environment": environment is None or (named and isinstance(environment.get("settings"), dict)),
        "settings": isinstance(config.get("settings"), dict),
        "seed": seed is None or (isinstance(seed, int) and 0 <= seed < 2**32),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise CheckpointError(f"The file '{file}' is damaged: '{name}' is no {name}.")


def _compare_settings(cls: type[FlowAlgorithm], config: Mapping[str, Any], folder: Path) -> None:
    """Say which settings a checkpoint of another version has, or has not.

    Raises:
        CheckpointError: It has some that mean nothing here.
    """
    stored, known = config["settings"], {field.name: field for field in fields(cls.Config)}
    of_version = f"'{folder}' was written by flowrl {config.get('flowrl')}"
    if gone := [name for name in stored if name not in known]:
        raise CheckpointError(
            f"{of_version}, and this one has no settings {', '.join(gone)} of {cls.__name__}."
            f"{did_you_mean(gone[0], known)} Train on with that version, or take them out of its config.json."
        )
    if new := [name for name in known if name not in stored]:
        warnings.warn(
            f"{of_version}, before {cls.__name__} had {', '.join(new)}: the defaults of this version are taken.",
            stacklevel=3,
        )


def _class_of(cls: type[FlowAlgorithm], config: Mapping[str, Any], folder: Path) -> type[FlowAlgorithm]:
    """Choose the class to load with: the given one, or for the base class the registered one of that name."""
    name = config.get("algorithm", "")
    if getattr(cls, "__abstractmethods__", None):
        if name not in ALGORITHMS:
            raise CheckpointError(
                f"'{folder}' was trained with '{name}', which is not registered here. Code named by a checkpoint is "
                "never imported: import its module yourself, or name it (--algo module:Class)."
            )
        return ALGORITHMS[name]
    if name not in (algorithm_name(cls), f"{cls.__module__}:{cls.__qualname__}"):
        raise CheckpointError(f"'{folder}' was trained with '{name}', not with '{cls.name or cls.__qualname__}'.")
    return cls


def load_state(model: FlowAlgorithm, folder: Path, to_train: bool = True, is_of_env: bool = True) -> None:
    """Put a checkpoint's weights, optimizer, counters and (to train on) random states into a model of its settings.

    In another environment what is kept of rewards and prompts begins anew: statistics, critics, reference samples.

    Raises:
        CheckpointError: Damaged, or of another architecture; names the file and what does not fit.
    """
    state = read_json(folder / "state.json")
    tensors = read_tensors(folder / "policy.safetensors", model.device)
    moments = read_tensors(folder / "optimizer.safetensors")
    random_states = read_tensors(folder / "random.safetensors") if to_train else None
    for role in model.policy.roles:
        _copy_into(model.policy.networks.tensors_of(role), tensors, role, folder)
        model.policy.networks.weights_changed(role)
    if not model.env.core.flow.reloadable:
        _copy_into(model.policy.networks.frozen_state(), tensors, "frozen", folder)
        model.policy.networks.share_frozen_state()
    try:
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in moments.items():
            index, _, name = key.partition(".")
            entries.setdefault(int(index), {})[name] = value
        _check_moments(entries, model, folder)
        parameters = list(model.policy.parameters_of("current").values())
        entries = {i: {k: _like(v, parameters[i]) for k, v in e.items()} for i, e in entries.items()}
        groups = model.policy.optimizer.state_dict()["param_groups"]
        kept = ("params", "weight_decay")  # what the settings say now; the rate is set before each step
        merged = [{**old, **{k: g[k] for k in kept}} for old, g in zip(state["param_groups"], groups)]
        model.policy.optimizer.load_state_dict({"state": entries, "param_groups": merged})
        for name in COUNTERS:
            setattr(model, name, type(getattr(model, name))(state[name]))
        model.policy.evaluations = int(state["evaluations"]) // model.ranks.world_size
        model.n_dropped = int(state.get("n_dropped", 0))
        stored = {"rollout/reward_mean": state.get("reward"), "rollout/ess": state.get("ess")}
        model.rollout_figures = {
            key: torch.tensor(float(v), device=model.device) for key, v in stored.items() if v is not None
        }
        model.bad_updates.total, model.bad_updates.in_a_row = (int(n) for n in state.get("bad_updates", (0, 0)))
        if random_states is not None:
            set_random_states(model, random_states, state)
        if is_of_env and model.extra_state.state():
            model.extra_state.load(read_tensors(folder / "algorithm.safetensors", model.device))
        if is_of_env and model.env.core.extra_state():
            model.env.core.load_extra_state(read_tensors(folder / "environment.safetensors"))
    except FlowRLError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"The checkpoint '{folder}' is damaged: {type(error).__name__} {error}.") from error


DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError, MemoryError)
"""What code raises when it is given other numbers than it wrote."""


def _like(state: Any, parameter: torch.Tensor) -> Any:
    """Shard a stored moment and lay it out in memory like its parameter."""
    if is_sharded(parameter) or not isinstance(state, torch.Tensor):
        return sharded_like(state, parameter)
    return laid_out_like(state, parameter)


def _check_moments(entries: dict[int, dict[str, Any]], model: FlowAlgorithm, folder: Path) -> None:
    parameters = list(model.policy.parameters_of("current").values())
    for index, entry in entries.items():
        shapes = {key: tuple(value.shape) for key, value in entry.items()}
        file = folder / "optimizer.safetensors"
        if index >= len(parameters) or shapes != state_shapes(model.config, parameters[index]):
            raise CheckpointError(f"'{file}' does not fit this flow: the state of parameter {index} has {shapes}.")
        if model.config.optimizer == "adamw" and not all(value.is_floating_point() for value in entry.values()):
            raise CheckpointError(f"'{file}' does not fit this flow: the state of parameter {index} is of integers.")
        if model.config.optimizer == "adamw8bit":
            entry["step"] = int(entry["step"])  # bitsandbytes counts in Python


def _copy_into(
    target: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], role: str, folder: Path
) -> None:
    own = {n.removeprefix(f"{role}."): t for n, t in tensors.items() if n.startswith(f"{role}.")}
    if own.keys() != target.keys():
        odd = sorted(own.keys() ^ target.keys())
        raise CheckpointError(
            f"'{folder / 'policy.safetensors'}' does not fit this flow: {len(odd)} weights of '{role}' differ in name, "
            f"the first '{odd[0]}'."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != target[name].shape:
                raise CheckpointError(
                    f"'{folder / 'policy.safetensors'}' does not fit this flow: '{name}' has shape "
                    f"{tuple(tensor.shape)}, not {tuple(target[name].shape)}."
                )
            if not of_one_kind(tensor, target[name]):
                raise CheckpointError(
                    f"'{folder / 'policy.safetensors'}' does not fit this flow: '{name}' is of {tensor.dtype}, not "
                    f"{target[name].dtype}."
                )
            target[name].copy_(sharded_like(tensor, target[name]))
