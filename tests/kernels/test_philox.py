import pytest
import torch

from latent_critic.kernels.philox import NoiseKey, keyed_normal, philox_reference
from latent_critic.kernels.transition import launch_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _key(seed=7, samples=(0, 5, 2**40 + 3)):
    return NoiseKey(torch.tensor(seed, device=DEVICE), torch.tensor(samples, device=DEVICE))


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # the known answers that the authors of Philox publish with their library, Random123
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (-1, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(key, counter, words):
    assert [int(w) for w in philox_reference(torch.tensor(key), *map(torch.tensor, counter))] == words


@pytest.mark.parametrize("n", [1, 3, 1025, 2049])
def test_kernel_draws_the_reference(n, poisoned_outputs):
    key, z = _key(seed=-(2**45) - 17), torch.zeros(3, n, device=DEVICE)
    table = torch.tensor([[0.0, 0.0, 1.0]] * 3, device=DEVICE)
    drawn, _ = launch_step(z, z, None, table, torch.tensor(2, device=DEVICE), 0, *key)
    # The same words in float32; numpy's and PyTorch's log, sqrt and cos differ by an ulp each of numbers below 6.
    torch.testing.assert_close(drawn, keyed_normal(key, 2, n), atol=4 * 6 * torch.finfo(torch.float32).eps, rtol=0)


def test_noise_depends_on_nothing_but_its_key():
    noise = keyed_normal(_key(), 3, 100)
    assert torch.equal(keyed_normal(_key(samples=(5,)), 3, 100)[0], noise[1])
    assert torch.equal(keyed_normal(_key(), torch.tensor(3, device=DEVICE), 77), noise[:, :77])
    for seed, step in ((8, 3), (7, 4), (7, 3 + 2**8)):
        assert not (keyed_normal(_key(seed), step, 100) == noise).any()
    assert len(torch.cat([noise.flatten(), keyed_normal(_key(samples=(2**32 + 5,)), 3, 100)[0]]).unique()) == 400


def test_noise_is_standard_normal():
    samples = torch.arange(50)
    noise = keyed_normal(NoiseKey(torch.tensor(1), samples), 0, 20_000).double()
    count = noise.numel()
    # Four standard errors of each moment of 10^6 independent standard normal numbers.
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / count) ** 0.5
    for shifted in (noise.roll(1, 1), noise.roll(2, 1), noise.roll(1, 0)):
        assert abs((noise * shifted).mean()) < 4 / count**0.5
    ordered = noise.flatten().sort().values
    expected = 0.5 * (1 + torch.special.erf(ordered / 2**0.5))
    # Kolmogorov-Smirnov: beyond 1.95 / sqrt(n) with probability 0.001.
    assert (expected - torch.arange(count) / count).abs().max() < 1.95 / count**0.5
