"""The network of Ho et al. 2020, appendix B: a U-Net of residual blocks with group normalisation and self-attention.

With 128 channels, multipliers (1, 2, 2, 2), 2 blocks and attention at 16x16, for 32x32 RGB, it has the paper's 35.7M
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.networks.layers import AddingConvolution, NormSwish, attention, time_embedding, unrounded

MOST_BLOCKS = 64  # most blocks per resolution: more than any known network has, and few enough to build


def groups(channels: int) -> int:
    """Returns the groups per normalisation for a base width of `channels`: 32 at 128 as in the paper, fewer at lower widths."""
    return math.gcd(32, channels // 4)


def _zero(layer: nn.Module) -> nn.Module:
    """Sets a layer's parameters to zero. As the last layer of a block, it makes the block start as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """Residual block: norm, swish, convolution, add time embedding, norm, swish, dropout, convolution, add input.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        embedding: width of the time embedding.
        groups: number of groups of both normalisations.
        dropout: probability of dropout.
        eps: epsilon of both normalisations.
        scale_shift: whether the time embedding scales and shifts the second norm's output, as in Dhariwal & Nichol
            2021, instead of being added before it.
        resize: a layer that halves or doubles the sides, after the first swish and on the skip connection.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        groups: int,
        dropout: float,
        eps: float = 1e-6,
        scale_shift: bool = False,
        resize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = NormSwish(groups, channels_in, eps=eps)
        self.resize = resize or nn.Identity()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * channels_out if scale_shift else channels_out)
        self.norm2 = (nn.GroupNorm if scale_shift else NormSwish)(groups, channels_out, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(AddingConvolution(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.resize(self.norm1(x)))
        time = self.time(embedding)
        if self.scale_shift:
            scale, shift = time[:, :, None, None].chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = self.norm2(h, time)
        return self.conv2(self.dropout(h), self.skip(self.resize(x)))


class Attention(nn.Module):
    """Self-attention over the positions of an image, added to the input.

    Args:
        channels: channels of the input.
        groups: number of groups of the normalisation; 0 for no normalisation.
        heads: number of attention heads.
        eps: epsilon of the normalisation.
    """

    def __init__(self, channels: int, groups: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps=eps) if groups else nn.Identity()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        parts = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads).unbind(2)
        mixed = attention(*(part.transpose(1, 2) for part in parts)).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(mixed).view(b, h, w, c).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A residual block, followed by attention at the resolutions that have it."""

    def __init__(self, block: ResidualBlock, attention: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(x, embedding))


class Downsample(nn.Module):
    """Halves the sides by a strided convolution.

    Args:
        channels: channels of the input.
        symmetric: whether to pad on all sides, or only right and bottom as TensorFlow's SAME does.
    """

    def __init__(self, channels: int, symmetric: bool = False) -> None:
        super().__init__()
        self.padding = (1, 1, 1, 1) if symmetric else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Doubles the sides by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _widths(channels: int, multipliers: Sequence[float]) -> list[int]:
    """Returns the width of each resolution. Raises ValueError unless all are whole numbers."""
    widths = [round(channels * multiplier) for multiplier in multipliers]
    if any(abs(channels * multiplier - width) > 1e-6 for multiplier, width in zip(multipliers, widths, strict=True)):
        raise ValueError(f"{channels} channels times {', '.join(map(str, multipliers))} are not whole numbers")
    return widths


def _check_width(channels: int, multiple: int) -> None:
    if channels < 8 or channels % multiple:
        raise ValueError(f"channels = {channels} must be a multiple of {multiple}, and 8 or more")


def _check_counts(blocks: int, heads: int, classes: int) -> None:
    if not 1 <= blocks <= MOST_BLOCKS or heads < 1:
        raise ValueError(f"blocks = {blocks} must lie in 1 ... {MOST_BLOCKS}, and heads = {heads} must be 1 or more")
    if classes < 0:
        raise ValueError(f"classes = {classes} must be 0 (unconditional) or more")


def _heights(image_size: int | Sequence[int], patch: int, levels: int, named: Mapping[str, Sequence[int]]) -> list[int]:
    """Returns the height of each resolution, counted in patches.

    Args:
        image_size: side of the image in pixels, or [height, width].
        patch: side of a patch in pixels.
        levels: number of resolutions.
        named: arguments of UNet, each with the heights that it names.

    Raises:
        ValueError: there are no levels, the image cannot be divided into patches or halved so often, or there is no resolution
            of a named height.
    """
    if levels < 1:
        raise ValueError("multipliers must have one value or more")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"image_size {image_size} cannot be divided into patches of patch = {patch} pixels: take a patch that divides"
            " both sides"
        )
    height, width = height // patch, width // patch
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        of = f" in patches of {patch}x{patch} pixels, {height}x{width}," if patch > 1 else ""
        multiple = f"take sides that are multiples of {patch * 2 ** (levels - 1)}, or fewer multipliers"
        raise ValueError(f"image_size {image_size}{of} cannot be halved {levels - 1} times: {multiple}")
    heights = [height // 2**level for level in range(levels)]
    for argument, sides in named.items():
        if missing := [side for side in sides if side not in heights]:
            sizes = [f"{side}x{width // 2**level}" for level, side in enumerate(heights)]
            unit = f", in patches of {patch}x{patch} pixels" if patch > 1 else ""
            raise ValueError(
                f"{argument} at height {missing[0]} never occurs: the resolutions (height x width{unit}) are {', '.join(sizes)}"
            )
    return heights


def _heads(channels: int, heads: int, head_channels: int | None) -> int:
    """Returns the number of attention heads: `heads`, or channels / head_channels if that is given. Raises ValueError."""
    if head_channels is None:
        return heads
    if channels % head_channels:
        raise ValueError(f"head_channels = {head_channels} must divide the channels wherever there is attention")
    return channels // head_channels


MakeStage = Callable[[int, int, bool], Stage]
MakeResize = Callable[[int, bool], nn.Module]
# For each resolution: its width, whether it has attention, and whether a residual block resizes to the next resolution.
Levels = Sequence[tuple[int, bool, bool]]


def _down(
    stage: MakeStage, halve: MakeResize, channels: int, levels: Levels, blocks: int
) -> tuple[nn.ModuleList, list[int]]:
    """Builds the layers of the way down.

    Args:
        stage: makes a stage from its widths in and out, and whether it has attention.
        halve: makes the layer that halves the sides, from its width and whether it is a residual block.
        channels: width of the input.
        levels: the resolutions, from high to low.
        blocks: stages per resolution.

    Returns:
        The layers, and the widths of the skip connections.
    """
    down, skips, width = nn.ModuleList(), [channels], channels
    for level, (to, attend, residual) in enumerate(levels):
        for _ in range(blocks):
            down.append(stage(width, to, attend))
            width = to
            skips.append(width)
        if level < len(levels) - 1:
            down.append(halve(width, residual))
            skips.append(width)
    return down, skips


def _up(stage: MakeStage, double: MakeResize, skips: list[int], levels: Levels, blocks: int) -> nn.ModuleList:
    """Builds the layers of the way up, with `blocks` + 1 stages per resolution.

    skips: the widths that `_down` returned; this function empties the list. For the other arguments, see `_down`.
    """
    up, width = nn.ModuleList(), levels[-1][0]
    for level, (to, attend, residual) in reversed(list(enumerate(levels))):
        for _ in range(blocks + 1):
            up.append(stage(width + skips.pop(), to, attend))
            width = to
        if level > 0:
            up.append(double(width, residual))
    return up


class UNet(nn.Module):
    """The U-Net of Ho et al. 2020, appendix B: net(x, t), or net(x, t, labels) with classes, predicts a tensor like x.

    x is float [B, image_channels, height, width], nominally in [-1, 1]. t is [B] in 0 ... T-1, fractions
    allowed. labels are int64 [B] in 0 ... classes - 1. A negative label, or no labels at all, means an unconditional
    prediction. The embedding of a label is added to the embedding of the time, as in Dhariwal & Nichol 2021.

    The arguments norm_groups to null_class are for checkpoints of other projects.

    Args:
        image_channels: channels of x.
        image_size: side of x in pixels, or [height, width].
        channels: base width, at least 8: a multiple of 8, or of 2 if norm_groups is given.
        multipliers: width of each resolution as a multiple of `channels`, from the highest resolution to the lowest. A
            fraction must give a whole width.
        blocks: residual blocks per resolution on the way down; the way up has one more.
        attention: the resolutions that have self-attention, each named by its height in pixels (in patches if
            patch > 1).
        heads: number of heads of each attention layer.
        dropout: probability of dropout in each residual block.
        out_channels: channels of the prediction, by default as many as x has. A learned variance takes twice as many.
        classes: number of classes; 0 for an unconditional network.
        norm_groups: number of groups of every normalisation, instead of groups(channels).
        head_channels: width of a head, instead of `heads`.
        symmetric_padding: whether the convolutions that halve the sides pad on all sides (see `Downsample`).
        norm_eps: epsilon of every normalisation.
        freq_shift: `shift` of `time_embedding`.
        scale_shift: see `ResidualBlock`.
        attention_up: like `attention`, for the way up. By default the same resolutions.
        middle_attention: whether there is attention between the way down and the way up.
        middle_groups: number of groups in the normalisation of this attention, instead of norm_groups; 0 for no
            normalisation.
        residual_down: the resolutions, named by their heights, that a residual block halves instead of a convolution.
        residual_up: the resolutions that a residual block doubles instead of a convolution.
        null_class: whether a conditional network can predict without a label.
        patch: side in pixels of the squares that become one position each, with image_channels * patch^2 channels
            (space-to-depth, Shi et al. 2016). The layers then cost 1 / patch^2 as much.

    Raises:
        ValueError: the arguments do not fit together.
    """

    def __init__(
        self,
        image_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        channels: int = 128,
        multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        heads: int = 1,
        dropout: float = 0.0,
        out_channels: int | None = None,
        classes: int = 0,
        norm_groups: int | None = None,
        head_channels: int | None = None,
        symmetric_padding: bool = False,
        norm_eps: float = 1e-6,
        freq_shift: float = 1,
        scale_shift: bool = False,
        attention_up: Sequence[int] | None = None,
        middle_attention: bool = True,
        middle_groups: int | None = None,
        residual_down: Sequence[int] = (),
        residual_up: Sequence[int] = (),
        null_class: bool = True,
        patch: int = 1,
    ) -> None:
        super().__init__()
        _check_width(channels, 8 if norm_groups is None else 2)
        _check_counts(blocks, heads, classes)
        attention_up = attention if attention_up is None else attention_up
        heights = _heights(
            image_size,
            patch,
            len(multipliers),
            {
                "attention": attention,
                "attention_up": attention_up,
                "residual_down": residual_down,
                "residual_up": residual_up,
            },
        )
        widths = _widths(channels, multipliers)
        if any(width % heads for width in widths):
            raise ValueError(f"heads = {heads} must divide the channels of every resolution")
        norm_groups = norm_groups or groups(channels)
        embedding = 4 * channels
        self.channels, self.freq_shift, self.classes, self.null_class = channels, freq_shift, classes, null_class
        self.patch = patch
        self.time = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())

        def block(channels_in: int, channels_out: int, resize: nn.Module | None = None) -> ResidualBlock:
            return ResidualBlock(
                channels_in, channels_out, embedding, norm_groups, dropout, norm_eps, scale_shift, resize
            )

        def stage(channels_in: int, channels_out: int, attend: bool, groups: int = norm_groups) -> Stage:
            residual = block(channels_in, channels_out)
            if not attend:
                return Stage(residual, nn.Identity())
            count = _heads(channels_out, heads, head_channels)
            return Stage(residual, Attention(channels_out, groups, count, norm_eps))

        def halve(width: int, residual: bool) -> nn.Module:
            return block(width, width, nn.AvgPool2d(2)) if residual else Downsample(width, symmetric_padding)

        def double(width: int, residual: bool) -> nn.Module:
            return block(width, width, nn.Upsample(scale_factor=2.0)) if residual else Upsample(width)

        way_down, way_up = (
            [(width, height in attends, height in residual) for width, height in zip(widths, heights, strict=True)]
            for attends, residual in ((attention, residual_down), (attention_up, residual_up))
        )
        self.first = nn.Conv2d(image_channels * patch**2, channels, 3, padding=1)
        self.down, skips = _down(stage, halve, channels, way_down, blocks)
        width = widths[-1]
        middle = stage(width, width, middle_attention, norm_groups if middle_groups is None else middle_groups)
        self.middle = nn.ModuleList([middle, stage(width, width, False)])
        self.up = _up(stage, double, skips, way_up, blocks)
        self.last_norm = NormSwish(norm_groups, widths[0], eps=norm_eps)
        self.last = _zero(nn.Conv2d(widths[0], (out_channels or image_channels) * patch**2, 3, padding=1))
        # Initialised last, so that all other weights start the same with and without classes. The rows start at random,
        # because rows that start at zero become different only slowly: on the digits after 300 steps, a classifier then
        # recognises 14% of the classes instead of 84%.
        self.label = nn.Embedding(classes + null_class, embedding) if classes else None

    def _embedding(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Embeds time and class: [B, 4 channels]."""
        time = time_embedding(t, self.channels, self.freq_shift).to(self.first.weight.dtype)
        if self.label is None:
            if labels is not None:
                raise ValueError("labels for an unconditional network: it was made with classes = 0")
            return self.time(time)
        if labels is None:
            if not self.null_class:
                raise ValueError("this network predicts only with labels: it has no null class")
            labels = torch.full(t.shape, -1, device=t.device)
        # Negative labels select row `classes`, which means "no class". A label past the last class is raised by one, so that it
        # fails instead of selecting that row. Without a null class the row does not exist, and a negative label fails too.
        too_large = labels >= self.classes
        label = self.label(torch.where(labels < 0, self.classes, labels + too_large))
        return self.time[-1](self.time[:-1](time) + label)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self._embedding(t, labels)
        h = self.first(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1) if isinstance(layer, Stage) else h, embedding)
        h = unrounded(self.last, self.last_norm(h))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h


NETWORK = UNet
