"""Every public function on a CUDA device: in bfloat16, in a captured graph, under torch.compile.

The other tests of this folder, which run the kernels in the interpreter elsewhere, run them on the device too.
"""

import pytest
import torch

from latent_critic import kernels
from latent_critic.kernels.critic_pool import critic_pool_reference

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def _randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def _transition():
    table = torch.tensor([[0.9, -0.3, 0.5], [1.0, -0.2, 0.0]], device="cuda")
    z, other = _randn(4, 16, 32, 32, seed=1), _randn(4, 16, 32, 32, seed=2)
    return _randn(4, 16, 32, 32, dtype=BF16), z, other, table, torch.tensor(0, device="cuda")


def _tokens():
    scale, shift = (0.1 * _randn(4, 640, dtype=BF16, seed=2)).chunk(2, 1)
    return _randn(4, 100, 320, dtype=BF16), _randn(4, 100, 320, dtype=BF16, seed=1), scale, shift


def _pool():
    h, _, scale, shift = _tokens()
    weights = _randn(128, 320, dtype=BF16), _randn(128, 320, dtype=BF16, seed=3)
    return h, _randn(8, 16, dtype=BF16), *weights, scale, shift


def _ppo():
    policy = (0.1 * _randn(16, seed=seed) for seed in range(3))
    return *policy, *(_randn(16, 3, seed=seed) for seed in range(3, 6)), kernels.PPOClips(0.1, 0.5, 2.0), 0.5


def _noise_key():
    v, z, _, table, step = _transition()
    return v, z, kernels.NoiseKey(torch.tensor(5, device="cuda"), torch.arange(4, device="cuda")), table, step


def _modulate():
    x, _, scale, shift = _tokens()
    return x, scale, shift


def _gate():
    x, y, gate, _ = _tokens()
    return x, gate, y


CALLS = {  # name: function, its arguments, which of them get a gradient
    "transition_step": (kernels.transition_step, _transition, ()),
    "transition_step, noise drawn": (kernels.transition_step, _noise_key, ()),
    "transition_log_prob": (kernels.transition_log_prob, _transition, (0,)),
    "critic_pool": (kernels.critic_pool, _pool, (0, 1, 2, 3, 4, 5)),
    "ppo_loss": (kernels.ppo_loss, _ppo, (0, 3)),
    "adaln_modulate": (kernels.adaln_modulate, _modulate, (0, 1, 2)),
    "gate_residual": (kernels.gate_residual, _gate, (0, 1, 2)),
}


def _run(function, arguments, wrt):
    """What the function returns first, and the gradients of its sum."""
    arguments = [x.detach().requires_grad_() if i in wrt else x for i, x in enumerate(arguments)]
    output = function(*arguments)
    output = output[0] if isinstance(output, tuple) else output
    wanted = [arguments[i] for i in wrt]
    return [output.detach(), *(torch.autograd.grad(output.sum(), wanted) if wanted else ())]


@pytest.mark.parametrize("name", CALLS)
def test_a_replayed_graph_gives_the_bits_of_a_call(name):
    function, make, wrt = CALLS[name]
    arguments = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _run(function, arguments, wrt)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _run(function, arguments, wrt)
    arguments[0].copy_(torch.randn_like(arguments[0]) * 0.2)  # the graph reads what its inputs hold when it runs
    graph.replay()
    expected = _run(function, arguments, wrt)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_without_a_graph_break(name):
    function, make, wrt = CALLS[name]
    arguments = make()
    compiled = torch.compile(function, fullgraph=True)
    for ours, theirs in zip(_run(compiled, arguments, wrt), _run(function, arguments, wrt), strict=True):
        # What surrounds the kernel is fused, and may round bfloat16 less often: a few units of its roundoff.
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(BF16).eps, atol=4 * torch.finfo(BF16).eps)


@pytest.mark.parametrize("name", CALLS)
def test_no_host_synchronisation(name):
    function, make, wrt = CALLS[name]
    arguments = make()
    _run(function, arguments, wrt)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(function, arguments, wrt)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_critic_pool_of_bfloat16_tokens_at_the_size_of_sd35():
    h = _randn(2, 1024, 1536, dtype=BF16)
    query, key_weight, value_weight = _randn(8, 64), _randn(512, 1536, seed=1) / 40, _randn(512, 1536, seed=2) / 40
    scale, shift = 0.1 * _randn(2, 1536, seed=3), 0.1 * _randn(2, 1536, seed=4)
    arguments = (h, query, key_weight, value_weight, scale, shift)
    expected = critic_pool_reference(*(x.double() for x in arguments))
    error = (kernels.critic_pool(*arguments).double() - expected).norm() / expected.norm()
    # The float32 side of each product is two bfloat16 numbers, so good to 2^-16; a score of order 1 moves by as much.
    assert error < 4 * 2.0**-16
