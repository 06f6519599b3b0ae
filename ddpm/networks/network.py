"""NETWORKS: the networks that can be trained, by the value of `network.kind`.

To add a network, add its module to this package. The module ends with `NETWORK = ...`, the network's class, and
`network.kind` selects the class by the module's name.

The class is called with image_channels, image_size, and the other entries of the section `network` of params.yaml. Here,
image_size is the side of square images, or [height, width] of other images. For a learned variance, the class also gets
out_channels. For a conditional network, the class also gets `classes`. The class raises ValueError for arguments that do not
fit. The network is called as net(x, t), or as net(x, t, labels) if there are classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpm.rooms import Room

if TYPE_CHECKING:
    from torch import nn

NETWORKS: Room[type[nn.Module]] = Room("ddpm.networks", "network.kind", "NETWORK")
