"""From arrays to tensors on a device, without waiting for what the device does meanwhile."""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`. From pinned memory a GPU copies in the order of its own work."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
