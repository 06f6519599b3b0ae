"""A transformer on patches of the image, conditioned by adaptive layer normalisation: the DiT of Peebles & Xie 2023."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.networks.layers import attention, time_embedding, unrounded

EPS = 1e-6  # epsilon of every layer normalisation
FREQUENCIES = 256  # width of the sinusoidal embedding of time
WIDER = 4  # width of a perceptron's hidden layer, as a multiple of the tokens' width


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalises each token of x [B, positions, width]. Then scales by 1 + `scale` and shifts by `shift`, both [B, width]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def positions(height: int, width: int, channels: int) -> Tensor:
    """Returns the sinusoids of each patch's column and row, [height * width, channels]. Each takes half of the channels.

    The sinusoids are computed on the CPU even under torch's meta device, on which networks are built before their weights
    are loaded. Checkpoints do not contain the sinusoids, so nothing would fill them in later.
    """
    sides = torch.arange(height, device="cpu"), torch.arange(width, device="cpu")
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    halves = [time_embedding(place.flatten(), channels // 2, shift=0) for place in (columns, rows)]
    return torch.cat(halves, dim=1)


class Block(nn.Module):
    """A transformer block with adaLN-zero: attention, then a perceptron.

    The condition scales and shifts the input of both parts, and gates their outputs. The gates start at zero, so the block
    starts as the identity.

    Args:
        width: channels of a token.
        heads: number of attention heads.
        dropout: probability of dropout in the perceptron.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.wide = nn.Linear(width, WIDER * width)
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(WIDER * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=1)
        b, n, width = x.shape
        parts = self.qkv(_modulated(x, shift_1, scale_1)).view(b, n, 3, self.heads, width // self.heads).unbind(2)
        mixed = attention(*(part.transpose(1, 2) for part in parts)).transpose(1, 2).reshape(b, n, width)
        x = x + gate_1[:, None] * self.out(mixed)
        h = F.gelu(self.wide(_modulated(x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2[:, None] * self.narrow(self.dropout(h))


class DiT(nn.Module):
    """The transformer of Peebles & Xie 2023: net(x, t), or net(x, t, labels) with classes, predicts a tensor like x.

    x is float [B, image_channels, height, width], nominally in [-1, 1]. t is [B] in 0 ... T-1, fractions allowed. labels
    are int64 [B] in 0 ... classes - 1. A negative label, or no labels at all, means an unconditional prediction. Every
    block starts as the identity, and an untrained network predicts zero.

    Args:
        image_channels: channels of x.
        image_size: side of x in pixels, or [height, width].
        width: channels of a token, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: number of attention heads in each block.
        patch: side in pixels of the squares that are one token each. The cost of attention grows with 1 / patch^4, and
            the other cost with 1 / patch^2.
        dropout: probability of dropout in each block.
        out_channels: channels of the prediction, by default as many as x has. A learned variance takes twice as many.
        classes: number of classes; 0 for an unconditional network.

    Raises:
        ValueError: the arguments do not fit together.
    """

    def __init__(
        self,
        image_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 2,
        dropout: float = 0.0,
        out_channels: int | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        _check(width, depth, heads, patch, dropout, classes)
        rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size  # in pixels
        if not 1 <= patch <= min(rows, columns) or rows % patch or columns % patch:
            raise ValueError(
                f"image_size {image_size} cannot be divided into patches of patch = {patch} pixels: take a patch that"
                " divides both sides"
            )
        self.patch, self.classes = patch, classes
        self.first = nn.Linear(image_channels * patch**2, width)
        self.register_buffer("positions", positions(rows // patch, columns // patch, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, (out_channels or image_channels) * patch**2)
        # Initialised last, so that all other weights start the same with and without classes.
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self._initialise()

    def _initialise(self) -> None:
        """Draws the weights as in section 3.2 of the paper and in the authors' code: gates and the last layer are zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in self.time:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        modulations = [block.modulation for block in self.blocks if isinstance(block, Block)]
        for zero in (*modulations, self.modulation, self.last):
            nn.init.zeros_(zero.weight)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        height, width = (side // self.patch for side in x.shape[2:])
        tokens = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)
        h = self.first(tokens) + self.positions
        condition = F.silu(self.time(time_embedding(t, FREQUENCIES).to(x.dtype)) + self._label(t, labels))
        for block in self.blocks:
            h = block(h, condition)
        h = unrounded(self.last, _modulated(h, *self.modulation(condition).chunk(2, dim=1)))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (height, width)), self.patch)

    def _label(self, t: Tensor, labels: Tensor | None) -> Tensor | float:
        """Embeds the classes, [B, width].

        Negative labels select the last row of the table, which means "no class". A label past the last class is raised by
        one, so that it fails instead of selecting that row.
        """
        if self.label is None:
            if labels is not None:
                raise ValueError("labels for an unconditional network: it was made with classes = 0")
            return 0.0
        if labels is None:
            labels = torch.full(t.shape, -1, device=t.device)
        return self.label(torch.where(labels < 0, self.classes, labels + (labels >= self.classes)))


def _check(width: int, depth: int, heads: int, patch: int, dropout: float, classes: int) -> None:
    """Raises ValueError if an argument of DiT is out of range."""
    for name, number in (("width", width), ("depth", depth), ("heads", heads), ("patch", patch)):
        if type(number) is not int:
            raise ValueError(f"{name} = {number!r:.60} must be a whole number")
    if width < 4 or width % 4:
        raise ValueError(f"width = {width} must be a multiple of 4, for sines and cosines of rows and of columns")
    if not 1 <= depth <= 256:
        raise ValueError(f"depth = {depth} must lie in 1 ... 256")
    if not 1 <= heads <= width or width % heads:
        raise ValueError(f"heads = {heads} must divide width = {width}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout!r:.60} must be a number in 0 ... 1 (1 excluded)")
    if classes < 0:
        raise ValueError(f"classes = {classes} must be 0 or more")


NETWORK = DiT
