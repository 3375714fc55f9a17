"""Monitors: each by hand, the same on any number of processes and at any size, and falling where rewards are hacked."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from latent_critic.engine import monitors
from latent_critic.engine.embedded import scenes


def grey(*levels, side=16):
    """A flat picture of each level."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, side, side, 3)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([scenes.draw(scenes.random_scene(rng), rng) for _ in range(32)]))


def of(images):
    return monitors.monitor(monitors.measure(images))


# -------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(("step", "expected"), [(0, 0), (16, 0), (17, 2 / 14), (255, 2 / 14)])
def test_edges_are_where_the_gradient_exceeds_its_threshold(step, expected):
    """A step of h levels has a Sobel gradient of h / 2 a pixel, in the columns at its two sides, 14 of which count."""
    images = grey(0).clone()
    images[:, :, 8:] = step
    assert monitors.edge_density(images).item() == pytest.approx(expected)
    assert monitors.edge_density(images.transpose(1, 2)).item() == pytest.approx(expected)


def test_entropy_counts_the_bits_of_a_colour():
    """One colour 0, two halves 1 bit, a half and two quarters 1.5; 512 colours, once each, all 9."""
    images = grey(31, 0, 0).clone()
    images[1, :8], images[2, :8], images[2, 8:12] = 32, 64, 128
    assert monitors.color_entropy(images).tolist() == pytest.approx([0, 1, 1.5])
    each = torch.cartesian_prod(*[torch.arange(0, 256, 32)] * 3).to(torch.uint8).view(1, 16, 32, 3)
    assert monitors.color_entropy(each).item() == pytest.approx(9)
    assert monitors.color_entropy(each // 32).item() == 0  # nearly black, all of it


def test_sharpness_is_the_variance_of_the_laplacian():
    """A chessboard of 0 and 255 has +-4 x 255 everywhere; a ramp of 5 levels a pixel has 0, as has a flat picture."""
    x = torch.arange(16)
    board = ((x[:, None] + x) % 2 * 255).to(torch.uint8)[None, ..., None].expand(1, 16, 16, 3)
    ramp = (5 * x).to(torch.uint8)[None, None, :, None].expand(1, 16, 16, 3)
    found = monitors.sharpness(torch.cat([board, ramp, grey(9)]))
    # Lumas up to 255 are rounded at 2^-17, and a Laplacian sums 8 of them.
    assert found.tolist() == pytest.approx([1020.0**2, 0, 0], rel=1e-5, abs=(8 * 2**-16) ** 2)


def test_diversity_is_the_difference_of_two_pictures(drawn):
    """By its definition, over all pairs; 0 of equal ones; of two flat pictures the levels between them."""
    found = monitors.thumbnails(drawn)
    assert monitors.diversity(found) == pytest.approx(
        torch.pdist(found.double()).square().mean().div(192).sqrt().item()
    )
    assert monitors.diversity(found[:1].expand(9, -1)) == 0
    assert monitors.diversity(monitors.thumbnails(grey(85, 170))) == pytest.approx(85)
    # Of three pairs two differ, by 30: sqrt(2 / 3) 30.
    assert monitors.diversity(monitors.thumbnails(grey(10, 10, 40))) == pytest.approx((2 / 3) ** 0.5 * 30)


def test_diversity_sees_what_colour_is_where():
    """A red quarter at the top left or at the bottom right: 2 of 4 quarters differ, by 200 levels in 2 of 3 channels;
    with the same quarter in blue, 1 of 4 quarters in 2 of 3 channels."""
    red = grey(200, 200, 200).clone()
    red[0, :8, :8, 1:] = red[1, 8:, 8:, 1:] = red[2, :8, :8, :2] = 0
    found = monitors.thumbnails(red)
    assert monitors.diversity(found[[0, 1]]) == pytest.approx((2 / 4 * 2 / 3) ** 0.5 * 200)
    assert monitors.diversity(found[[0, 2]]) == pytest.approx((1 / 4 * 2 / 3) ** 0.5 * 200)


# -------------------------------------------------------------------------------------------------------- what they see


def flattened(images):
    """What compressibility asks for: a third of the contrast, and a blur over 5 pixels."""
    blurred = functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 5, 1, 2)
    return (160 + (blurred - 160) / 3).permute(0, 2, 3, 1).to(torch.uint8)


def colorless(images):
    return images.float().mean(3, keepdim=True).to(torch.uint8).expand_as(images)


def noisy(images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 25 * noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("hack", "falls", "rises"),
    [
        (flattened, {"diversity", "edge_density", "color_entropy", "sharpness"}, set()),
        (noisy, set(), {"edge_density", "color_entropy", "sharpness"}),
        (lambda images: images[:1].expand_as(images), {"diversity"}, set()),  # one picture for every prompt
        (colorless, {"diversity", "color_entropy"}, set()),
    ],
    ids=["flattened", "noise", "one picture", "no colours"],
)
def test_hacks_move_them_by_a_fifth_or_more(drawn, hack, falls, rises):
    before, after = of(drawn), of(hack(drawn))
    assert all(after[name] < 0.8 * before[name] for name in falls)
    assert all(after[name] > 1.25 * before[name] for name in rises)


def test_processes_together_measure_what_one_measures(drawn):
    parts = [monitors.measure(part) for part in drawn.split([5, 20, 7])]
    # Batches of another size may sum in another order.
    assert monitors.monitor(torch.cat(parts)) == pytest.approx(of(drawn), rel=1e-5)


def test_large_pictures_are_measured_as_small_ones(drawn):
    """256 pixels a side, averaged down to 128, are nearly what 128 pixels are; sharpness is that of all pixels."""
    once = drawn[:16].repeat_interleave(2, 1).repeat_interleave(2, 2)
    twice = once.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found, expected = of(twice), of(once)
    for name in ("diversity", "edge_density", "color_entropy"):
        assert found[name] == pytest.approx(expected[name], rel=0.15), name  # the filter blurs a little
    assert found["sharpness"] < 0.7 * expected["sharpness"]


@pytest.mark.parametrize("shape", [(8, 8), (300, 40), (40, 2000)])
def test_any_shape_of_picture(shape):
    """Two colours, half a picture each, and one edge."""
    images = grey(0, 0, side=1).expand(-1, *shape, -1).clone()
    images[:, shape[0] // 2 :] = 200
    images[1] = 200 - images[1]
    found = of(images)
    assert found["color_entropy"] == pytest.approx(1, abs=0.8) and found["edge_density"] > 0
    assert found["diversity"] == pytest.approx(200, rel=0.3)  # the edge may lie within a cell


def test_every_monitor_is_explained_in_the_report():
    from latent_critic.engine.html_report import content

    assert list(content.MONITORS) == list(of(grey(1, 2)))
