"""Attention through diffusers' dispatcher against diffusers' own processors, and what cannot be had."""

import copy

import pytest
import torch
from diffusers import AttentionBackendName, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn

from latent_critic.engine.backbones import attention, load_backbone
from latent_critic.engine.backbones.attention import set_attention_backend
from latent_critic.engine.backbones.sd3_fused import fuse, unfuse
from latent_critic.engine.errors import UserError
from latent_critic.engine.trainer import Trainer

EPS = torch.finfo(torch.float32).eps
HEADS, WIDTH = 3, 24


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sd3(**changes):
    """As SD3.5-M in small: a block with dual attention, one without, the last with the text for attention only."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
        **{"dual_attention_layers": (0,), "qk_norm": "rms_norm", **changes},
    )


def unet():
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=2,  # the number of heads, in fact
        cross_attention_dim=10,
        norm_num_groups=4,
    )


def inputs_of(trunk):
    latents, text = randn(3, 4, 8, 8), randn(3, 5, 10, seed=2)
    timestep = torch.tensor([900.0, 500.0, 10.0])
    if isinstance(trunk, UNet2DConditionModel):
        return {"sample": latents, "encoder_hidden_states": text, "timestep": timestep}
    pooled = randn(3, 6, seed=3)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": timestep,
    }


TRUNKS = {"sd3.5": sd3, "sd3": lambda: sd3(dual_attention_layers=(), qk_norm=None), "unet": unet}


@pytest.fixture(params=TRUNKS)
def stock(request):
    torch.manual_seed(0)
    trunk = TRUNKS[request.param]().eval()
    for name, parameter in trunk.named_parameters():  # unit gain, and no gate and no gradient is small
        gain = float("norm" in name and parameter.ndim == 1 and "weight" in name)
        torch.nn.init.normal_(parameter, mean=gain, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
    return trunk


@pytest.fixture
def trunk(stock):
    return copy.deepcopy(stock)


def run(trunk):
    """Output, and gradients of all parameters and of the inputs."""
    inputs = {name: x.clone().requires_grad_(name != "timestep") for name, x in inputs_of(trunk).items()}
    out = trunk(**inputs, return_dict=False)[0]
    wanted = [*trunk.parameters(), *(x for x in inputs.values() if x.requires_grad)]
    return [out, *torch.autograd.grad((out * randn(*out.shape)).sum(), wanted)]


def same(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def processors(trunk):
    return {type(module.processor) for module in trunk.modules() if isinstance(module, Attention)}


# ---------------------------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("name", ["auto", "native"])
def test_native_is_diffusers_to_the_bit(stock, trunk, name):
    assert processors(stock) <= {JointAttnProcessor2_0, AttnProcessor2_0}
    set_attention_backend(trunk, name)
    assert processors(trunk) <= {attention.DispatchedJointAttnProcessor, attention.DispatchedAttnProcessor}
    expected = run(stock)
    assert same(run(trunk), expected)
    # Not a comparison of zeros: but nobody asks what SD3's text queries in the last block.
    assert sum(not x.any() for x in expected) <= 3 and expected[0].std() > 0.1


def test_every_attention_is_dispatched(trunk, monkeypatch):
    """By the backend that was chosen, as [B, N, heads, width of a head]."""
    calls = []
    dispatch = attention.dispatch_attention_fn
    monkeypatch.setattr(
        attention, "dispatch_attention_fn", lambda *x, **more: (calls.append(more), dispatch(*x, **more))[1]
    )
    set_attention_backend(trunk, "_native_math")
    calls.clear()
    trunk(**inputs_of(trunk))
    assert len(calls) == sum(isinstance(module, Attention) for module in trunk.modules()) >= 3
    assert all(call["backend"] is AttentionBackendName._NATIVE_MATH for call in calls)


def test_another_backend_rounds_otherwise(stock, trunk):
    set_attention_backend(trunk, "_native_math")
    found, expected = run(trunk), run(stock)
    assert not torch.equal(found[0], expected[0])
    for ours, theirs in zip(found, expected, strict=True):
        # An attention is a sum over at most 69 tokens of scores that are sums over 16 numbers, here in another order,
        # forward and backward; at most five of them follow each other, between layers of gain 1.
        assert (ours - theirs).norm() <= 2 * 5 * (69 + 16) * EPS * theirs.norm()
    set_attention_backend(trunk, "auto")
    assert same(run(trunk), expected)


@pytest.mark.parametrize("ndim", [3, 4])
@pytest.mark.parametrize("crossing", [False, True])
def test_what_a_unet_may_ask_of_its_attention(crossing, ndim):
    """Mask, group norm, norm of the prompt, query and key norms, residual and rescaling: all at once."""
    torch.manual_seed(0)
    stock = Attention(
        32,  # as many groups as a spatial norm has
        cross_attention_dim=10 if crossing else None,
        heads=2,
        dim_head=4,
        cross_attention_norm="layer_norm" if crossing else None,
        norm_num_groups=4,
        spatial_norm_dim=6 if ndim == 4 else None,
        qk_norm="layer_norm",
        residual_connection=True,
        rescale_output_factor=1.7,
        bias=True,
    )
    assert type(stock.processor) is AttnProcessor2_0
    found = copy.deepcopy(stock)
    set_attention_backend(found, "native")
    tokens = (randn(3, 32, 2, 3) if ndim == 4 else randn(3, 6, 32)).requires_grad_()
    prompt = randn(3, 5, 10, seed=2).requires_grad_() if crossing else None
    mask = torch.zeros(3, 1, 5 if crossing else 6)
    mask[0, 0, 2:] = -1e4
    results = []
    for module in (found, stock):
        more = {"temb": randn(3, 6, 2, 3, seed=4)} if ndim == 4 else {}
        out = module(tokens, encoder_hidden_states=prompt, attention_mask=mask, **more)
        wanted = [*module.parameters(), tokens, *([prompt] if crossing else [])]
        results.append([out, *torch.autograd.grad((out * randn(*out.shape)).sum(), wanted, allow_unused=True)])
    pairs = list(zip(*results, strict=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs) and results[0][0].std() > 0.1
    unmasked = stock(tokens, encoder_hidden_states=prompt, **more)
    assert not torch.equal(unmasked[0], results[0][0][0])  # the mask has something to do


# ------------------------------------------------------------------------------------- what must not be disturbed


def test_weights_and_names_stay(stock, trunk):
    before = trunk.state_dict(keep_vars=True)
    set_attention_backend(trunk, "native")
    set_attention_backend(trunk, "_native_math")
    after = trunk.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert [type(module) for module in trunk.modules()] == [type(module) for module in stock.modules()]


def test_projections_are_called_as_modules(stock, trunk):
    """Where hooks of ZeRO-3 and adapters of LoRA are."""
    set_attention_backend(trunk, "native")

    def called(trunk):
        names, hooks = [], []
        for name, module in trunk.named_modules():
            if isinstance(module, nn.Linear | nn.RMSNorm) or "norm_" in name:
                hooks.append(module.register_forward_hook(lambda *_, name=name: names.append(name)))
        trunk(**inputs_of(trunk))
        for hook in hooks:
            hook.remove()
        return names

    names = called(trunk)
    assert names == called(stock) and any(name.endswith("to_q") for name in names)


def test_the_rest_of_the_process_is_left_alone(trunk):
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()
    set_attention_backend(trunk, "_native_math")
    with pytest.raises(UserError):
        set_attention_backend(trunk, "flash_4_hub")
    assert registry.get_active_backend() == before


def test_random_numbers_are_left_alone(trunk):
    state = torch.random.get_rng_state()
    set_attention_backend(trunk, "auto")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_deep_copy_keeps_the_choice_and_has_its_own(stock, trunk):
    set_attention_backend(trunk, "_native_math")
    expected = run(trunk)
    twin = copy.deepcopy(trunk)
    set_attention_backend(trunk, "native")
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.zero_()
    assert same(run(twin), expected) and not torch.equal(expected[0], run(stock)[0])


@pytest.mark.parametrize("first", ["fused", "dispatched"])
def test_fusing_and_unfusing_keep_the_choice(first):
    torch.manual_seed(0)
    trunk = sd3()
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain = run(trunk)
    if first == "fused":
        fuse(trunk)
    set_attention_backend(trunk, "_native_math")
    expected = run(trunk)
    fuse(trunk)
    assert same(run(trunk), expected)
    unfuse(trunk)
    assert same(run(trunk), expected) and not torch.equal(plain[0], expected[0])


def test_a_copy_of_the_actor_critic_keeps_it(tiny_config, tiny_model):
    model = tiny_model(tiny_config())
    assert set_attention_backend(model.trunk, "_native_math") == "_native_math, as asked"
    twin = copy.deepcopy(model)
    for trunk in (model.trunk, twin.trunk):
        chosen = {module.processor._attention_backend for module in trunk.modules() if isinstance(module, Attention)}
        assert chosen == {AttentionBackendName._NATIVE_MATH}


def test_saved_folder_is_stock(tiny_pipeline, tmp_path):
    backbone = load_backbone(str(tiny_pipeline), 0)
    set_attention_backend(backbone.trunk, "_native_math")
    backbone.save(backbone.trunk.state_dict(), tmp_path / "saved")
    assert processors(load_backbone(str(tmp_path / "saved"), 0).trunk) == {JointAttnProcessor2_0}


def test_a_model_that_takes_a_backend_by_itself():
    trunk = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    before = {name: type(processor) for name, processor in trunk.attn_processors.items()}
    assert set_attention_backend(trunk, "_native_math") == "_native_math, as asked"
    assert {name: type(processor) for name, processor in trunk.attn_processors.items()} == before
    assert {p._attention_backend for p in trunk.attn_processors.values()} == {AttentionBackendName._NATIVE_MATH}


# ------------------------------------------------------------------------------------------------ what cannot be had


def test_in_words(trunk):
    assert set_attention_backend(trunk, "auto").startswith("native (auto): torch chooses among")
    assert set_attention_backend(trunk, "native") == "native, as asked"


def test_kernels_that_round_otherwise_before_a_gradient_are_seen(monkeypatch):
    heads, dtype = [(2, 8), (1, 16)], torch.float32
    monkeypatch.setattr(attention, "TOKENS", (5, 9))
    assert attention._rounds_alike(heads, torch.device("cpu"), dtype)
    attend = torch.nn.functional.scaled_dot_product_attention

    def other_kernel(query, key, value):
        found = attend(query, key, value)
        return found * (1 + torch.finfo(dtype).eps) if query.requires_grad and query.shape[-2] == 9 else found

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other_kernel)
    assert not attention._rounds_alike(heads, torch.device("cpu"), dtype)


def test_an_unknown_name(trunk):
    with pytest.raises(UserError, match='model.attention_backend = "natif": unknown.*did you mean "native"?') as raised:
        set_attention_backend(trunk, "natif")
    assert all(backend.value in str(raised.value) for backend in AttentionBackendName)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flash", "Please install `flash-attn"),
        ("xformers", "Please install `xformers"),
        ("sage", "Please install `sageattention"),
        ("_native_efficient", "No viable backend"),  # there is none for a CPU
        ("_native_cudnn", "No viable backend"),
    ],
)
def test_a_backend_that_does_not_run_here(stock, trunk, monkeypatch, name, reason):
    for package in ("FLASH", "XFORMERS", "SAGE"):
        monkeypatch.setattr(attention_dispatch, f"_CAN_USE_{package}_ATTN", False)
    with pytest.raises(UserError) as raised:
        set_attention_backend(trunk, name)
    why, others = str(raised.value).split(". These can: ")
    assert why.startswith(f'model.attention_backend = "{name}": cannot train this model on cpu in torch.float32: ')
    assert reason in why
    assert {'"auto"', "native", "_native_flash", "_native_math"} <= set(others.split(", "))
    assert name not in others.split(", ") and "hub" not in others and "flash" not in others.split(", ")
    assert processors(trunk) == processors(stock)


def test_a_backend_that_is_downloaded_without_a_network(trunk, monkeypatch):
    """The others of its kind are not tried to be downloaded in its place."""
    tried = []

    def download(backend):
        if backend.value.endswith("_hub"):
            tried.append(backend.value)
            raise OSError("Name or service not known")

    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
    monkeypatch.setattr(attention_dispatch, "_maybe_download_kernel_for_backend", download)
    expected = (
        "_flash_3_hub.*its kernels are downloaded from the Hugging Face Hub: OSError: Name or service not known. "
    )
    with pytest.raises(UserError, match=expected):
        set_attention_backend(trunk, "_flash_3_hub")
    assert tried == ["_flash_3_hub"]


def test_a_backend_without_a_gradient(trunk, monkeypatch):
    """As sage's, whose kernels know no backward: training would go on, with attention as a constant."""
    registry = attention_dispatch._AttentionBackendRegistry
    forward_only = lambda query, key, value: torch.zeros_like(query)  # noqa: E731
    monkeypatch.setitem(registry._backends, AttentionBackendName.XFORMERS, forward_only)
    monkeypatch.setitem(registry._supported_arg_names, AttentionBackendName.XFORMERS, {"query", "key", "value"})
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    with pytest.raises(UserError, match="xformers.*cannot train.*does not require grad"):
        set_attention_backend(trunk, "xformers")


def test_a_processor_that_takes_no_backend(trunk):
    trunk.set_attn_processor(AttnProcessor())
    with pytest.raises(UserError, match='"native": this model\'s AttnProcessor takes no backend; use "auto"'):
        set_attention_backend(trunk, "native")
    assert set_attention_backend(trunk, "auto") == "the model's own (AttnProcessor)"


def test_config_key(tiny_config, world, tmp_path):
    """The trunk that trains, and those that sample."""
    trainer = Trainer(tiny_config(model={"attention_backend": "_native_math"}), world, tmp_path)
    try:
        for model in (trainer.model, *trainer.rollout.models):
            attentions = [module for module in model.trunk.modules() if isinstance(module, Attention)]
            assert {a.processor._attention_backend for a in attentions} == {AttentionBackendName._NATIVE_MATH}
        assert trainer.attention == "_native_math, as asked"
    finally:
        trainer.engine.destroy()


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["joint", "self", "cross"])
@pytest.mark.parametrize("name", ["_native_cudnn", "_native_flash", "_native_efficient"])
def test_on_a_gpu(name, kind):
    """In bfloat16 close to native, with gradients; and a captured forward replays what the eager one computes."""
    torch.manual_seed(0)
    if kind == "joint":
        processor = JointAttnProcessor2_0()
        more = {"added_kv_proj_dim": 96, "context_pre_only": False, "qk_norm": "rms_norm", "processor": processor}
    else:
        more = {"cross_attention_dim": 96 if kind == "cross" else None}
    module = Attention(128, heads=2, dim_head=64, bias=True, **more).cuda().bfloat16()
    tokens, text = randn(3, 256, 128).cuda().bfloat16(), randn(3, 77, 96, seed=2).cuda().bfloat16()
    weights = randn(3, 256, 128, seed=3).cuda()

    def forward():
        out = module(tokens, encoder_hidden_states=None if kind == "self" else text)
        return out[0] if kind == "joint" else out

    def run():
        out = forward()
        used = [module.to_q.weight, module.to_k.weight, module.to_v.weight]
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), used)]

    set_attention_backend(module, "native")
    expected = run()
    set_attention_backend(module, name)
    for found, reference in zip(run(), expected, strict=True):
        # A handful of roundings to bfloat16, of 2^-9 each; scores, and what is left of their gradients after the
        # softmax's has cancelled, are less exact than that by a factor of ten at most.
        assert (found - reference).norm() <= 10 * 5 * 2**-9 * reference.norm() and found.any()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            captured = forward()
        tokens.copy_(randn(3, 256, 128, seed=4))
        graph.replay()
        assert torch.equal(captured, forward())
