"""The augmentation of images, by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from anomem import reference
from anomem.errors import ArgumentError
from anomem.functional import ViewParameters, augment
from anomem.reference import Padding
from anomem.rules import Impl
from anomem.testing import assert_within_budget, draw
from tests.operators.contract import F32, F64, REFERENCE, Contract, Implementation, cases, each

NATIVE = Implementation("native", "native", (F32,))
ALL = (REFERENCE, NATIVE)
PADDINGS: tuple[Padding, ...] = get_args(Padding)


def numbers(*shape: int, seed: int) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def given(views: int, matrices: Tensor | None = None, factors: Tensor | None = None) -> ViewParameters:
    """All parameters of so many views; a third of the blurs is 0 and another third narrow."""
    if factors is None:
        factors = numbers(views, 5, seed=3)
    brightness, contrast, saturation, blur, noise = factors.unbind(1)
    if matrices is None:
        matrices = some_matrices(views)
    keys = (torch.arange(views) << 40) - 1 - torch.arange(views) * 7919
    return ViewParameters(
        matrices, 0.5 + brightness, 2 * contrast, 2 * saturation, (3 * blur - 1).clamp_min(0), noise / 5, keys
    )


def some_matrices(views: int) -> Tensor:
    """Turned, mirrored, shrunk, and moved beyond the image."""
    return torch.eye(2, 3) * (1 - 2 * (torch.arange(views) % 2)).view(-1, 1, 1) + draw(views, 2, 3, scale=0.4)


class TestAugment(Contract):
    implementations = ALL
    differentiable = False
    mapped = False
    cast = False
    branches = True

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [numbers(rows, 3, 5, 7, seed=1).to(dtype), some_matrices(rows), numbers(rows, 5, seed=3)]

    def call(self, impl: Impl, *inputs: Any) -> Tensor:
        """Every view is blurred: plain PyTorch blurs a part of a batch in another product when it may read sigma."""
        images, matrices, factors = inputs
        parameters = given(len(images), matrices, factors)._replace(blur=factors[:, 3] + 0.2)
        return augment(images, parameters, padding="reflection", radius=3, impl=impl)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        images = numbers(3, 3, 5, 7, seed=1)
        for channels_last in (False, True):
            for pixels in (images, images.mul(255).byte()):
                yield torch.ops.anomem.native_augment, (pixels, *given(6), 6, 3, 2, channels_last)
        yield torch.ops.anomem.native_augment, (images, *[None] * 7, 3, 0, 0, False)


# B, C, H, W, V: one pixel, lines shorter and longer than a vector, odd areas, groups of channels, several views.
SIZES = [(3, 1, 1, 1, 3), (2, 3, 1, 9, 4), (2, 2, 17, 5, 2), (3, 3, 33, 40, 6), (2, 4, 8, 70, 2), (1, 6, 20, 19, 2)]


@cases("sizes, padding", {one: product(SIZES, PADDINGS) for one in ALL})
def test_augment_within_budget(impl: Impl, sizes: tuple[int, ...], padding: Padding) -> None:
    b, c, h, w, views = sizes
    images, parameters = numbers(b, c, h, w, seed=1), given(views)
    actual, plain, exact = (
        augment(x, parameters, padding=padding, impl=name)
        for name, x in ((impl, images), ("reference", images), ("reference", images.double()))
    )
    assert_within_budget(actual, plain, exact)
    assert 0 <= float(actual.min()) <= float(actual.max()) <= 1


@cases("sizes, padding", {NATIVE: product(SIZES, PADDINGS)})
def test_upright_views_within_budget(impl: Impl, sizes: tuple[int, ...], padding: Padding) -> None:
    """Matrices that mix no axes have a kernel of their own; mirrored both ways, shrunk, enlarged and moved beyond."""
    b, c, h, w, views = sizes
    scale = torch.tensor([[-0.7, 0.6], [0.5, -1.7], [1.3, 0.9], [0.8, 1.0]]).repeat(2, 1)[:views]
    matrices = torch.cat([scale.diag_embed(), draw(views, 2, 1, scale=0.4)], dim=2)
    images, parameters = numbers(b, c, h, w, seed=1), given(views, matrices)
    for changed in (parameters, ViewParameters(matrices)):
        assert_within_budget(
            *(
                augment(x, changed, padding=padding, impl=name)
                for name, x in ((impl, images), ("reference", images), ("reference", images.double()))
            )
        )


PARTS = [name for name in ViewParameters._fields if name != "keys"]


@cases("name", {one: [(name,) for name in PARTS] for one in ALL})
def test_each_parameter_alone_within_budget(impl: Impl, name: str) -> None:
    images, parameters = numbers(4, 3, 19, 23, seed=1), given(4)
    kept = (name, "keys") if name == "noise" else (name,)
    alone = ViewParameters(**{part: getattr(parameters, part) for part in kept})
    results = [
        augment(x, alone, padding="border", impl=which)
        for which, x in ((impl, images), ("reference", images), ("reference", images.double()))
    ]
    assert_within_budget(*results)
    assert float((results[0] - images).abs().amax()) > 0.1


COLOURS = ("brightness", "contrast"), ("brightness", "saturation"), ("contrast", "saturation")


@cases("first, second, channels", {NATIVE: [(*pair, channels) for pair in COLOURS for channels in (1, 3, 5)]})
def test_pairs_of_colour_parameters_within_budget(impl: Impl, first: str, second: str, channels: int) -> None:
    images, parameters = numbers(4, channels, 19, 23, seed=1), given(4)
    pair = ViewParameters(**{name: getattr(parameters, name) for name in (first, second)})
    assert_within_budget(
        *(
            augment(x, pair, impl=which)
            for which, x in ((impl, images), ("reference", images), ("reference", images.double()))
        )
    )


@cases("scale", {NATIVE: [(3.0,), (50.0,)]})
def test_far_places_within_budget(impl: Impl, scale: float) -> None:
    """Shrunk to many reflections. A place is rounded in units of its distance, here up to scale · W pixels."""
    images, matrices = numbers(4, 3, 16, 16, seed=1), scale * draw(4, 2, 3)
    for padding in PADDINGS:
        assert_within_budget(
            *(
                augment(x, ViewParameters(matrices), padding=padding, impl=which)
                for which, x in ((impl, images), ("reference", images), ("reference", images.double()))
            ),
            ulps=16 * scale,
        )


@each(*ALL)
def test_neutral_parameters_change_no_bit(impl: Impl) -> None:
    images, ones, zeros = numbers(4, 3, 9, 9, seed=1), torch.ones(8), torch.zeros(8)
    twice = torch.cat([images, images])
    neutral = ViewParameters(None, ones, ones, ones, zeros, zeros, torch.arange(8))
    assert torch.equal(augment(images, neutral, impl=impl), twice)
    nothing = augment(images, ViewParameters(), impl=impl)
    assert torch.equal(nothing, images)
    assert nothing.data_ptr() != images.data_ptr()


# Lines of bytes are read by groups of four pixels, up to six at once; vectors have 4 to 16 numbers.
@cases("width", {one: [(width,) for width in (1, 2, 4, 5, 6, 7, 10, 16, 17, 35)] for one in ALL})
def test_bytes_are_read_as_floats_are(impl: Impl, width: int) -> None:
    pixels = numbers(4, 3, 9, width, seed=1).mul(256).byte()
    for parameters in (given(8), ViewParameters(), ViewParameters(brightness=numbers(8, seed=2))):
        expected = augment(pixels.float().mul(1 / 255), parameters, padding="reflection", impl=impl)
        assert torch.equal(augment(pixels, parameters, padding="reflection", impl=impl), expected)
        last = pixels.contiguous(memory_format=torch.channels_last)
        assert torch.equal(augment(last, parameters, padding="reflection", impl=impl), expected)
        assert torch.equal(
            augment(pixels[::2], ViewParameters(), impl=impl), augment(pixels, ViewParameters(), impl=impl)[::2]
        )


@cases("channels", {one: [(1,), (2,), (3,), (5,)] for one in ALL})
def test_memory_formats_have_the_same_values(impl: Impl, channels: int) -> None:
    images = numbers(3, channels, 7, 11, seed=1)
    for parameters in (given(6), ViewParameters()):
        expected = augment(images, parameters, impl=impl)
        last = augment(images, parameters, memory_format=torch.channels_last, impl=impl)
        assert expected.is_contiguous()
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, expected)


@each(*ALL)
def test_a_view_does_not_depend_on_the_batch(impl: Impl) -> None:
    """Noise and all: a row alone, and at another place, has the same bits; plain PyTorch's products nearly."""
    images, parameters = numbers(5, 3, 12, 9, seed=1), given(10)
    together = augment(images, parameters, impl=impl)
    for view in (0, 3, 7):
        alone = augment(images[view % 5, None], ViewParameters(*(p[view, None] for p in parameters)), impl=impl)
        torch.testing.assert_close(alone[0], together[view], **({} if impl == "reference" else {"rtol": 0, "atol": 0}))


@cases("scale", {NATIVE: [(torch.nan,), (torch.inf,), (1e30,)]})
def test_a_matrix_that_is_no_map_reads_inside_the_image(impl: Impl, scale: float) -> None:
    images = numbers(2, 3, 8, 8, seed=1)
    for padding in PADDINGS:
        views = augment(images, ViewParameters(torch.full((2, 2, 3), scale)), padding=padding, impl=impl)
        assert bool(views.isfinite().all())


@each(*ALL)
def test_no_views_of_some_images(impl: Impl) -> None:
    images = numbers(3, 2, 5, 6, seed=1)
    for parameters in (ViewParameters(brightness=torch.ones(0)), given(0)):
        assert augment(images, parameters, impl=impl).shape == (0, 2, 5, 6)


def test_what_is_kept_serves_every_mode() -> None:
    """The first call of a size may be in inference mode, or under another default device."""
    images, parameters = numbers(2, 3, 13, 15, seed=1), given(2)
    for mode in (torch.inference_mode(), torch.device("meta")):
        reference.augment.__globals__["_kept_centres"].cache_clear()
        reference.augment.__globals__["_kept_bands"].cache_clear()
        with mode:
            augment(images, parameters, impl="reference")
        matrices = some_matrices(2).requires_grad_()
        reference.augment(images, parameters._replace(matrices=matrices), radius=3).sum().backward()
        assert matrices.grad is not None


@each(*ALL)
def test_a_filter_wider_than_the_image(impl: Impl) -> None:
    images, blur = numbers(2, 3, 4, 6, seed=1), torch.tensor([5.0, 30.0])
    wide, cut = (augment(images, ViewParameters(blur=blur), radius=radius, impl=impl) for radius in (90, 3))
    assert torch.equal(wide, cut)
    torch.testing.assert_close(wide[1].mean(), images[1].mean(), atol=0.05, rtol=0)


def normals(impl: Impl, keys: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The normal numbers behind the noise, [V, C, H, W]: small enough to be clamped nowhere."""
    grey = torch.full((1, *shape), 0.5)
    return (augment(grey, ViewParameters(noise=torch.full((len(keys),), 0.08), keys=keys), impl=impl) - 0.5) / 0.08


@each(*ALL)
def test_noise_is_normal_and_independent(impl: Impl) -> None:
    """Moments, tails, and correlations between neighbours, channels, views, near keys and successive seeds: each within
    five standard errors."""
    random = torch.randint(2**63 - 1, (24,), generator=torch.Generator().manual_seed(99))
    steps = torch.stack([torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(s)) for s in range(8)])
    near = torch.arange(8) + 7
    high = (torch.arange(1, 9) << 32) + 7
    keys = torch.cat([random, steps.flatten(), near, high])
    z = normals(impl, keys, (3, 32, 32)).double()
    n = z.numel()
    five = 5 / n**0.5
    assert abs(float(z.mean())) < five
    assert abs(float(z.square().mean()) - 1) < five * 2**0.5
    assert abs(float(z.pow(3).mean())) < five * 15**0.5
    assert abs(float(z.pow(4).mean()) - 3) < five * 96**0.5
    for bound, share in ((1.0, 0.3173105), (2.0, 0.0455003), (3.0, 0.0026998), (4.0, 6.334e-5)):
        assert abs(float((z.abs() > bound).double().mean()) - share) < five * share**0.5
    pairs = {
        "columns": (z[..., 1:], z[..., :-1]),
        "rows": (z[..., 1:, :], z[..., :-1, :]),
        "channels": (z[:, 1:], z[:, :-1]),
        "views": (z[1:], z[:-1]),
        "halves of a pair": (z.flatten(1)[:, :1536], z.flatten(1)[:, 1536:]),
        "magnitudes of a pair": tuple(half.square() - 1 for half in z.flatten(1).split(1536, dim=1)),
        "magnitudes of neighbours": (z[..., 1:].square() - 1, z[..., :-1].square() - 1),
    }
    for name, (one, other) in pairs.items():
        spread = float(one.std() * other.std())
        assert abs(float((one * other).mean())) < 5 * spread / one.numel() ** 0.5, name
    every = torch.corrcoef(z.flatten(1)) - torch.eye(len(keys), dtype=F64)
    assert float(every.abs().max()) < 5.5 / 3072**0.5


def test_dependent_noise_is_told_apart() -> None:
    """The test of independence rejects numbers that two views share, and those of a wrong spread."""
    keys = torch.arange(8)
    z = normals("reference", torch.cat([keys, keys]), (3, 16, 16)).flatten(1)
    assert float(torch.corrcoef(z)[0, 8]) > 0.99
    assert abs(float((1.05 * z).square().mean()) - 1) > 5 * (2 / z.numel()) ** 0.5


@cases("count", {NATIVE: [(1,), (2,), (5,), (35,), (1000,)]})
def test_numbers_are_those_of_the_reference(impl: Impl, count: int) -> None:
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567])
    exact = reference.normal_numbers(keys, count, F64)
    assert exact.shape == (6, count)
    torch.testing.assert_close(normals(impl, keys, (1, 1, count)).view(6, -1).double(), exact, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"images": numbers(3, 8, 8, seed=1)}, "images"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int32)}, "images"),
        ({"images": torch.zeros(2, 0, 8, 8)}, "images"),
        ({"images": torch.zeros(2, 3, 0, 8)}, "images"),
        ({"images": torch.zeros(1, 1, 1, 20000)}, "images"),
        ({"parameters": ViewParameters(torch.zeros(2, 3, 2))}, "matrices"),
        ({"parameters": ViewParameters(brightness=torch.ones(3))}, "brightness"),
        ({"parameters": ViewParameters(brightness=torch.ones(2), contrast=torch.ones(4))}, "contrast"),
        ({"parameters": ViewParameters(blur=torch.ones(2, dtype=torch.int64))}, "blur"),
        ({"parameters": ViewParameters(blur=2.0)}, "blur"),
        ({"parameters": ViewParameters(saturation=torch.tensor(1.0))}, "saturation"),
        ({"parameters": ViewParameters(noise=torch.ones(2))}, "keys"),
        ({"parameters": ViewParameters(noise=torch.ones(2), keys=torch.ones(2))}, "keys"),
        ({"parameters": torch.ones(2)}, "parameters"),
        ({"padding": "mirror"}, "padding"),
        ({"radius": -1}, "radius"),
        ({"memory_format": torch.channels_last_3d}, "memory_format"),
        ({"impl": "triton"}, "impl"),
        ({"impl": "native", "images": torch.zeros(2, 3, 8, 8, dtype=F64)}, "impl"),
    ],
)
def test_mistakes(changed: dict[str, Any], argument: str) -> None:
    usual = {"images": torch.zeros(2, 3, 8, 8), "parameters": ViewParameters()}
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        augment(**{**usual, **changed})
