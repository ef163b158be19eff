"""Compilation of velocity networks by torch.compile, block by block or whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from flowrl.errors import in_a_line
from flowrl.types import Compile

VARIANTS = 64
"""Compiled variants of one block: kinds of blocks, times batch sizes, times passes with and without gradients."""
LARGE = 300_000_000
"""Parameters from which a network is worth the minute or two that compiling takes."""


def default_compile(network: nn.Module, device: torch.device | str) -> Compile:
    """Choose what "auto" means for a network in training: blocks of large networks on CUDA, "off" anywhere else."""
    is_large = sum(p.numel() for p in network.parameters()) >= LARGE
    return "blocks" if torch.device(device).type == "cuda" and is_large else "off"


def compile_network(network: nn.Module, kind: Compile) -> None:
    """Compile a network in place, for fixed shapes; the first pass of each shape does the work.

    Args:
        network: Its names and weights stay as they are.
        kind: "blocks" compiles the blocks that a network repeats, each kind of block once; "whole" all of it at once.
    """
    if kind == "off":
        return
    _prepare()
    for module in repeated_blocks(network) if kind == "blocks" else [network]:
        module.compile(dynamic=False)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Find the blocks that a network repeats: those that it names itself, or the outermost entries of its lists.

    A network without any is its own block. torch's own layers are none: their `compile` does nothing, without a word.
    """
    names = getattr(network, "_repeated_blocks", None) or ()
    named = [module for module in network.modules() if type(module).__name__ in names]
    blocks = [block for block in named or _listed(network) if not type(block).__module__.startswith("torch.nn.")]
    return blocks or [network]


def gathered_blocks(network: nn.Module) -> list[str]:
    """Name the classes of blocks whose weights a pass needs one after the other, where they are sharded over ranks.

    They are those that the network, or a network in it, says not to split, as far as there are any; or that it repeats.
    """
    names = {name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    there = {type(module).__name__ for module in network.modules()}
    kinds = {type(block) for block in repeated_blocks(network) if block is not network}
    return sorted(names & there or {kind.__name__ for kind in kinds if not kind.__module__.startswith("peft.")})


def _listed(network: nn.Module) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for child in network.children():
        blocks += list(child) if isinstance(child, nn.ModuleList) else _listed(child)
    return blocks


def why_uncompiled(error: Exception) -> str:
    """Say what an error of torch's compiler means for the user; empty for any other error."""
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is None or not isinstance(error, compiler.TorchDynamoException):
        return ""
    reason = in_a_line(getattr(error, "inner_exception", error))
    return (
        f"The network cannot be compiled here ({reason}). Install what is missing, or go without: --algo.compile off "
        "for a new run, the environment variable TORCHDYNAMO_DISABLE=1 for any."
    )


def cache_folder() -> str:
    """Find the folder where compiled code is kept for the next run."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowrl" / "inductor"
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(own))


def _prepare() -> None:
    """Let the compiler keep enough variants, and what it made for the next run."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_folder()
    import torch._dynamo

    settings = torch._dynamo.config
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # of torch 2.6
    setattr(settings, limit, max(getattr(settings, limit), VARIANTS))
