"""Checks the noise: Philox's published vectors, the quantile function, and dependence on nothing but (seed, image, draw)."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtri
from torch.overrides import TorchFunctionMode

from ddpm import Denoiser, NoiseSchedule, sample
from ddpm.diffusion.noise import _inverse_normal, _log, gaussian, philox


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


def test_philox_known_answers() -> None:
    """Compares with the vectors that come with Random123 (Salmon et al. 2011) for philox4x32 with 10 rounds."""
    full = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full, full), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        assert tuple(int(word) for word in philox(words(*counter), key)) == expected


def test_inverse_normal_is_the_quantile_function() -> None:
    u = torch.cat([torch.arange(0, 2**24, 997), torch.tensor([0, 1, 2**23 - 1, 2**23, 2**24 - 1])])
    z = _inverse_normal(u << 8).double().numpy()
    truth = ndtri((u.numpy() + 0.5) / 2**24)
    assert np.abs(z - truth).max() < 2e-6


def test_log_is_the_natural_logarithm() -> None:
    x = torch.logspace(-37.9, 38, 20001)
    truth = x.double().log()
    assert ((_log(x).double() - truth).abs() < 1.5e-7 * truth.abs().clamp(min=1)).all()


def test_distribution() -> None:
    """With another seed, the test would fail by chance in about 1 of 900 runs.

    The limits are a p-value of 1e-3, and 4 standard errors of the correlation.
    """
    z = gaussian(3, range(500), 1, (3, 16, 16))
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    flat = z.flatten(1)
    correlation = (flat[:, :-1] * flat[:, 1:]).mean()
    assert abs(float(correlation)) < 4 / np.sqrt(flat[:, 1:].numel())


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True),
    st.integers(0, 5000),
    st.sampled_from([(1, 8, 8), (3, 5, 7), (2,), (1,)]),
)
def test_an_image_alone_has_the_noise_it_has_in_a_batch(
    seed: int, images: list[int], draw: int, shape: tuple[int, ...]
) -> None:
    together = gaussian(seed, images, draw, shape)
    for row, image in zip(together, images, strict=True):
        assert torch.equal(gaussian(seed, [image], draw, shape)[0], row)


@pytest.mark.parametrize(
    "images", [range(3, 40, 6), range(2**40, 2**40 + 3), range(9, 2, -3), range(5, 5), range(5, 2)]
)
def test_a_range_is_what_its_numbers_are(images: range) -> None:
    assert torch.equal(gaussian(3, images, 2, (2, 3)), gaussian(3, list(images), 2, (2, 3)))


class Copies(TorchFunctionMode):
    """Counts copies from the CPU to the device. On a GPU, each copy waits for all work that was requested before."""

    count = 0

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        made = function(*arguments, **(options or {}))
        if function in (torch.as_tensor, torch.tensor, torch.Tensor.to) and made.device.type != "cpu":
            self.count += not isinstance(arguments[0], torch.Tensor) or arguments[0].device != made.device
        return made


def test_sampling_copies_nothing_to_the_device() -> None:
    """Uses tensors on the meta device, which have no values, in place of a GPU's tensors."""
    x = torch.zeros(4, 3, 8, 8, device="meta")
    denoiser = Denoiser(lambda x, t: x * t.view(-1, 1, 1, 1), NoiseSchedule.named("cosine", 20), "v", clip=True)
    with Copies() as copies:
        x_0 = sample(denoiser, x, steps=3, noise=lambda k: gaussian(0, range(4), k, (3, 8, 8), "meta"), sampler="ddpm")
    assert x_0.is_meta and copies.count == 0


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gaussian(0, range(101), 7, (3, 31, 33)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_seed_image_and_draw_all_matter() -> None:
    """With other seeds, the test would fail in about 1 of 1,600 runs: one of 192 pairs of values agrees to 1e-5 by chance."""
    base = gaussian(1, [5], 9, (1, 8, 8))
    for other in (gaussian(2, [5], 9, (1, 8, 8)), gaussian(1, [6], 9, (1, 8, 8)), gaussian(1, [5], 10, (1, 8, 8))):
        assert not torch.isclose(base, other).any()
    assert not torch.equal(gaussian(1 << 40, [5], 9, (4,)), gaussian(0, [5], 9, (4,)))


def test_the_counter_holds_place_draw_and_image_and_the_key_holds_the_seed() -> None:
    """Checks both halves of a 64-bit image number and of a 64-bit seed, bit for bit."""
    seed, image, draw = 0xFEDC_BA98_7654_3210, 0x0123_4567_89AB_CDEF, 7
    key = (seed & 0xFFFF_FFFF, seed >> 32)
    blocks = [philox(words(place, draw, image & 0xFFFF_FFFF, image >> 32), key) for place in range(2)]
    expected = torch.stack([_inverse_normal(torch.stack(block, dim=-1)) for block in blocks]).reshape(1, 8)
    assert torch.equal(gaussian(seed, [image], draw, (2, 3)), expected[:, :6].reshape(1, 2, 3))
