"""Linear layers as convolutions: the same function, rows that do not depend on the batch, computed by oneDNN."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from latent_critic.engine.backbones import load_backbone, onednn
from latent_critic.engine.backbones.onednn import OneDNNLinear, use_onednn

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[True, False], ids=["slow-mkl", "fast-mkl"])
def mkl_is_slow(request, monkeypatch):
    monkeypatch.setattr(onednn, "_mkl_is_slow", lambda: request.param)
    return request.param


def make(in_features: int, out_features: int, bias: bool = True) -> OneDNNLinear:
    torch.manual_seed(0)
    return OneDNNLinear(in_features, out_features, bias)


def within(found, expected, length: int) -> bool:
    """A sum of `length` products in float32 is off by at most half an eps a term; sums of its own size, so a few eps
    of the root of their squares, which a random walk of roundings stays under."""
    scale = expected.abs().amax()
    return bool((found.double() - expected).abs().amax() <= EPS * length**0.5 * scale)


def operators(run) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return {event.key for event in found.key_averages()}


# Odd sizes, one sample, one token, more than PyTorch calls a small picture.
SHAPES = [(3, 7, 5, 11), (1, 77, 64, 96), (4, 1, 33, 17), (1, 1, 8, 8), (2, 64, 128, 512), (1, 200, 128, 32)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("b, n, k, m", SHAPES)
def test_output_and_gradients(b, n, k, m, bias):
    linear = make(k, m, bias)
    x, weights = torch.randn(b, n, k, requires_grad=True), torch.randn(b, n, m)
    exact = copy.deepcopy(linear).double()
    x64 = x.detach().double().requires_grad_()
    expected = functional.linear(x64, exact.weight, exact.bias)
    (expected * weights).sum().backward()
    found = linear(x)
    (found * weights).sum().backward()
    assert found.shape == (b, n, m) and found.is_contiguous()
    assert within(found.detach(), expected.detach(), k)
    assert within(x.grad, x64.grad, m)
    assert within(linear.weight.grad, exact.weight.grad, b * n)
    assert not bias or within(linear.bias.grad, exact.bias.grad, b * n)


@torch.no_grad()
@pytest.mark.parametrize("k, m", [(128, 512), (512, 128), (96, 128), (320, 320)])
@pytest.mark.parametrize("n", [1, 16, 77])
def test_rows_do_not_depend_on_batch_or_threads(n, k, m, threads):
    linear, x = make(k, m), torch.randn(64, n, k)
    threads(1)
    expected = linear(x)
    for count in (1, 2):
        threads(count)
        for b in (1, 2, 3, 8, 16, 64):
            assert torch.equal(linear(x[:b]), expected[:b]), (count, b)


@pytest.mark.parametrize("b, n", [(1, 16), (1, 200), (2, 16), (8, 77), (64, 64)])
def test_onednn_computes_it_in_one_thread_too(b, n, threads):
    threads(1)
    linear, x = make(128, 64), torch.randn(b, n, 128, requires_grad=True)
    found = operators(lambda: linear(x).sum().backward())
    assert "aten::mkldnn_convolution" in found and not {"aten::addmm", "aten::mm", "aten::bmm"} & found


def test_strided_tokens():
    linear, x = make(64, 48), torch.randn(3, 64, 10).transpose(1, 2)
    assert torch.equal(linear(x), linear(x.contiguous()))
    half = torch.randn(3, 20, 64)[:, 4:11]
    assert torch.equal(linear(half), linear(half.contiguous()))


@torch.no_grad()
@pytest.mark.parametrize(
    "x",
    [torch.randn(5, 16), torch.randn(16), torch.randn(2, 3, 4, 16), torch.randn(2, 3, 16).double()],
    ids=["vectors", "one vector", "pictures", "float64"],
)
def test_other_inputs_are_left_to_pytorch(x):
    linear = make(16, 8).to(x.dtype)
    assert torch.equal(linear(x), functional.linear(x, linear.weight, linear.bias))


def test_where_it_is_used(mkl_is_slow):
    class Other(nn.Linear):
        pass

    trunk = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.GELU()), "b": Other(4, 4), "c": nn.LayerNorm(4)})
    before = {name: tensor.data_ptr() for name, tensor in trunk.state_dict().items()}
    use_onednn(trunk)
    assert type(trunk["a"][0]) is (OneDNNLinear if mkl_is_slow else nn.Linear)
    assert type(trunk["b"]) is Other and type(trunk["c"]) is nn.LayerNorm
    assert {name: tensor.data_ptr() for name, tensor in trunk.state_dict().items()} == before
    assert type(copy.deepcopy(trunk)["a"][0]) is type(trunk["a"][0])


@pytest.mark.parametrize(
    "capability, processor, mkl, expected",
    [
        ("AVX512", "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", True, True),
        ("AVX512", "vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", True, False),  # Zen 4
        ("AVX512", "vendor_id\t: GenuineIntel\ncpu family\t: 26\n", True, False),
        ("AVX2", "vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", True, False),
        ("AVX512", "vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", False, False),
        ("AVX512", "vendor_id\t: AuthenticAMD\n", True, False),
        ("AVX512", "", True, False),
    ],
)
def test_which_processors(capability, processor, mkl, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(onednn, "_processor", lambda: processor)
    assert onednn._mkl_is_slow() is expected


@torch.no_grad()
def test_a_trunk_and_lora_on_it(monkeypatch, tiny_pipeline):
    monkeypatch.setattr(onednn, "_mkl_is_slow", lambda: True)
    backbone = load_backbone(str(tiny_pipeline), 0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), backbone.trunk)
    latents, timesteps = torch.randn(3, *backbone.latent_shape), torch.tensor([900.0, 500.0, 10.0])
    conditioning = backbone.encode_prompts(["a red circle", "two blue squares", "a green triangle"])
    exact = {name: tensor.double() for name, tensor in conditioning.items()}
    expected = backbone.predict(backbone.trunk.double(), latents.double(), timesteps, exact)
    trunk = backbone.trunk.float()
    use_onednn(trunk)
    found = backbone.predict(trunk, latents, timesteps, conditioning)
    assert sum(type(module) is OneDNNLinear for module in trunk.modules()) > 20
    # Three blocks pass on and add up their roundings: some fifteen sums of up to 256 terms, one after the other.
    assert within(found, expected, 15 * 256)
    assert "aten::mkldnn_convolution" in operators(lambda: backbone.predict(trunk, latents, timesteps, conditioning))
