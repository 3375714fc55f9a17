"""PPO's Triton kernel, in the interpreter where there is no GPU, against its reference."""

import math

import pytest
import torch

from latent_critic.kernels import ppo
from latent_critic.kernels.ppo import PPOClips

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
CLIPS = [PPOClips(0.2), PPOClips(0.2, 0.3, 1.0)]


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch):
    """The public functions run the kernel, here in the interpreter."""
    monkeypatch.setattr(ppo, "runs_kernels", lambda x: True)


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def _inputs(n, m, dtype=torch.float32, seed=0):
    """log_prob, log_prob_old, advantage [n], value, returns, value_old [n, m]: about half is clipped."""
    policy = [scale * _randn(n, seed=seed + i, dtype=torch.float64) for i, scale in enumerate((0.2, 0.2, 1.0))]
    value, returns, change = (
        scale * _randn(n, m, seed=seed + 3 + i, dtype=torch.float64) for i, scale in enumerate((1.0, 2.0, 0.3))
    )
    inputs = [x.to(dtype) for x in (*policy, value, returns, value + change)]
    inputs[0].requires_grad_()
    inputs[3].requires_grad_()
    return inputs


def _flat(statistics):
    return (statistics.policy_loss, statistics.value_loss, *statistics.policy, *statistics.value)


def _run(function, inputs, clips, value_coef=0.7):
    """(loss and statistics, gradients)."""
    loss, statistics = function(*inputs, clips, value_coef)
    assert not any(x.requires_grad for x in _flat(statistics))
    # A third: the gradients that come in need not be 1.
    return (loss, *_flat(statistics)), torch.autograd.grad(loss / 3, (inputs[0], inputs[3]))


def _both(inputs, clips):
    """(loss and statistics, gradients) of the kernel and of the reference."""
    return [_run(function, inputs, clips) for function in (ppo.ppo_loss, ppo.ppo_loss_reference)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 3, 1023, 1025])
def test_loss_statistics_and_gradients(n, m, clips, dtype, poisoned_outputs):
    inputs = _inputs(n, m, dtype)
    (found, gradients), (expected, expected_gradients) = _both(inputs, clips)
    # Sums of n m terms in two orders, each 2 log2(n m) + 8 roundings at the most of the mean absolute term: that is the
    # mean itself where all terms have one sign, and below 4 in the others. Half precision is widened without rounding.
    roundings = 2 * (n * m).bit_length() + 8
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32 and ours.shape == theirs.shape
        assert ((ours - theirs).abs() <= roundings * EPS * (theirs.abs() + 4)).all(), (ours, theirs)
    # Four products and quotients on each side, half an eps each, and PyTorch's exponential, an eps off; then the type's
    # own rounding, absolute for its smallest numbers.
    half = torch.finfo(torch.float16)
    rtol, atol = (6 * EPS, 0.0) if dtype == torch.float32 else (half.eps, half.smallest_normal * half.eps)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("clips", CLIPS)
def test_gradcheck(clips):
    log_prob, old, advantage, value, returns, value_old = _inputs(6, 2, torch.float64)

    def loss(log_prob, value):
        return ppo.ppo_loss(log_prob, old, advantage, value, returns, value_old, clips, 0.7)[0]

    assert torch.autograd.gradcheck(loss, (log_prob, value))
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, advantage, 0.2)[0], log_prob)
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, returns, value_old, *clips[1:])[0], value)


@pytest.mark.parametrize("clips", CLIPS)
def test_float64_agrees_to_its_own_precision(clips):
    (found, gradients), (expected, expected_gradients) = _both(_inputs(700, 3, torch.float64), clips)
    for ours, theirs in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_and_borders(dtype):
    """Numbers of few bits, so that nothing is rounded but the logarithms."""
    # The ratio at 1 and at both ends of the clip: a logarithm rounded to 24 bits finds back 1.25 and 0.75.
    ratio = torch.tensor([1.0, 1.0, 1.0, 1.25, 1.25, 0.75, 0.75, 1.25], dtype=dtype, device=DEVICE)
    advantage = torch.tensor([2.0, -1.0, 0.0, 1.0, -1.0, 1.0, -1.0, 0.0], dtype=dtype, device=DEVICE)
    log_prob = ratio.log().requires_grad_()
    # Values at both ends of the clip around 0, inside, and outside with an error as large as at the end.
    value = torch.tensor([[0.5, -0.5], [0.5, 0.0], [-0.25, 1.5], [1.5, 3.0]] * 2, dtype=dtype, device=DEVICE)
    returns = torch.tensor([[1.0, 1.0], [0.5, 0.0], [2.0, 1.0], [1.0, 1.0]] * 2, dtype=dtype, device=DEVICE)
    inputs = [log_prob, torch.zeros_like(ratio), advantage, value.requires_grad_(), returns, torch.zeros_like(value)]
    found, gradients = _run(ppo.ppo_loss, inputs, PPOClips(0.25, 0.5), 0.5)
    # On a CPU: a GPU's float32 exponential may end beyond the border.
    on_cpu = [x.detach().cpu().requires_grad_(x.requires_grad) for x in inputs]
    expected, expected_gradients = _run(ppo.ppo_loss_reference, on_cpu, PPOClips(0.25, 0.5), 0.5)
    for ours, theirs in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        # PyTorch's exponential may miss 1.25 and 0.75 by an eps.
        torch.testing.assert_close(ours.cpu(), theirs, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    log_prob_grad, value_grad = torch.autograd.grad(
        ppo.ppo_loss(*inputs, PPOClips(0.25, 0.5), 2.0)[0], (log_prob, value)
    )
    assert torch.equal(log_prob_grad, -advantage * ratio / 8)  # the two halves of a tie are the whole
    distance = (value - returns).detach()
    share = torch.ones_like(value)
    share[[2, 6], 1] = share[[3, 7], 0] = 0.5  # of equals, the clipped one has no gradient
    assert torch.equal(value_grad, 2.0 * share * distance / 16)
    clipfrac, value_clipfrac = found[6], found[8]
    assert (clipfrac, value_clipfrac) == (0.0, 6 / 16)  # the border itself is not beyond it


def test_fresh_batch_has_ratio_one_to_the_last_bit():
    log_prob, advantage = _randn(77), _randn(77, seed=1)
    loss, statistics = ppo.policy_loss(log_prob, log_prob.clone(), advantage, 1e-5)
    assert [x.item() for x in statistics] == [1.0, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(loss, -advantage.mean(), rtol=0, atol=22 * EPS)


NAN, INF = math.nan, math.inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy speaks of what is tested here
@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize(
    ("position", "number"),
    [(i, x) for i in range(6) for x in (NAN, INF, -INF)] + [(0, 20.0), (0, -20.0), (0, 100.0), (3, 1e30), (4, 1e5)],
)
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_extreme_numbers_are_as_in_pytorch(position, number, sign, clips):
    inputs = [x.detach().clone() for x in _inputs(3, 2)]
    inputs[1].zero_()
    inputs[2].copy_(torch.tensor([sign, 1.0, -1.0]))
    inputs[position][0] = number
    inputs[0].requires_grad_()
    inputs[3].requires_grad_()
    (found, gradients), (expected, expected_gradients) = _both(inputs, clips)
    # exp(20) exactly rounded, and as PyTorch rounds it.
    for ours, theirs in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=8 * EPS, atol=8 * EPS, equal_nan=True)


@pytest.mark.parametrize("clips", CLIPS)
def test_either_loss_alone(clips, poisoned_outputs):
    inputs = _inputs(200, 3)  # one tile, with or without heads: the same order of addition
    log_prob, old, advantage, value, returns, value_old = inputs
    _, statistics = ppo.ppo_loss(*inputs, clips, 0.7)
    policy, policy_statistics = ppo.policy_loss(log_prob, old, advantage, clips.clip_range)
    critic, value_statistics = ppo.value_loss(value, returns, value_old, clips.value_clip_range, clips.target_clip)
    assert policy == statistics.policy_loss and critic == statistics.value_loss
    assert policy_statistics == statistics.policy
    assert all(torch.equal(a, b) for a, b in zip(value_statistics, statistics.value, strict=True))
    for loss, x, reference in (
        (policy, log_prob, ppo.policy_loss_reference(log_prob, old, advantage, clips.clip_range)[0]),
        (critic, value, ppo.value_loss_reference(value, returns, value_old, *clips[1:])[0]),
    ):
        ours, theirs = torch.autograd.grad(loss, x)[0], torch.autograd.grad(reference, x)[0]
        torch.testing.assert_close(ours, theirs, rtol=4 * EPS, atol=0)  # as above, with two products


@pytest.mark.parametrize("n", [1, 5, 1025])
def test_nothing_is_written_beyond_the_outputs(n, monkeypatch):
    make, buffers = ppo._outputs, []

    def guarded(*inputs):
        outputs = []
        for x in make(*inputs):
            buffers.append(x.new_full((x.numel() + 64,), 7.0))
            outputs.append(buffers[-1][32:-32].view(x.shape))
        return tuple(outputs)

    monkeypatch.setattr(ppo, "_outputs", guarded)
    inputs, scalars = [x.detach() for x in _inputs(n, 3)], [0.2, 0.3, 1.0, 0.7]
    ppo.launch_ppo(*inputs, scalars)
    ppo.launch_ppo(*inputs[:3], None, None, None, scalars)
    ppo.launch_ppo(None, None, None, *inputs[3:], scalars)
    assert len(buffers) == 12
    assert all((buffer[:32] == 7.0).all() and (buffer[-32:] == 7.0).all() for buffer in buffers)


LAYOUTS = {  # of [6] and [6, 3]
    "one step of all samples": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "a span of steps of two samples": lambda x: torch.cat([x.unflatten(0, (2, 3))] * 2, 1)[:, :3],
    "transposed": lambda x: x.unflatten(0, (2, 3)).transpose(0, 1).contiguous().transpose(0, 1),
    "heads apart": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_layout(layout):
    inputs = [x.detach() for x in _inputs(6, 3)]
    inputs[4] = inputs[4][:1].expand(6, 3)  # one return for all steps
    found = []
    for change in (torch.Tensor.contiguous, LAYOUTS[layout]):
        changed = [change(x) for x in inputs]
        log_prob, value = changed[0].requires_grad_(), changed[3].requires_grad_()
        loss, statistics = ppo.ppo_loss(*changed, CLIPS[1], 0.7)
        gradients = torch.autograd.grad(loss, (log_prob, value))
        assert all(x.shape == y.shape for x, y in zip(gradients, (log_prob, value), strict=True))
        found.append([loss, *_flat(statistics), *(x.flatten() for x in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_vector_of_values_is_one_head():
    value, returns = _randn(7).requires_grad_(), _randn(7, seed=1)
    loss, statistics = ppo.value_loss(value, returns)
    column, column_statistics = ppo.value_loss(value[:, None], returns[:, None])
    assert loss == column and all(torch.equal(a, b) for a, b in zip(statistics, column_statistics, strict=True))
    assert statistics.error.shape == (1,)
    torch.testing.assert_close(torch.autograd.grad(loss, value)[0], (value - returns).detach() / 7, rtol=EPS, atol=0)


def test_opcheck():
    inputs, scalars = _inputs(5, 3), [0.2, 0.3, 1.0, 0.7]
    torch.library.opcheck(ppo.launch_ppo, (*inputs, scalars))
    torch.library.opcheck(ppo.launch_ppo, (*inputs[:3], None, None, None, scalars))
    torch.library.opcheck(ppo.launch_ppo, (None, None, None, *inputs[3:5], None, scalars))


@pytest.mark.parametrize("kernel", [False, True])
def test_public_functions_compile_without_a_graph_break(kernel, monkeypatch):
    monkeypatch.setattr(ppo, "runs_kernels", lambda x: kernel)
    inputs = _inputs(5, 3)

    def all_three(log_prob, old, advantage, value, returns, value_old):
        loss, statistics = ppo.ppo_loss(log_prob, old, advantage, value, returns, value_old, CLIPS[1], 0.7)
        policy, _ = ppo.policy_loss(log_prob, old, advantage, 0.2)
        critic, values = ppo.value_loss(value, returns, value_old, 0.3, 1.0)
        return loss, policy + 0.7 * critic, statistics.policy.approx_kl, values.error

    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, all_three(*inputs), strict=True))
    assert compiled[0] == compiled[1]
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(compiled[0], (inputs[0], inputs[3])))
