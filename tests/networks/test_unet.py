"""Compares the network's number of parameters with the paper's and with diffusers', and checks the network's symmetries."""

import pytest
import torch

from ddpm import UNet
from ddpm.networks.layers import time_embedding
from ddpm.networks.unet import groups


def parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def lively(net: torch.nn.Module) -> torch.nn.Module:
    """Sets random weights everywhere, even where training starts from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + 0.01)
    return net.eval()


def test_the_papers_network_has_35_7_million_parameters() -> None:
    assert parameters(UNet(dropout=0.1)) == 35_746_307


@pytest.mark.parametrize(
    ("channels", "multipliers", "blocks", "attention"),
    [(128, (1, 2, 2, 2), 2, (16,)), (32, (1, 2), 1, (16,)), (64, (1, 1, 2), 3, (32, 8)), (32, (1, 2, 4), 2, ())],
)
def test_diffusers_counts_the_same(channels: int, multipliers: tuple, blocks: int, attention: tuple) -> None:
    diffusers = pytest.importorskip("diffusers")
    sides = [32 // 2**level for level in range(len(multipliers))]
    theirs = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=[channels * multiplier for multiplier in multipliers],
        layers_per_block=blocks,
        down_block_types=["AttnDownBlock2D" if side in attention else "DownBlock2D" for side in sides],
        up_block_types=["AttnUpBlock2D" if side in attention else "UpBlock2D" for side in reversed(sides)],
        attention_head_dim=None,
        norm_num_groups=groups(channels),
    )
    assert parameters(UNet(3, 32, channels, multipliers, blocks, attention)) == parameters(theirs)


def test_the_digits_network_is_half_a_million_or_more() -> None:
    assert 5e5 < parameters(UNet(1, 8, 32, (1, 2), 1, (4,))) < 1e6


def test_time_embedding_by_hand() -> None:
    embedding = time_embedding(torch.tensor([0.0, 3.0]), 6)
    frequencies = torch.tensor([1.0, 10_000**-0.5, 10_000**-1.0])
    assert torch.allclose(embedding[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    assert torch.allclose(embedding[1], torch.cat([(3 * frequencies).sin(), (3 * frequencies).cos()]))


def test_it_starts_by_predicting_zero() -> None:
    net = UNet(1, 8, 32, (1, 2), 1, (4,))
    assert torch.equal(net(torch.randn(2, 1, 8, 8), torch.tensor([0.0, 500.0])), torch.zeros(2, 1, 8, 8))


def test_images_of_a_batch_do_not_mix_and_memory_format_changes_nothing() -> None:
    net = lively(UNet(3, 16, 32, (1, 2), 1, (8,), heads=2))
    x, t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 10.5, 999.0])
    with torch.no_grad():
        together = net(x, t)
        assert float(together.std()) > 0.01
        for i in range(3):
            assert torch.allclose(net(x[i : i + 1], t[i : i + 1])[0], together[i], atol=1e-5)
        assert torch.allclose(net.to(memory_format=torch.channels_last)(x, t), together, atol=1e-5)


@torch.no_grad()
def test_a_network_on_patches_is_the_network_on_images_of_the_patches() -> None:
    """Space-to-depth by hand: channel c * 4 + 2i + j holds the pixels in rows 2r + i and columns 2s + j of channel c."""
    net = lively(UNet(3, 16, 32, (1, 2), 1, (8,), patch=2, out_channels=6))
    other = UNet(12, 8, 32, (1, 2), 1, (8,), out_channels=24)
    other.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0])
    pieces = [x[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)]
    expected, found = other(torch.stack(pieces, 1), t), net(x, t)
    assert found.shape == (2, 6, 16, 16) and float(found.std()) > 0.01
    for c in range(6):
        for i in range(2):
            for j in range(2):
                assert torch.equal(found[:, c, i::2, j::2], expected[:, 4 * c + 2 * i + j])


def test_time_and_position_matter() -> None:
    net = lively(UNet(1, 8, 32, (1, 2), 1, (4,)))
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(net(x, torch.tensor([1.0])), net(x, torch.tensor([2.0])), atol=1e-4)
        assert not torch.allclose(net(x.flip(-1), torch.tensor([1.0])).flip(-1), net(x, torch.tensor([1.0])), atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_transposed_network_predicts_the_transposed_image(symmetric: bool, residual: bool) -> None:
    """Swaps rows and columns of the kernels. `attention` names heights, so the transposed network gets other numbers."""
    wide, high = (
        lively(
            UNet(
                3,
                size,
                channels=16,
                multipliers=(1, 2, 2),
                blocks=1,
                attention=heights[1:2],
                attention_up=heights[2:],
                residual_down=heights[:1] if residual else (),
                residual_up=heights[1:2] if residual else (),
                symmetric_padding=symmetric,
            )
        )
        for size, heights in (((16, 24), (16, 8, 4)), ((24, 16), (24, 12, 6)))
    )
    state = wide.state_dict()
    high.load_state_dict({name: x.transpose(2, 3) if x.ndim == 4 else x for name, x in state.items()})
    x, t = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        expected = wide(x, t)
        assert expected.shape == x.shape and float(expected.std()) > 0.01
        assert torch.allclose(high(x.mT, t).mT, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_sides_decide_nothing_but_where_attention_is() -> None:
    """Weights start with the same bits as those of a square network. A square image_size may be a pair too."""
    nets = []
    for size in (16, (16, 16), [16, 24]):
        torch.manual_seed(0)
        nets.append(UNet(3, size, 16, (1, 2), 1, (8,)))
    first, *others = (net.state_dict() for net in nets)
    for state in others:
        assert state.keys() == first.keys()
        assert all(torch.equal(state[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": (7,)}, "attention at height 7 never occurs"),
        ({"residual_up": (7,)}, "residual_up at height 7 never occurs"),
        ({"image_size": 30}, "cannot be halved"),
        ({"image_size": (32, 30)}, r"image_size \(32, 30\) cannot be halved 3 times"),
        ({"image_size": (64, 96), "attention": (24,)}, "64x96, 32x48, 16x24, 8x12$"),
        ({"channels": 12}, "multiple of 8"),
        ({"heads": 7}, "must divide"),
        ({"image_size": 32, "patch": 3}, "patch = 3 pixels: take a patch that divides both sides$"),
        ({"image_size": 28, "patch": 2, "multipliers": (1, 1, 1)}, "in patches of 2x2 pixels, 14x14, cannot be"),
        (
            {"image_size": 28, "patch": 2, "multipliers": (1, 2), "attention": (28,)},
            "in patches of 2x2 pixels.* 14x14, 7x7$",
        ),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)
