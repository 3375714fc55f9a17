"""The critic heads: start, invariances, timestep modulation, gradients, and that they can learn."""

import pytest
import torch
from torch.nn import functional as F

from latent_critic.engine.critic import Critic

BATCH, TOKENS, WIDTH, TEXT = 6, 10, 24, 20


def make(num_taps=2, num_rewards=3, dim=16, num_heads=2, timestep_adaln=True):
    torch.manual_seed(0)
    return Critic(WIDTH, TEXT, num_taps, num_rewards, dim, num_heads, timestep_adaln)


def awaken(critic):
    """As after some training: nothing that starts at zero is zero any more."""
    for parameter in [p for p in critic.parameters() if not p.any()]:
        torch.nn.init.normal_(parameter, std=0.5)
    return critic


def inputs(num_taps=2, batch=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(batch, TOKENS, WIDTH, generator=generator) for _ in range(num_taps)]
    given = {"timesteps": torch.rand(batch, generator=generator) * 1000}
    return features, given | {"pooled_text": torch.randn(batch, TEXT, generator=generator)}


def test_values_start_at_exactly_zero():
    features, given = inputs()
    values = make()(*features, **given)
    assert values.dtype == torch.float32 and torch.equal(values, torch.zeros(BATCH, 3))


def test_values_are_the_formula():
    """Plain single-head attention and layers, one sample at a time."""
    critic = awaken(make(num_taps=2, num_rewards=2, num_heads=1))
    features, given = inputs()
    expected = torch.zeros(BATCH, 2)
    for i in range(BATCH):
        half = 128
        angle = given["timesteps"][i] * torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(half) / half)
        sinusoid = torch.cat([angle.cos(), angle.sin()])
        time, text = critic.condition.timestep_embedder, critic.condition.text_embedder
        condition = time.linear_2(F.silu(time.linear_1(sinusoid)))
        condition = F.silu(condition + text.linear_2(F.silu(text.linear_1(given["pooled_text"][i]))))
        pooled, taps = [], critic.taps
        scales, shifts = taps.modulation(condition).unflatten(0, (2, 2, WIDTH))
        for n, (tokens, scale, shift) in enumerate(zip(features, scales, shifts, strict=True)):
            x = F.layer_norm(tokens[i], (WIDTH,), eps=1e-6) * (1 + scale) + shift
            scores = (x @ taps.key_weight[n].T) @ taps.query[n, 0] / 16**0.5
            pooled.append(scores.softmax(0) @ (x @ taps.value_weight[n].T))
        pooled = F.layer_norm(torch.cat(pooled), (32,))
        expected[i] = torch.cat([head(pooled) for head in critic.heads])
    # Sums of at most 128 products of order 1 in another order, five layers deep.
    torch.testing.assert_close(critic(*features, **given), expected, rtol=2e-5, atol=2e-5)
    assert expected.std() > 0.1


def test_samples_do_not_mix_and_the_order_of_tokens_does_not_count():
    critic = awaken(make())
    features, given = inputs()
    values = critic(*features, **given)
    changed = [tokens.clone() for tokens in features]
    changed[0][3:] = torch.randn(BATCH - 3, TOKENS, WIDTH)
    found = critic(*changed, **given)
    assert torch.equal(found[:3], values[:3]) and bool((found[3:] != values[3:]).all())
    shuffled = [tokens[:, torch.randperm(TOKENS)] for tokens in features]
    # The same ten terms of order 1 in another order.
    torch.testing.assert_close(critic(*shuffled, **given), values, rtol=1e-5, atol=1e-5)


def test_each_tap_has_its_own_place():
    critic = awaken(make())
    features, given = inputs()
    values, swapped = critic(*features, **given), critic(*features[::-1], **given)
    assert not torch.allclose(swapped, values, atol=0.05)


@pytest.mark.parametrize("timestep_adaln", [True, False])
def test_timestep_counts_only_with_adaln(timestep_adaln):
    critic = awaken(make(timestep_adaln=timestep_adaln))
    features, given = inputs()
    flipped = given | {"timesteps": given["timesteps"].flip(0)}
    early, late = critic(*features, **given), critic(*features, **flipped)
    assert early.std() > 0.1
    if timestep_adaln:
        assert bool(((early - late).abs().amax(1) > 0.01).all())
    else:
        assert torch.equal(early, late)


def test_the_prompt_counts_beside_equal_features():
    critic = awaken(make())
    features, given = inputs()
    values = critic(*features, **given)
    others = critic(*features, **given | {"pooled_text": given["pooled_text"].flip(0)})
    assert bool(((values - others).abs().amax(1) > 0.01).all())


@pytest.mark.parametrize("timestep_adaln", [True, False])
def test_gradient_reaches_every_parameter(timestep_adaln):
    """The zero-initialised output opens in the first step, the zero-initialised modulation in the second."""
    critic = make(timestep_adaln=timestep_adaln)
    features, given = inputs()
    target = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    reached = []
    for _ in range(3):
        optimizer.zero_grad()
        (critic(*features, **given) - target).square().mean().backward()
        reached.append({name for name, p in critic.named_parameters() if bool(p.grad.any())})
        optimizer.step()
    every = {name for name, _ in critic.named_parameters()}
    assert reached[0] == {f"heads.{m}.2.{part}" for m in range(3) for part in ("weight", "bias")}
    assert every - reached[1] == {name for name in every if name.startswith("condition")}
    assert reached[2] == every


def test_heads_are_separate():
    """One head per reward (arXiv 2605.27736): the loss of one moves no other's weights."""
    critic = awaken(make())
    features, given = inputs()
    critic(*features, **given)[:, 1].square().sum().backward()
    moved = [any(bool(p.grad.any()) for p in head.parameters()) for head in critic.heads]
    assert moved == [False, True, False]


def test_overfits_a_small_regression():
    """Targets that need features and timestep together: the loss falls to a tenth, and far below in the end."""
    critic = make(num_taps=1, num_rewards=2, dim=32)
    features, given = inputs(num_taps=1, batch=24)
    sign = torch.where(given["timesteps"] > 500, 1.0, -1.0)
    level = features[0].mean(1)[:, :2] * TOKENS**0.5
    target = torch.stack([sign, sign * level[:, 0]], 1)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(150):
        loss = 0.5 * (critic(*features, **given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10, losses[::25]
