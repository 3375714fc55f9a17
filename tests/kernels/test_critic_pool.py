import pytest
import torch

from latent_critic.kernels import critic_pool
from latent_critic.kernels.critic_pool import critic_pool_reference


def _inputs(batch=3, tokens=11, dim=20, heads=4, head_dim=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    width = heads * head_dim
    return {
        "h": 3.0 * randn(batch, tokens, dim) + 1.0,
        "query": randn(heads, head_dim),
        "key_weight": randn(width, dim),
        "value_weight": randn(width, dim),
        "scale": 0.3 * randn(batch, dim),
        "shift": 0.3 * randn(batch, dim),
    }


def _multihead_attention(h, query, key_weight, value_weight, scale, shift):
    """The same formula through torch.nn: identity query and output projections, the query as the only token."""
    heads, head_dim = query.shape
    width, dim = key_weight.shape
    attention = torch.nn.MultiheadAttention(width, heads, bias=False, kdim=dim, vdim=dim, batch_first=True).double()
    with torch.no_grad():
        attention.q_proj_weight.copy_(torch.eye(width))
        attention.out_proj.weight.copy_(torch.eye(width))
        attention.k_proj_weight.copy_(key_weight)
        attention.v_proj_weight.copy_(value_weight)
        x = torch.nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)(h) * (1 + scale[:, None]) + shift[:, None]
        return attention(query.reshape(1, 1, width).expand(len(h), 1, width), x, x)[0][:, 0]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("tokens", [1, 11])
def test_against_multihead_attention(tokens, heads):
    inputs = _inputs(tokens=tokens, heads=heads)
    # float64 on both sides: sums of at most 24 products of order 1, so far below 1e-12.
    torch.testing.assert_close(critic_pool(**inputs), _multihead_attention(**inputs), rtol=1e-12, atol=1e-12)


def test_folding_changes_neither_values_nor_gradients():
    inputs = {name: x.requires_grad_() for name, x in _inputs().items()}
    weights = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = critic_pool(**inputs), critic_pool_reference(**inputs)
    # float64 on both sides, in another order of summation.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for name, x in inputs.items():
        ours, theirs = (
            torch.autograd.grad((out * weights).sum(), x, retain_graph=True)[0] for out in (found, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_float32_is_close_to_float64():
    inputs = _inputs()
    pooled = critic_pool(**{name: x.float() for name, x in inputs.items()})
    assert pooled.dtype == torch.float32 and pooled.shape == (3, 24)
    # Scores up to about 20 carry 1e-6 of rounding, which the softmax turns into a relative error of the weights.
    torch.testing.assert_close(pooled.double(), critic_pool(**inputs), rtol=1e-5, atol=2e-5)


def test_half_precision_tokens_are_widened():
    inputs = {name: x.bfloat16() for name, x in _inputs().items()}
    pooled = critic_pool(**inputs)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, critic_pool(**{name: x.float() for name, x in inputs.items()}))


def test_shift_cancels_in_the_softmax():
    inputs = _inputs()
    without = critic_pool(**(inputs | {"shift": torch.zeros_like(inputs["shift"])}))
    # Every token moves by the same vector: no change of the attention, and value_weight times it in the output.
    expected = without + inputs["shift"] @ inputs["value_weight"].T
    torch.testing.assert_close(critic_pool(**inputs), expected, rtol=1e-12, atol=1e-12)


def test_order_of_the_tokens_does_not_matter():
    inputs = _inputs()
    permuted = inputs | {"h": inputs["h"].flip(1)}
    torch.testing.assert_close(critic_pool(**permuted), critic_pool(**inputs), rtol=1e-12, atol=1e-12)


def test_gradcheck_in_every_argument():
    inputs = _inputs(batch=2, tokens=3, dim=5, heads=2, head_dim=2)
    arguments = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(critic_pool, arguments)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h", (3, 20)),
        ("query", (24,)),
        ("key_weight", (24, 19)),
        ("value_weight", (20, 24)),
        ("scale", (1, 20)),
        ("shift", (3, 11, 20)),
    ],
)
def test_bad_argument_is_named(name, shape):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        critic_pool(**(_inputs() | {name: torch.zeros(shape, dtype=torch.float64)}))


@pytest.mark.parametrize("name", ["h", "scale", "shift"])
def test_channels_must_be_neighbours_in_memory(name):
    inputs = _inputs()
    inputs[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(ValueError, match=rf"^{name} must have stride 1"):
        critic_pool(**inputs)


def test_rows_may_lie_anywhere():
    inputs = _inputs()
    chunked = {name: torch.stack((inputs[name], inputs[name]), 1)[:, 1] for name in ("scale", "shift")}
    expanded = inputs | chunked | {"h": torch.cat((inputs["h"], inputs["h"]), -1)[..., :20]}
    torch.testing.assert_close(critic_pool(**expanded), critic_pool(**inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["query", "key_weight", "value_weight", "scale", "shift"])
def test_bad_device_or_dtype_is_named(name):
    inputs = _inputs()
    with pytest.raises(ValueError, match=rf"^{name} must be on h's device cpu"):
        critic_pool(**(inputs | {name: inputs[name].to("meta")}))
    with pytest.raises(ValueError, match=rf"^{name} must be floating point"):
        critic_pool(**(inputs | {name: inputs[name].long()}))
