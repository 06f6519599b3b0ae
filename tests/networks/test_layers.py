from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ddpm.networks.network import NETWORKS

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,)},
    "dit": {"width": 32, "depth": 2, "heads": 2, "patch": 2},
}


@pytest.mark.parametrize("kind", SMALL)
def test_the_prediction_is_not_rounded_under_autocast(kind: str) -> None:
    """A prediction that is rounded to bfloat16 has an error of up to 2 ** -9 of each value, whatever the network learns."""
    torch.manual_seed(0)
    net = NETWORKS.select(kind)(image_channels=3, image_size=8, **SMALL[kind])
    nn.init.normal_(net.last.weight, std=0.1)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 10.0, 500.0, 999.0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inputs: list[torch.Tensor] = []
        hook = net.last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        prediction = net(x, t)
        hook.remove()
    with torch.no_grad():
        assert torch.equal(net.last(inputs[0]).flatten().sort()[0], prediction.flatten().sort()[0])
        assert (prediction != prediction.bfloat16()).double().mean() > 0.9
        assert inputs[0].dtype == prediction.dtype == torch.float32
