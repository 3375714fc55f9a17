"""Keyed noise: a function of (seed, sample, draw) alone, and normal."""

import numpy as np
import torch
from scipy import stats

from latent_critic.engine.noise import keyed_noise

SHAPE = (4, 16, 16)


def test_a_sample_has_the_same_noise_in_every_batch():
    whole = keyed_noise(3, torch.arange(6), 2, SHAPE)
    assert whole.shape == (6, *SHAPE) and whole.dtype == torch.float32 and whole.device.type == "cpu"
    assert torch.equal(whole, torch.cat([keyed_noise(3, torch.tensor([i]), 2, SHAPE) for i in range(6)]))
    assert torch.equal(whole[[5, 0, 0]], keyed_noise(3, torch.tensor([5, 0, 0]), 2, SHAPE))


def test_seed_sample_and_draw_each_change_every_number():
    """Two independent float32 normals coincide now and then: at most 2 of 1024 numbers, where all would otherwise."""
    base = keyed_noise(0, torch.tensor([7]), 1, SHAPE)
    for other in [(1, 7, 1), (0, 8, 1), (0, 7, 2), (7, 0, 1), (1, 7, 0), (0, 7 + 2**32, 1)]:
        noise = keyed_noise(other[0], torch.tensor([other[1]]), other[2], SHAPE)
        assert int((noise == base).sum()) <= 2, other


def test_largest_keys_are_taken():
    """config.seed goes up to 2^32 - 1, sample indices are int64."""
    noise = keyed_noise(2**32 - 1, torch.tensor([2**62]), 1000, (8,))
    assert bool(noise.isfinite().all()) and noise.std() > 0


def test_noise_is_standard_normal():
    noise = keyed_noise(0, torch.arange(64), 0, (4, 32, 32)).double().flatten()
    n = noise.numel()  # 262,144
    # Standard errors of the first four moments of a normal: 1, sqrt 2, sqrt 15 and sqrt 96 over sqrt n; 4 of each.
    for power, expected, spread in [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)]:
        assert abs((noise**power).mean().item() - expected) < 4 * spread / n**0.5, power
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3


def test_samples_and_draws_are_uncorrelated():
    rows = torch.cat([keyed_noise(0, torch.arange(8), draw, (8192,)) for draw in range(4)])
    correlation = torch.corrcoef(rows.double())
    off_diagonal = correlation[~torch.eye(len(rows), dtype=bool)]
    assert off_diagonal.abs().max() < 5 / 8192**0.5  # 992 correlations, each with standard error 1 / sqrt n


def test_draws_do_not_overlap():
    """A long draw never runs into the next one's numbers: its stream holds no run of eight of them."""
    stream = keyed_noise(0, torch.tensor([0]), 0, (100_000,))[0].numpy()
    windows = np.lib.stride_tricks.sliding_window_view(stream, 8)
    assert (windows == stream[5000:5008]).all(1).nonzero()[0].tolist() == [5000]  # the search finds what is there
    for draw in (1, 2, 3):
        run = keyed_noise(0, torch.tensor([0]), draw, (8,))[0].numpy()
        assert not (windows == run).all(1).any()
