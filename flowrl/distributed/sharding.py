"""Networks whose weights are sharded over ranks (FSDP2)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: torch.Tensor) -> TypeIs[DTensor]:
    """Tell whether each rank holds a shard of the tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # takes a second to import, and who shards has done it
    return module is not None and isinstance(tensor, module.DTensor)


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """Gather the shards of all ranks, each of which must call this; other tensors come back as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Give this rank's shard; other tensors come back as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard an unsharded tensor as `like` of the same shape is; where that is no shard, give it back as it is."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard(accelerator: object, network: nn.Module) -> None:
    """Shard a network that is not trained as accelerate is configured to shard the trained one, in place."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, network)


def reshard(network: nn.Module) -> None:
    """Free the unsharded weights of a forward pass: after an update of the shards they are stale."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
