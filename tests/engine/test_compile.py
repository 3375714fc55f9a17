"""Compiled blocks: what stays outside, how often they are compiled, and that rollout and update compute alike."""

import copy
import inspect
import threading

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_grad
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch._dynamo.utils import counters

from latent_critic.engine.backbones import compiled
from latent_critic.engine.backbones.compiled import compile_blocks
from latent_critic.engine.backbones.sd3_fused import FusedJointTransformerBlock, fuse
from latent_critic.engine.errors import UserError
from latent_critic.engine.sharding import shard
from latent_critic.engine.trainer import Trainer

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_COMPILED", {})
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # restored at the end
        yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """Dynamo alone, no code generator: the same operations as uncompiled, to the bit, without the time to compile."""
    compile_ = torch.compile
    options = {"backend": "eager", "options": None}
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile_(f, **{**given, **options}))


@pytest.fixture
def with_compiler():
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("needs a C++ compiler")


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_trunk(num_layers):
    """As SD3.5-M in small: the first half of the blocks with dual attention, the last drops the text."""
    torch.manual_seed(0)
    trunk = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_projection_dim=24,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        pos_embed_max_size=4,
        dual_attention_layers=tuple(range(num_layers // 2)),
        qk_norm="rms_norm",
    ).eval()
    for name, parameter in trunk.named_parameters():
        gain = float("norm" in name and parameter.ndim == 1 and "weight" in name)
        torch.nn.init.normal_(parameter, mean=gain, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
    fuse(trunk)
    return trunk


def predict(trunk, batch=3):
    return trunk(
        hidden_states=randn(batch, 4, 4, 4),
        encoder_hidden_states=randn(batch, 5, 10, seed=2),
        pooled_projections=randn(batch, 6, seed=3),
        timestep=torch.full((batch,), 500.0),
        return_dict=False,
    )[0]


def train(trunk, batch=3):
    """Prediction and the gradients of all parameters."""
    out = predict(trunk, batch)
    return [out.detach(), *torch.autograd.grad((out * randn(*out.shape)).sum(), list(trunk.parameters()))]


def same(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def graphs():
    return counters["stats"]["unique_graphs"]


# ------------------------------------------------------------------------------------------- how often, and what of it


def test_blocks_of_one_structure_share_what_was_compiled(traced):
    """Of three structures here: in copies without gradients, and where there are some."""
    trunk = make_trunk(6)
    expected = train(trunk)
    compile_blocks(trunk.transformer_blocks)
    counters.clear()
    twins = [copy.deepcopy(trunk).requires_grad_(False) for _ in range(2)]
    with torch.no_grad():
        assert all(torch.equal(predict(twin), expected[0]) for twin in twins)
    assert graphs() == 3
    for _ in range(2):
        assert same(train(trunk), expected)
    assert graphs() == 6 and not counters["graph_break"]


def test_no_limit_is_met(traced):
    """Dynamo's own is 8 for a block's code; newer releases keep it for each thread."""
    block = torch.nn.Linear(2, 2)
    compile_blocks([block])
    counters.clear()
    failures = []

    def work(first):
        try:
            for batch in range(first, first + 12):
                block(randn(batch, 2))
        except Exception as error:
            failures.append(error)

    work(1)
    thread = threading.Thread(target=work, args=(13,))
    thread.start()
    thread.join()
    assert not failures and graphs() == 24


def test_what_cannot_be_compiled_as_a_whole_is_an_error(traced):
    class Block(torch.nn.Linear):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    block = Block(2, 2)
    compile_blocks([block])
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        block(randn(3, 2))


def test_a_second_time_changes_nothing(traced):
    trunk = make_trunk(2)
    signature = inspect.signature(trunk.transformer_blocks[0].forward)
    before = trunk.state_dict(keep_vars=True)
    compile_blocks(trunk.transformer_blocks)
    types = [type(block) for block in trunk.transformer_blocks]
    compile_blocks(copy.deepcopy(trunk).transformer_blocks)
    compile_blocks(trunk.transformer_blocks)
    assert [type(block) for block in trunk.transformer_blocks] == types == [types[0]] * 2
    assert issubclass(types[0], FusedJointTransformerBlock) and types[0] is not FusedJointTransformerBlock
    assert inspect.signature(trunk.transformer_blocks[0].forward) == signature  # by which ZeRO-3's units bind arguments
    after = trunk.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_a_deep_copy_computes_with_its_own_weights(traced):
    block = torch.nn.Linear(2, 2)
    compile_blocks([block])
    x = randn(3, 2)
    expected = block(x)
    twin = copy.deepcopy(block)
    torch.nn.init.zeros_(block.weight)
    assert torch.equal(twin(x), expected) and not torch.equal(block(x), expected)


def test_hooks_stay_outside(traced):
    block = torch.nn.Linear(2, 2)
    compile_blocks([block])
    seen = []
    block.register_forward_pre_hook(lambda block, inputs: seen.append((type(inputs[0]), torch.compiler.is_compiling())))
    block.register_forward_hook(lambda block, _, out: seen.append((type(out), torch.compiler.is_compiling())))
    for _ in range(3):
        block(randn(3, 2))
    assert seen == [(torch.Tensor, False)] * 2 * 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_zero_3(traced, tiny_config, tiny_model, world, checkpointing):
    """A unit's weights are there inside the compiled forward alone; outputs and gradients are the uncompiled ones."""
    config = tiny_config()

    def run(compiling):
        model = tiny_model(config)
        conditioning = model.backbone.encode_prompts(["a red circle", "a green square"])
        inputs = randn(2, 4, 16, 16), torch.tensor([900.0, 300.0]), conditioning
        blocks = model.backbone.blocks(model.trunk)
        if compiling:
            compile_blocks(blocks)
        if checkpointing:
            model.trunk.enable_gradient_checkpointing()
            model.train()
        counters.clear()
        engine = shard(model, config, world)
        try:
            with torch.no_grad():
                found = [*engine(*inputs)]
            prediction, values = engine(*inputs)
            found += [prediction, values]
            blocks_weights = [p for block in blocks for p in block.parameters()]
            assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE and p.numel() == 0 for p in blocks_weights)
            engine.backward((prediction * randn(*prediction.shape)).sum() + values.sum())
            found += [safe_get_full_grad(p).clone() for p in model.parameters()]
            assert not counters["graph_break"]
            return found, graphs()
        finally:
            engine.destroy()

    expected, count = run(False)
    assert count == 0 and expected[0].std() > 0.1 and expected[1].std() > 0
    found, count = run(True)
    assert count == 2 * 2  # blocks with and without an output of text, forwards with and without gradients
    for ours, theirs in zip(found, expected, strict=True):
        # The same operations, but on weights that were gathered to other addresses, by which MKL rounds: 1e-7 a
        # rounding, some hundred deep, through blocks of gain 1.
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


# ------------------------------------------------------------------------------------------- what the compiler makes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rollout_and_update_compute_alike(with_compiler, checkpointing):
    """Without gradients and with them, to the bit on a CPU; the same as uncompiled, but for rounding."""
    trunk = make_trunk(1)
    expected = train(trunk)
    compile_blocks(trunk.transformer_blocks)
    sampling = copy.deepcopy(trunk).requires_grad_(False)
    if checkpointing:
        trunk.enable_gradient_checkpointing()
        trunk.train()
    with torch.no_grad():
        drawn = predict(sampling)
    found = train(trunk)
    assert torch.equal(found[0], drawn)
    for ours, theirs in zip(found, expected, strict=True):
        # Sums over at most 4 x 24 numbers in another order, in some five layers one after the other, of gain 1.
        assert (ours - theirs).norm() <= 2 * 5 * 96 * EPS * theirs.norm()


def test_so_do_convolutions(with_compiler):
    """Left alone, the compiler lays them out otherwise where there is no gradient."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=10,
        norm_num_groups=4,
    ).eval()
    compile_blocks(unet.down_blocks)
    sampling = copy.deepcopy(unet).requires_grad_(False)
    inputs = randn(3, 4, 8, 8), torch.tensor([900.0, 500.0, 10.0]), randn(3, 5, 10, seed=2)
    with torch.no_grad():
        drawn = sampling(*inputs, return_dict=False)[0]
    found = unet(*inputs, return_dict=False)[0]
    assert found.requires_grad and torch.equal(found, drawn) and drawn.std() > 0.01


def test_without_a_compiler():
    trunk = make_trunk(2)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}),
        pytest.raises(
            UserError, match="^model.compile = true: torch.compile does not work here: .*g[+][+].*CXX"
        ) as raised,
    ):
        compile_blocks(trunk.transformer_blocks)
    assert "\n" not in str(raised.value)
    assert {type(block) for block in trunk.transformer_blocks} == {FusedJointTransformerBlock}


# --------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("enabled", [True, False])
def test_config_key(traced, tiny_config, world, tmp_path, enabled):
    """The blocks that train and those that sample; the first ratio of a fresh batch is 1 as before."""
    config = tiny_config(
        model={"compile": enabled},
        rollout={"num_inference_steps": 2, "samples_per_iteration": 2, "micro_batch_size": 1},
        training={"value_pretraining_iterations": 0, "updates_per_iteration": 1, "critic_epochs": 1},
    )
    trainer = Trainer(config, world, tmp_path)
    try:
        for model in (trainer.model, *trainer.rollout.models):
            names = {type(block).__name__ for block in trainer.backbone.blocks(model.trunk)}
            assert names == {"CompiledFusedJointTransformerBlock" if enabled else "FusedJointTransformerBlock"}
        row = trainer.iterate(0)
        assert row["first_ratio_deviation"] == 0.0 and row["grad_norm/critic"] > 0
        assert (graphs() > 0) == enabled
    finally:
        trainer.engine.destroy()


@pytest.mark.gpu
def test_on_a_gpu(tiny_config, world, tmp_path):
    """Inside a captured step; what rollout and update compute then agrees to bfloat16's precision."""
    config = tiny_config(model={"compile": True}, training={"value_pretraining_iterations": 0})
    trainer = Trainer(config, world, tmp_path)
    try:
        row = trainer.iterate(0)
        assert all(loop.is_captured for loop in trainer.rollout._loops.values())
        # A log-probability moves by the mean of 1,024 products of the step's noise, of order 1, with what the mean
        # moves, 2^-8 of a step's length over its std; those are of one size but for the last steps.
        assert row["first_ratio_deviation"] < 1e-2 and row["grad_norm/actor"] > 0
    finally:
        trainer.rollout.close()
        trainer.engine.destroy()
