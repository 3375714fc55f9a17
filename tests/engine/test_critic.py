"""The critic heads: start, invariances, timestep modulation, gradients, and that they can learn."""

import pytest
import torch
from torch.nn import functional as F

from latent_critic.engine.critic import Critic

BATCH, TOKENS, WIDTH = 6, 10, 24


def make(num_taps=2, num_rewards=3, dim=16, num_heads=2, timestep_adaln=True):
    torch.manual_seed(0)
    return Critic(WIDTH, num_taps, num_rewards, dim, num_heads, timestep_adaln)


def awaken(critic):
    """As after some training: nothing that starts at zero is zero any more."""
    for parameter in [p for p in critic.parameters() if not p.any()]:
        torch.nn.init.normal_(parameter, std=0.5)
    return critic


def inputs(num_taps=2, batch=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(batch, TOKENS, WIDTH, generator=generator) for _ in range(num_taps)]
    return features, torch.rand(batch, generator=generator) * 1000


def test_values_start_at_exactly_zero():
    features, timesteps = inputs()
    values = make()(*features, timesteps=timesteps)
    assert values.dtype == torch.float32 and torch.equal(values, torch.zeros(BATCH, 3))


def test_values_are_the_formula():
    """Plain single-head attention and layers, one sample at a time."""
    critic = awaken(make(num_taps=2, num_rewards=2, num_heads=1))
    features, timesteps = inputs()
    expected = torch.zeros(BATCH, 2)
    for i in range(BATCH):
        half = 64
        angle = timesteps[i] * torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(half) / half)
        sinusoid = torch.cat([angle.cos(), angle.sin()])
        embedding = critic.time_embedding
        time = F.silu(embedding.linear_2(F.silu(embedding.linear_1(sinusoid))))
        pooled, taps = [], critic.taps
        for n, tokens in enumerate(features):

            def linear(layer, x, n=n):
                return layer.weight[n] @ x + layer.bias[n, 0]

            scale, shift = linear(taps.modulation, time).chunk(2)
            x = F.layer_norm(tokens[i], (WIDTH,), eps=1e-6) * (1 + scale) + shift
            scores = (x @ taps.key_weight[n].T) @ taps.query[n, 0] / 16**0.5
            read = scores.softmax(0) @ (x @ taps.value_weight[n].T)
            hidden = linear(taps.expand, F.layer_norm(read, (16,)))
            pooled.append(read + linear(taps.contract, F.gelu(hidden, approximate="tanh")))
        pooled = F.layer_norm(torch.cat(pooled), (32,))
        expected[i] = torch.cat([head(pooled) for head in critic.heads])
    # Sums of at most 128 products of order 1 in another order, five layers deep.
    torch.testing.assert_close(critic(*features, timesteps=timesteps), expected, rtol=2e-5, atol=2e-5)
    assert expected.std() > 0.1


def test_samples_do_not_mix_and_the_order_of_tokens_does_not_count():
    critic = awaken(make())
    features, timesteps = inputs()
    values = critic(*features, timesteps=timesteps)
    changed = [tokens.clone() for tokens in features]
    changed[0][3:] = torch.randn(BATCH - 3, TOKENS, WIDTH)
    found = critic(*changed, timesteps=timesteps)
    assert torch.equal(found[:3], values[:3]) and bool((found[3:] != values[3:]).all())
    shuffled = [tokens[:, torch.randperm(TOKENS)] for tokens in features]
    # The same ten terms of order 1 in another order.
    torch.testing.assert_close(critic(*shuffled, timesteps=timesteps), values, rtol=1e-5, atol=1e-5)


def test_each_tap_has_its_own_place():
    critic = awaken(make())
    features, timesteps = inputs()
    values, swapped = critic(*features, timesteps=timesteps), critic(*features[::-1], timesteps=timesteps)
    assert not torch.allclose(swapped, values, atol=0.05)


@pytest.mark.parametrize("timestep_adaln", [True, False])
def test_timestep_counts_only_with_adaln(timestep_adaln):
    critic = awaken(make(timestep_adaln=timestep_adaln))
    features, timesteps = inputs()
    early, late = critic(*features, timesteps=timesteps), critic(*features, timesteps=timesteps.flip(0))
    assert early.std() > 0.1
    if timestep_adaln:
        assert bool(((early - late).abs().amax(1) > 0.01).all())
    else:
        assert torch.equal(early, late)


@pytest.mark.parametrize("timestep_adaln", [True, False])
def test_gradient_reaches_every_parameter(timestep_adaln):
    """The zero-initialised output opens in the first step, the zero-initialised modulation in the second."""
    critic = make(timestep_adaln=timestep_adaln)
    features, timesteps = inputs()
    target = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    reached = []
    for _ in range(3):
        optimizer.zero_grad()
        (critic(*features, timesteps=timesteps) - target).square().mean().backward()
        reached.append({name for name, p in critic.named_parameters() if bool(p.grad.any())})
        optimizer.step()
    every = {name for name, _ in critic.named_parameters()}
    assert reached[0] == {f"heads.{m}.2.{part}" for m in range(3) for part in ("weight", "bias")}
    assert every - reached[1] == {name for name in every if name.startswith("time_embedding")}
    assert reached[2] == every


def test_heads_are_separate():
    """One head per reward (arXiv 2605.27736): the loss of one moves no other's weights."""
    critic = awaken(make())
    features, timesteps = inputs()
    critic(*features, timesteps=timesteps)[:, 1].square().sum().backward()
    moved = [any(bool(p.grad.any()) for p in head.parameters()) for head in critic.heads]
    assert moved == [False, True, False]


def test_overfits_a_small_regression():
    """Targets that need features and timestep together: the loss falls to a tenth, and far below in the end."""
    critic = make(num_taps=1, num_rewards=2, dim=32)
    features, timesteps = inputs(num_taps=1, batch=24)
    sign = torch.where(timesteps > 500, 1.0, -1.0)
    level = features[0].mean(1)[:, :2] * TOKENS**0.5
    target = torch.stack([sign, sign * level[:, 0]], 1)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(150):
        loss = 0.5 * (critic(*features, timesteps=timesteps) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10, losses[::25]
