"""An example network of two convolutions. Copied to ddpm/networks/toy.py, it is selected by `network.kind: toy`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """Predicts from x_t and t. width: the number of inner channels, an entry of `network` in params.yaml."""

    def __init__(self, image_channels: int, image_size: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width = {width} must be 1 or more")
        self.first = nn.Conv2d(image_channels + 1, width, 3, padding=1)
        self.last = nn.Conv2d(width, image_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t / 1000).to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.last(self.first(torch.cat([x, time], dim=1)).tanh())


NETWORK = Toy
