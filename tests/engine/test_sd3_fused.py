"""The fused blocks of SD3 against diffusers' own: on a CPU not one bit may differ, of outputs or gradients."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from latent_critic.engine.backbones import load_backbone, sd3_fused
from latent_critic.engine.backbones.sd3_fused import FusedJointTransformerBlock, fuse, unfuse
from latent_critic.engine.inference_copy import InferenceCopy
from latent_critic.engine.trainer import Trainer
from latent_critic.engine.world import World

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def stock():
    """As SD3.5-M in small: two blocks with dual attention, one without, the last with the text for attention only."""
    torch.manual_seed(0)
    trunk = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_projection_dim=24,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    for parameter in trunk.parameters():  # no gate, and no gradient, is small
        torch.nn.init.normal_(parameter, std=0.3)
    return trunk


@pytest.fixture
def fused(stock):
    trunk = copy.deepcopy(stock)
    fuse(trunk)
    return trunk


def _run(trunk, attention=None, seed=1):
    """Output, and gradients of all parameters and of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (3, 4, 8, 8), "encoder_hidden_states": (3, 5, 10), "pooled_projections": (3, 6)}
    inputs = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}
    weights = torch.randn(3, 4, 8, 8, generator=generator)
    timestep = torch.tensor([900.0, 500.0, 10.0])
    out = trunk(**inputs, timestep=timestep, joint_attention_kwargs=attention, return_dict=False)[0]
    return [out, *torch.autograd.grad((out * weights).sum(), [*trunk.parameters(), *inputs.values()])]


def _assert_same_bits(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # A comparison of zeros would show nothing. There are three: nobody asks what the text queries in the last block.
    assert sum(not x.any() for x in expected) == 3


@pytest.mark.parametrize("setting", ["plain", "chunked feed-forward", "checkpointing", "attention arguments"])
def test_outputs_and_gradients_are_diffusers(stock, fused, setting):
    for trunk in (stock, fused):
        if setting == "chunked feed-forward":
            trunk.enable_forward_chunking(1, dim=1)
        elif setting == "checkpointing":
            trunk.enable_gradient_checkpointing()
    attention = {"attention_mask": None} if setting == "attention arguments" else None
    assert isinstance(fused.transformer_blocks[0], FusedJointTransformerBlock)
    _assert_same_bits(_run(fused, attention), _run(stock, attention))


@torch.no_grad()
def test_first_block_takes_a_transposed_view(stock, fused):
    tokens = torch.randn(2, 24, 16).transpose(1, 2)
    arguments = {"encoder_hidden_states": torch.randn(2, 5, 24), "temb": torch.randn(2, 24)}
    for index in (0, 2, 3):
        text, image = stock.transformer_blocks[index](tokens, **arguments)
        fused_text, fused_image = fused.transformer_blocks[index](tokens, **arguments)
        assert torch.equal(fused_image, image) and image.std() > 0
        assert fused_text is text is None if index == 3 else torch.equal(fused_text, text)


def test_dual_norm_as_on_a_gpu(stock, fused, monkeypatch):
    expected = _run(stock)
    monkeypatch.setattr(sd3_fused, "runs_kernels", lambda x: True)
    found = _run(fused)
    assert torch.equal(found[0], expected[0])
    # The gradient of a dual block's tokens is the sum of two norms' instead of one norm's of a sum: a rounding each of
    # two blocks, passed on by sums over 3 x 16 tokens and 24 columns.
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * 72 * EPS * theirs.abs().max().item())


def test_every_norm_and_gate_is_fused(fused, monkeypatch):
    calls = []
    for name in ("adaln_modulate", "gate_residual"):
        function = getattr(sd3_fused, name)
        monkeypatch.setattr(sd3_fused, name, lambda *a, n=name, f=function: (calls.append(n), f(*a))[1])
    monkeypatch.setattr(sd3_fused, "runs_kernels", lambda x: True)
    _run(fused)
    # Norms: 4 in a block, 5 in a dual one, 3 in the last, and norm_out. Gates: 4, 5 and 2.
    assert calls.count("adaln_modulate") == 2 * 5 + 4 + 3 + 1
    assert calls.count("gate_residual") == 2 * 5 + 4 + 2


def test_weights_names_and_signature_stay(stock):
    before, types = stock.state_dict(keep_vars=True), [type(module) for module in stock.modules()]
    fuse(stock)
    fuse(stock)
    after = stock.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(isinstance(block, JointTransformerBlock) for block in stock.transformer_blocks)
    ours, theirs = (inspect.signature(c.forward) for c in (FusedJointTransformerBlock, JointTransformerBlock))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]
    unfuse(stock)
    assert [type(module) for module in stock.modules()] == types
    _run(stock)


def test_unfused_trunk_is_the_stock_one(stock, fused):
    unfuse(fused)
    assert type(fused.transformer_blocks[0]) is JointTransformerBlock
    _assert_same_bits(_run(fused), _run(stock))


def test_a_deep_copy_is_fused_and_has_its_own_weights(fused):
    twin = copy.deepcopy(fused)
    assert type(twin.transformer_blocks[0]) is FusedJointTransformerBlock
    expected = _run(twin)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    _assert_same_bits(_run(twin), expected)


def test_inference_copy_of_a_fused_model(tiny_config, tiny_model):
    model = tiny_model(tiny_config())
    latents, steps = torch.randn(2, 4, 16, 16), torch.tensor([900.0, 300.0])
    conditioning = model.backbone.encode_prompts(["a red circle", "a green square"])
    expected = model(latents, steps, conditioning)
    model.backbone.fuse()
    sampling = InferenceCopy(model)
    sampling.attach(SimpleNamespace(module=model), "copy", World(0, 1, torch.device("cpu")))
    twin = sampling.module()
    for found in (model(latents, steps, conditioning), twin(latents, steps, conditioning)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    sampling.refresh()
    moved = twin(latents, steps, conditioning)
    assert not torch.equal(moved[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(moved, model(latents, steps, conditioning), strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_config_key(fused, tiny_config, world, tmp_path):
    trainer = Trainer(tiny_config(model={"fused": fused}), world, tmp_path)
    assert all(isinstance(b, FusedJointTransformerBlock) == fused for b in trainer.backbone.trunk.transformer_blocks)


def test_saved_folder_is_stock(tiny_pipeline, tmp_path):
    backbone = load_backbone(str(tiny_pipeline), 0)
    backbone.fuse()
    backbone.save(backbone.trunk.state_dict(), tmp_path / "saved")
    assert type(load_backbone(str(tmp_path / "saved"), 0).trunk.transformer_blocks[0]) is JointTransformerBlock
