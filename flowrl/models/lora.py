"""LoRA by peft: one base network, an adapter per role, the reference with all of them switched off."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from flowrl.errors import ConfigError
from flowrl.models.base import VelocityModel
from flowrl.types import Role


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al. 2021).

    Attributes:
        rank: Rank of the adapters.
        alpha: Their scale; they count `alpha / rank` times.
        dropout: Dropout before the trained adapter.
        targets: Ends of the names of adapted modules; the flow's own choice when empty.
        parts: Of those, modules with a parameter whose name contains one of these; all when empty.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @staticmethod
    def of(config: Any) -> LoRA | None:
        """Read the adapters that a config asks for; None for full fine-tuning."""
        rank = config.lora_rank
        if not rank:
            return None
        alpha = config.lora_alpha or 2.0 * rank
        return LoRA(rank, alpha, config.lora_dropout, config.lora_targets, config.trained_parameters)


class Factor(nn.Module):
    """A factor of an adapter: kept in float32, used in the type of what it is given, so that no activation is cast."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the factor."""
        return nn.functional.linear(x, self.weight.to(x.dtype))


def add_adapters(model: VelocityModel, names: list[str], lora: LoRA) -> dict[str, Any]:
    """Put LoRA adapters into the network (in place); only the first is trainable.

    Returns:
        The adapted layers by name.

    Raises:
        ConfigError: There are no such modules, or LoRA cannot adapt them.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets = list(lora.targets) or model.lora_targets or _linear_layers(model.network)
    names_there = [name for name, _ in model.network.named_modules()]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names_there):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in _linear_layers(model.network))
            raise ConfigError(
                f"lora_targets: no module of this network is named '{target}', so nothing there would be trained. "
                f"Linear layers end in {', '.join(list(ends)[:12])}."
            )
    others = "|".join(map(re.escape, _modules_without(model.network, lora.parts))) if lora.parts else None
    model.network.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant here
        for name in names:
            config = LoraConfig(
                r=lora.rank,
                lora_alpha=cast(int, lora.alpha),
                lora_dropout=lora.dropout if name == "current" else 0.0,
                target_modules=targets,
                exclude_modules=others,
                init_lora_weights="gaussian",
            )
            try:
                inject_adapter_in_model(config, model.network, adapter_name=name)
            except ValueError as error:
                reason = str(error)
                if lora.parts and "No modules were targeted" in reason:
                    reason = "no module that lora_targets names has a parameter of trained_parameters."
                raise ConfigError(f"LoRA cannot be put on this network: {reason}") from error
    adapters: dict[str, Any] = {n: m for n, m in model.network.named_modules() if isinstance(m, BaseTunerLayer)}
    _activate(adapters.values(), "current")
    _keep_factors_in_float32(adapters.values())
    state = {n: p for n, p in model.network.named_parameters()}
    with torch.no_grad():
        for name, parameter in state.items():
            for other in names[1:]:
                if f".{other}." in name:
                    parameter.copy_(state[name.replace(f".{other}.", ".current.")])
    return adapters


def _keep_factors_in_float32(adapters: Iterable[Any]) -> None:
    """Keep adapters in float32, whatever the base network's type, without casts of activations."""
    for layer in adapters:
        layer.cast_input_dtype_enabled = False
        for factors in (layer.lora_A, layer.lora_B):
            factors.float()
            for name, factor in factors.items():
                if type(factor) is nn.Linear:
                    factors[name] = Factor(factor.weight)


def freeze_others(network: nn.Module, trained: Iterable[str]) -> None:
    """Leave gradients to those parameters alone (in place) whose names contain one of `trained`; to all when empty.

    Raises:
        ConfigError: One of them is in no name.
    """
    trained = list(trained)
    for part in trained:
        if not any(part in name for name, _ in network.named_parameters()):
            parts = dict.fromkeys(p for name, _ in network.named_parameters() for p in name.split("."))
            telling = [p for p in parts if not p.isdecimal()]
            raise ConfigError(
                f"trained_parameters: no parameter of this network has '{part}' in its name, so nothing there would be "
                f"trained. Names are made of {', '.join(telling[:60])}."
            )
    for name, parameter in network.named_parameters():
        if trained and not any(part in name for part in trained):
            parameter.requires_grad_(False)


def count_parameters(model: VelocityModel, lora: LoRA | None, trained: Iterable[str] = ()) -> tuple[int, int]:
    """Count the frozen and the trained parameters of the network; `model` may be on the meta device."""
    if lora is not None:
        add_adapters(model, ["current"], lora)
    freeze_others(model.network, trained)
    parameters = list(model.network.parameters())
    n_trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters) - n_trained, n_trained


def _modules_without(network: nn.Module, parts: Iterable[str]) -> list[str]:
    """List modules with parameters of which none has one of `parts` in its name."""
    own = {name: dict(module.named_parameters(name, recurse=False)) for name, module in network.named_modules()}
    return [name for name, found in own.items() if found and not any(part in key for part in parts for key in found)]


def _linear_layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def _activate(adapters: Iterable[Any], name: str) -> None:
    for layer in adapters:
        layer.set_adapter(name)


def activate_in_copy(network: nn.Module, role: Role) -> None:
    """Switch another adapter on in a copy that shares its parameters; whether these are trained stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    _activate((layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)), role)
    for parameter, is_trained in trained:
        parameter.requires_grad_(is_trained)


class switched:
    """Context in which another adapter is active, or none ("reference"), with gradients' flags as before.

    `before_change` is called before flags change: where weights are sharded, flags belong to the shards.
    """

    def __init__(self, adapters: Iterable[Any], role: Role, before_change: Callable[[], None] = lambda: None) -> None:
        self.adapters, self.role, self.before_change = adapters, role, before_change

    def __enter__(self) -> None:
        self.before_change()
        for layer in self.adapters:
            if self.role == "reference":
                layer.enable_adapters(False)
            else:
                layer.set_adapter(self.role, inference_mode=True)

    def __exit__(self, *exc: object) -> None:
        self.before_change()
        for layer in self.adapters:
            if self.role == "reference":
                layer.enable_adapters(True)
            layer.set_adapter("current")
