"""The loop on static buffers: a plain loop's bits, whatever was there before, and nothing asked of the host.

On a CPU nothing is captured, but every step is the one that a CUDA graph replays; tests/engine/test_gpu.py captures it.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latent_critic.engine.denoising import DenoisingLoop
from latent_critic.engine.noise import keyed_noise
from latent_critic.kernels.transition import transition_step

STEPS, SIZE = 4, 3
SHAPE = (4, 16, 16)


@pytest.fixture
def make(tiny_config, tiny_model):
    """make(transition, guidance, size) -> a loop over an actor-critic, which is loop.model."""

    def build(transition="flow-sde", guidance=1.0, size=SIZE):
        model = tiny_model(tiny_config(rollout={"guidance_scale": guidance}))
        schedule = model.backbone.schedule(transition, 0.7, STEPS)
        unconditional = model.backbone.encode_prompts([""]) if guidance > 1 else None
        return DenoisingLoop(model, schedule, SHAPE, size, inputs(model)[1], unconditional, guidance)

    return build


def inputs(model, count=SIZE, seed=0):
    """Noises [K + 1, B, ...] and conditioning."""
    noises = torch.stack([keyed_noise(seed, torch.arange(count), k, SHAPE) for k in range(STEPS + 1)])
    prompts = ["a red circle", "two blue squares", "a green triangle"]
    conditioning = model.backbone.encode_prompts(prompts)  # of one batch size: what is encoded rounds alike
    return noises, {name: tensor[:count] for name, tensor in conditioning.items()}


@torch.no_grad()
def plain(loop, noises, conditioning):
    """The same from the definitions, on tensors of its own."""
    z, found = noises[0], [[noises[0]], [], []]
    for k in range(STEPS):
        timesteps = loop.timesteps[k].expand(len(z))
        v, values = loop.model(z, timesteps, conditioning, loop.unconditional)
        z, log_prob = transition_step(v, z, noises[k + 1], loop.table, k)
        for kept, tensor in zip(found, (z, log_prob, values), strict=True):
            kept.append(tensor)
    return [torch.stack(kept, 1) for kept in found]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("transition, guidance", [("flow-sde", 1.0), ("cps", 1.0), ("ode", 1.0), ("flow-sde", 2.0)])
def test_is_the_plain_loop_to_the_bit(make, transition, guidance):
    loop = make(transition, guidance)
    for seed in (0, 1):  # the buffers hold an earlier micro-batch then
        batch = inputs(loop.model, seed=seed)
        latents, log_probs, values = loop(*batch)
        assert latents.shape == (SIZE, STEPS + 1, *SHAPE) and latents.is_contiguous()
        assert log_probs.shape == (SIZE, STEPS) and values.shape == (SIZE, STEPS, 2)
        assert {x.dtype for x in (latents, log_probs, values)} == {torch.float32}
        assert equal((latents, log_probs, values), plain(loop, *batch))
        assert values.std() > 0 and latents[:, -1].sub(latents[:, 0]).abs().mean() > 0.1


def test_a_short_micro_batch_is_filled_up(make):
    """Its samples are those of a full one, and nothing of an earlier micro-batch is in them."""
    loop = make()
    full = loop(*inputs(loop.model))
    loop(*inputs(loop.model, seed=9))
    for count in (1, 2):
        short = loop(*inputs(loop.model, count))
        assert equal(short, [x[:count] for x in full])
        assert torch.equal(loop.latents[:, -1], loop.latents[:, count - 1])  # the last sample again: finite, whatever


@pytest.mark.parametrize("size", [1, 3])
def test_results_outlive_the_buffers(make, size):
    loop = make(size=size)
    first = loop(*inputs(loop.model, size))
    kept = [x.clone() for x in first]
    loop(*inputs(loop.model, size, seed=1))
    assert equal(first, kept)
    buffers = {x.untyped_storage().data_ptr() for x in (loop.latents, loop.log_probs, loop.values)}
    assert buffers.isdisjoint(x.untyped_storage().data_ptr() for x in first)


def test_every_buffer_stays_where_it_is(make):
    loop = make(guidance=2.0)
    loop(*inputs(loop.model))
    before = dict(loop._tensors())
    loop(*inputs(loop.model, 2, seed=1))
    assert dict(loop._tensors()) == before
    names = set(before)
    assert {"step", "noises", "latents", "log_probs", "values", "table", "timesteps"} <= names
    assert {"conditioning prompt_embeds", "unconditional pooled_prompt_embeds"} <= names
    assert any(name.endswith("transformer_blocks.1.attn.to_q.weight") for name in names)
    assert any(name.endswith("critic.taps.query") for name in names) and any("pos_embed" in name for name in names)


@pytest.mark.parametrize("what", ["a weight", "a plain tensor", "a buffer of the loop"])
def test_a_moved_tensor_is_named(make, what):
    loop = make()
    block = loop.model.trunk.transformer_blocks[1]
    block.cached = torch.ones(3)
    loop._addresses = dict(loop._tensors())
    loop._check_addresses()
    if what == "a weight":
        block.attn.to_q.weight.data = block.attn.to_q.weight.data.clone()
        name = "transformer_blocks.1.attn.to_q.weight moved"
    elif what == "a plain tensor":
        block.cached = torch.ones(3)
        name = "transformer_blocks.1.cached moved"
    else:
        loop.noises = loop.noises.clone()
        name = "memory: noises moved"
    with pytest.raises(RuntimeError, match=name):
        loop._check_addresses()


class _Watch(TorchDispatchMode):
    """Collects the operators that are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_step_asks_nothing_of_the_host(make, guidance):
    """Operators whose result Python must wait for, or whose shape depends on data, cannot be in a graph."""
    loop = make(guidance=guidance)
    loop(*inputs(loop.model))
    loop.step.zero_()
    with torch.no_grad(), _Watch() as watch:
        loop._step()
    assert len(watch.called) > 100 and "index_copy_" in watch.called
    waiting = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim"}
    assert waiting.isdisjoint(watch.called)


def test_weights_may_change_in_place(make):
    loop = make()
    batch = inputs(loop.model)
    before = loop(*batch)
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.mul_(1.01)
    after = loop(*batch)
    assert equal(after, plain(loop, *batch))
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[2], after[2])
