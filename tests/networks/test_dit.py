"""Compares the transformer with diffusers' DiT, and checks its own symmetries."""

import pytest
import torch
from torch import Tensor, nn

from ddpm.networks.dit import DiT, positions


def lively(net: DiT) -> DiT:
    """Sets random weights everywhere, even where training starts from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return net.eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


@torch.no_grad()
def test_it_is_the_transformer_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    net = lively(DiT(3, 8, width=32, depth=2, heads=4, patch=2, out_channels=6, classes=5))
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    theirs.pos_embed.proj.weight.copy_(net.first.weight.view(32, 3, 2, 2))
    theirs.pos_embed.proj.bias.copy_(net.first.bias)
    for block, other in zip(net.blocks, theirs.transformer_blocks, strict=True):
        embedder = other.norm1.emb
        cosines_first = net.time[0].weight.roll(128, dims=1)
        linear(embedder.timestep_embedder.linear_1, cosines_first, net.time[0].bias)
        linear(embedder.timestep_embedder.linear_2, net.time[2].weight, net.time[2].bias)
        embedder.class_embedder.embedding_table.weight.copy_(net.label.weight)
        linear(other.norm1.linear, block.modulation.weight, block.modulation.bias)
        for index, layer in enumerate((other.attn1.to_q, other.attn1.to_k, other.attn1.to_v)):
            linear(layer, *(tensor[32 * index : 32 * index + 32] for tensor in (block.qkv.weight, block.qkv.bias)))
        linear(other.attn1.to_out[0], block.out.weight, block.out.bias)
        linear(other.ff.net[0].proj, block.wide.weight, block.wide.bias)
        linear(other.ff.net[2], block.narrow.weight, block.narrow.bias)
    linear(theirs.proj_out_1, net.modulation.weight, net.modulation.bias)
    channels_last = torch.arange(24).view(6, 4).T.flatten()  # the order of a patch's numbers
    linear(theirs.proj_out_2, net.last.weight[channels_last], net.last.bias[channels_last])
    x, t, labels = random(3, 3, 8, 8), torch.tensor([0.0, 7.0, 999.0]), torch.tensor([0, 4, -1])
    expected = theirs(x, t, torch.where(labels < 0, 5, labels)).sample
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(net(x, t, labels), expected, rtol=1e-4, atol=1e-4)


def test_it_starts_by_predicting_zero_and_every_block_by_changing_nothing() -> None:
    net = DiT(1, 8, width=16, depth=2, heads=2, classes=3)
    x, t = random(2, 1, 8, 8), torch.tensor([0.0, 500.0])
    assert torch.equal(net(x, t), torch.zeros(2, 1, 8, 8))
    tokens = random(2, 16, 16)
    assert torch.equal(net.blocks[0](tokens, random(2, 16, seed=1)), tokens)


@torch.no_grad()
def test_images_of_a_batch_do_not_mix() -> None:
    net = lively(DiT(3, (8, 12), width=16, depth=2, heads=2, classes=3))
    x, t, labels = random(3, 3, 8, 12), torch.tensor([0.0, 10.5, 999.0]), torch.tensor([0, -1, 2])
    together = net(x, t, labels)
    assert float(together.std()) > 0.01
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(net(x[one], t[one], labels[one]), together[one], rtol=0, atol=1e-5)
    assert torch.equal(net(x[1:2], t[1:2]), net(x[1:2], t[1:2], labels[1:2]))  # a missing label equals a negative label
    for other in ((x[2:], t[2:], labels[:1]), (x[2:], t[:1], labels[2:])):
        assert not torch.allclose(net(*other), together[2:], atol=1e-4)


@torch.no_grad()
def test_without_positions_the_order_of_patches_means_nothing() -> None:
    net = lively(DiT(1, (8, 12), width=16, depth=2, heads=2, patch=4))
    x, t = random(1, 1, 8, 12), torch.tensor([300.0])

    def rolled(image: Tensor) -> Tensor:
        return image.roll((4, 8), dims=(2, 3))

    assert not torch.allclose(net(rolled(x), t), rolled(net(x, t)), atol=1e-3)
    net.positions.zero_()
    torch.testing.assert_close(net(rolled(x), t), rolled(net(x, t)), rtol=0, atol=1e-5)


def test_positions_tell_patches_apart() -> None:
    """By hand: rows and columns use half of the channels each, sines first, with frequencies 1 and 1/100."""
    found = positions(2, 3, 8)
    angles = torch.tensor([1.0, 0.01])
    last = [torch.cat([(place * angles).sin(), (place * angles).cos()]) for place in (2, 1)]
    torch.testing.assert_close(found[5], torch.cat(last))
    assert len(found.unique(dim=0)) == 6


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"width": 18, "heads": 2}, "width = 18 must be a multiple of 4"),
        ({"heads": 3}, "heads = 3 must divide width = 16"),
        ({"depth": 0}, "depth = 0 must lie in 1 ... 256"),
        ({"heads": 2.0}, "heads = 2.0 must be a whole number"),
        ({"patch": 3}, "cannot be divided into patches of patch = 3 pixels"),
        ({"patch": 2.0}, "patch = 2.0 must be a whole number"),
        ({"dropout": 1.0}, "dropout = 1.0 must be a number in 0 ... 1"),
        ({"dropout": "0.1"}, "dropout = '0.1' must be a number in 0 ... 1"),
    ],
)
def test_settings_that_do_not_fit(wrong: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        DiT(**({"image_channels": 1, "image_size": 8, "width": 16, "depth": 1, "heads": 2} | wrong))  # type: ignore[arg-type]


def test_a_label_past_the_last_class_fails() -> None:
    net = DiT(1, 8, width=16, depth=1, heads=2, classes=3)
    with pytest.raises(IndexError):
        net(random(1, 1, 8, 8), torch.zeros(1), torch.tensor([3]))
    with pytest.raises(ValueError, match="unconditional"):
        DiT(1, 8, width=16, depth=1, heads=2)(random(1, 1, 8, 8), torch.zeros(1), torch.tensor([0]))
