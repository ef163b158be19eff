"""Networks of which each rank keeps a part of every weight (FSDP2): what else they need than whole ones."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_divided(tensor: torch.Tensor) -> TypeIs[DTensor]:
    """Whether each rank holds a part of the tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # takes a second to import, and who divides has done it
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the parts of all ranks, each of which must call this; other tensors as they are."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part; other tensors as they are."""
    return tensor.to_local() if is_divided(tensor) else tensor


def divided_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor divided among ranks as `like` of the same shape is; other tensors as they are."""
    if not is_divided(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def divide(accelerator: object, network: nn.Module) -> None:
    """Divide a network that is not trained as accelerate is configured to divide the trained one, in place."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, network)


def let_go(network: nn.Module) -> None:
    """Forget weights gathered for a forward pass: after a change of the parts they are those of before."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
