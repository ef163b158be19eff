"""Double precision, also for tensors of devices that have none."""

from __future__ import annotations

import torch

WITHOUT_FLOAT64 = {"mps"}
"""Types of devices whose tensors are float32 at most."""


def has_float64(device: torch.device) -> bool:
    """Tell whether a device computes in float64."""
    return device.type not in WITHOUT_FLOAT64


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """Convert to float64, with its gradient: where x is, or on the CPU where its device has none."""
    return (x if has_float64(x.device) else x.cpu()).double()
