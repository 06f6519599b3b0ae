"""The networks that can be trained, one module each, and kernels that make them fast on a CPU.

A network is a function of (x_t, t). Losses and schedules do not belong here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpm.rooms import Room

if TYPE_CHECKING:
    from torch import nn

# By name the class, whose arguments are image_channels, image_size, the `network` section of params.yaml, and out_channels and
# classes where these are asked for. It is called as net(x, t), or as net(x, t, labels) where there are classes.
NETWORKS: Room[type[nn.Module]] = Room("ddpm.networks", "network.kind", "NETWORK")
