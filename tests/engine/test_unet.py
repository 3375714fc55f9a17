"""The UNet adapter against stock diffusers: schedules, prompts, samples and folders; taps, ratio, ZeRO-3."""

import copy
import json
import logging
import shutil

import diffusers
import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_grad, z3_leaf_module
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.backbones.unet import UNetBackbone
from latent_critic.engine.errors import UserError
from latent_critic.engine.sharding import gather_state, set_learning_rates, shard
from latent_critic.engine.trainer import Trainer
from latent_critic.engine.transitions import trained_steps
from latent_critic.kernels.transition import transition_log_prob, transition_step

EPS = torch.finfo(torch.float32).eps
TEXTS = ["a red circle", "two blue squares", "a green triangle left of a yellow circle"]
STEPS = torch.tensor([981.0, 501.0, 1.0])
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None}
LEADING = {**BETAS, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
# scheduler_config.json of Stable Diffusion's own folders, and what others have made of them.
SD11 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", **LEADING}
SD15 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "clip_sample": False, **LEADING}
SD21 = {**LEADING, "_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"}
FOLDERS = {
    "1.1": SD11,
    "1.5": SD15,
    "2.1": SD21,
    "2.1 zero SNR": {**SD21, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "1.5 Euler": {**SD15, "_class_name": "EulerDiscreteScheduler"},
    "1.5 trailing, alpha 1": {**SD15, "timestep_spacing": "trailing", "set_alpha_to_one": True},
    "1.5 linspace": {**SD15, "timestep_spacing": "linspace"},
    "defaults": {"_class_name": "DDIMScheduler", **BETAS},  # clip_sample and steps_offset 0: the pipeline corrects both
}


@pytest.fixture(scope="module")
def backbone(tiny_unet_pipeline):
    return load_backbone(str(tiny_unet_pipeline), 0)


@pytest.fixture(scope="module")
def stock(tiny_unet_pipeline):
    """The stock pipeline with DDIM, which diffusers makes of the folder's own scheduler."""
    scheduler = DDIMScheduler.from_pretrained(tiny_unet_pipeline, subfolder="scheduler")
    pipe = StableDiffusionPipeline.from_pretrained(
        tiny_unet_pipeline, scheduler=scheduler, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def make(tiny_unet_pipeline, tiny_config, tiny_model):
    """make(section={...}) -> its actor-critic on the tiny UNet, with two rewards."""

    def build(**sections):
        return tiny_model(configure(tiny_config, tiny_unet_pipeline, **sections))

    return build


def configure(tiny_config, folder, **sections):
    model = {"pretrained": str(folder), **sections.pop("model", {})}
    rollout = {"transition": "ddim", "noise_level": 1.0, **sections.pop("rollout", {})}
    return tiny_config(model=model, rollout=rollout, **sections)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_parts(backbone, **parts):
    """A stock pipeline of the backbone's parts, but for these."""
    return StableDiffusionPipeline(**{**backbone.pipe.components, **parts}, requires_safety_checker=False)


def scheduled(backbone, config):
    """The adapter of a folder with such a scheduler, and the DDIM of a stock pipeline of that folder."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    ddim = DDIMScheduler.from_config(config)
    with_parts(backbone, scheduler=ddim)  # the pipeline corrects it
    return UNetBackbone(with_parts(backbone, scheduler=scheduler)), ddim


# ------------------------------------------------------------------------------------------------------------ folders


def test_reads_the_folder(backbone):
    assert isinstance(backbone, UNetBackbone)
    assert (backbone.latent_shape, backbone.depth, backbone.text_width) == ((4, 16, 16), 7, 64)
    assert [backbone.tap_width(i) for i in range(7)] == [16, 32, 32, 32, 32, 32, 16]
    assert backbone.default_taps() == [3, 4, 5] and backbone.width == 32
    frozen = (backbone.pipe.vae, backbone.pipe.text_encoder)
    assert not any(p.requires_grad or part.training for part in frozen for p in part.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in backbone.trunk.parameters())


def test_neither_loads_a_safety_checker_nor_speaks_of_it(tiny_unet_pipeline, tmp_path, caplog):
    """SD1.5's folder has one. Here its weights are missing, so that loading it would fail."""
    folder = tmp_path / "with-checker"
    shutil.copytree(tiny_unet_pipeline, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).addHandler(caplog.handler)
    try:
        backbone = load_backbone(str(folder), 0)
        backbone.save(backbone.trunk.state_dict(), tmp_path / "saved")
    finally:
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).removeHandler(caplog.handler)
    assert backbone.pipe.safety_checker is None and backbone.pipe.feature_extractor is None
    assert not caplog.messages


def test_a_folder_of_stable_diffusion_1_5(backbone):
    """Its UNet as diffusers builds it by default, without weights: tokens of the default taps, and widths of all."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    sd15 = UNetBackbone(with_parts(backbone, unet=unet))
    assert sd15.latent_shape == (4, 64, 64) and sd15.default_taps() == [4, 5, 6]
    shapes = []
    for index in range(sd15.depth):
        block, position = sd15.tap(unet, index)

        def keep(_block, _inputs, output, position=position):
            shapes.append(sd15.tokens(output if position is None else output[position]).shape)

        block.register_forward_hook(keep)
    latents, embeds = (torch.empty(shape, device="meta") for shape in ((2, 4, 64, 64), (2, 77, 768)))
    sd15.predict(unet, latents, torch.empty(2, device="meta"), {"prompt_embeds": embeds})
    assert [tuple(shapes[index]) for index in (4, 5, 6)] == [(2, 64, 1280), (2, 256, 1280), (2, 1024, 1280)]
    assert [shape[2] for shape in shapes] == [sd15.tap_width(index) for index in range(9)]


def test_saved_folder_is_a_stock_pipeline_with_the_given_trunk(tiny_unet_pipeline, stock, tmp_path):
    backbone = load_backbone(str(tiny_unet_pipeline), 0)
    before = {name: p.clone() for name, p in backbone.trunk.state_dict().items()}
    trained = {name: p + 0.02 * randn(*p.shape) for name, p in before.items()}
    backbone.save(trained, tmp_path / "saved")
    assert all(torch.equal(p, before[name]) for name, p in backbone.trunk.state_dict().items())
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "saved" / name).is_file()
    assert not list((tmp_path / "saved").rglob("*.bin"))

    scheduler = DDIMScheduler.from_pretrained(tmp_path / "saved", subfolder="scheduler")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", scheduler=scheduler)
    saved.set_progress_bar_config(disable=True)
    expected = with_parts(backbone, scheduler=stock.scheduler, unet=copy.deepcopy(backbone.trunk))
    expected.unet.load_state_dict(trained)
    expected.vae.to(memory_format=torch.contiguous_format)  # as it was saved
    call = dict(num_inference_steps=3, guidance_scale=1.0, latents=randn(3, 4, 16, 16))
    pictures, same, others = (np.stack(p(TEXTS, output_type="np", **call).images) for p in (saved, expected, stock))
    assert np.array_equal(pictures, same) and not np.allclose(pictures, others, atol=0.05)
    assert load_backbone(str(tmp_path / "saved"), 0).default_taps() == [3, 4, 5]


def test_saved_trunk_keeps_its_dtype(backbone, tmp_path):
    half = {name: p.to(torch.bfloat16) for name, p in backbone.trunk.state_dict().items()}
    backbone.save(half, tmp_path / "saved")
    found = load_file(tmp_path / "saved/unet/diffusion_pytorch_model.safetensors")
    assert found.keys() == half.keys()
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, half[name]) for name, p in found.items())


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [50, 30, 7])
@pytest.mark.parametrize("folder", FOLDERS)
def test_steps_are_the_stock_schedulers(backbone, folder, steps, eta):
    ours, ddim = scheduled(backbone, FOLDERS[folder])
    # In float64, so that the scheduler's own rounding (1 - ab / ab' cancels) does not hide ours.
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    ddim.set_timesteps(steps)
    table, timesteps = ours.schedule("ddim", eta, steps, num_trained_steps=steps)
    assert table.shape == (steps, 3) and timesteps.dtype == torch.float32
    assert timesteps.tolist() == ddim.timesteps.tolist()
    z = randn(2, 4, 8, 8)
    for k, t in enumerate(ddim.timesteps):
        v, noise = randn(2, 4, 8, 8, seed=2 * k + 1), randn(2, 4, 8, 8, seed=2 * k + 2)
        expected = ddim.step(v.double(), t, z.double(), eta=eta, variance_noise=noise.double()).prev_sample
        if ddim.alphas_cumprod[t] == 0 and eta == 1:
            # There x0 = -v, and s^2 = 1 - ab' leaves nothing for eps: the stock step takes the root of -1e-17 instead.
            next_alpha = ddim.alphas_cumprod[t - 1000 // steps]
            expected = (1 - next_alpha).sqrt() * noise.double() - next_alpha.sqrt() * v.double()
        z_next, _ = transition_step(v, z, noise, table, k)
        a, b, s = table[k].abs().tolist()
        # Three products, two sums and three rounded coefficients, at most half an ulp each of the magnitudes summed.
        bound = 4 * EPS * (a * z.abs() + b * v.abs() + s * noise.abs()).max().item()
        torch.testing.assert_close(z_next.double(), expected, rtol=0, atol=bound)
        z = z_next / z_next.std()  # far from data, predictions that are noise would let it grow
    if eta == 0.0:
        assert torch.equal(ours.schedule("ode", 0.7, steps).table, table)


def test_last_step_is_deterministic_unless_trained(backbone):
    table, _ = backbone.schedule("ddim", 1.0, 10)
    assert trained_steps(table).tolist() == [True] * 9 + [False]
    assert torch.equal(table[-1], backbone.schedule("ode", 0.0, 10).table[-1])
    assert trained_steps(backbone.schedule("ddim", 1.0, 10, 4).table).sum() == 4


def test_every_number_of_steps_has_a_schedule(backbone):
    """Some of diffusers' schedules leave the timesteps that exist: 61 trailing steps are 62, the last at -1."""
    for spacing in ("leading", "trailing", "linspace"):
        ours, _ = scheduled(backbone, {**SD15, "timestep_spacing": spacing})
        for steps in (1, 2, 61, 500, 501, 999):
            table, timesteps = ours.schedule("ddim", 1.0, steps)
            assert len(table) == len(timesteps) == steps and table.isfinite().all()
            assert timesteps.min() >= 0 and timesteps.max() <= 999
        with pytest.raises(UserError, match="rollout.num_inference_steps.*1000 is too many.* choose 999 at most"):
            ours.schedule("ddim", 1.0, 1000)


def test_what_has_no_table_is_refused(backbone):
    with pytest.raises(UserError, match='"flow-sde" does not fit a diffusion model; choose one of ddim, ode'):
        backbone.schedule("flow-sde", 0.7, 10)
    with pytest.raises(UserError, match="rollout.noise_level: must be between 0 and 1"):
        backbone.schedule("ddim", 1.5, 10)
    with pytest.raises(UserError, match="model.pretrained: .* thresholding"):
        scheduled(backbone, {**SD21, "thresholding": True})
    with pytest.raises(UserError, match='model.pretrained: .* prediction_type = "sample"'):
        scheduled(backbone, {**SD21, "prediction_type": "sample"})


# -------------------------------------------------------------------------------------------- prompts, trunk, pictures


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_stock_pipeline(backbone, stock):
    calls = []
    handle = backbone.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    found = backbone.encode_prompts(TEXTS)
    handle.remove()
    assert len(calls) == 1
    embeds, _ = stock.encode_prompt(TEXTS, "cpu", 1, do_classifier_free_guidance=False)
    assert found["prompt_embeds"].shape == (3, 12, 64) and torch.equal(found["prompt_embeds"], embeds)
    ends = [stock.tokenizer(text).input_ids.index(stock.tokenizer.eos_token_id) for text in TEXTS]
    assert torch.equal(backbone.pooled_text(found), embeds[range(3), ends]) and len(set(ends)) > 1
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert not backbone.pipe.text_encoder._forward_hooks


@torch.no_grad()
def test_trunk_takes_float_timesteps_as_the_stock_pipelines_integers(backbone, stock):
    conditioning, latents = backbone.encode_prompts(TEXTS), randn(3, 4, 16, 16)
    backbone.fuse()
    for t in (981, 1):
        found = backbone.predict(backbone.trunk, latents, torch.full((3,), float(t)), conditioning)
        expected = stock.unet(latents, torch.tensor(t), conditioning["prompt_embeds"]).sample
        assert torch.equal(found, expected) and 0.2 < found.std() < 5


@torch.no_grad()
def test_ode_draws_the_stock_pipelines_samples_and_pictures(backbone, stock):
    table, timesteps = backbone.schedule("ode", 0.0, 10)
    z = noise = randn(3, 4, 16, 16, seed=7)
    conditioning = backbone.encode_prompts(TEXTS)
    for k, t in enumerate(timesteps):
        v = backbone.predict(backbone.trunk, z, t.expand(3), conditioning)
        z, _ = transition_step(v, z, torch.zeros_like(z), table, k)
    call = dict(num_inference_steps=10, guidance_scale=1.0, latents=noise)
    expected = stock(TEXTS, output_type="latent", **call).images
    assert (z - noise).abs().mean() > 0.5
    # The same forwards. Table and scheduler round apart, by 6e-8 of the largest latent each and in each of ten steps,
    # which the last steps' predictions pass on: 1.2e-6 and a little more.
    torch.testing.assert_close(z, expected, rtol=0, atol=3e-6 * expected.abs().max().item())

    # Convolutions in another memory order, and latents that differ a little: a pixel in a thousand may round otherwise.
    pictures = backbone.decode(expected)
    assert pictures.dtype == torch.uint8 and pictures.shape == (3, 64, 64, 3)
    pil = torch.from_numpy(np.stack(stock(TEXTS, output_type="pil", **call).images))
    for ours in (pictures, backbone.decode(z)):
        difference = (ours.int() - pil.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 5e-3
    assert pictures.float().std() > 20 and pictures.unique().numel() > 200  # pictures, not a grey area


# ------------------------------------------------------------------------------------------------------- actor-critic


def inputs_of(model):
    return randn(3, 4, 16, 16), STEPS, model.backbone.encode_prompts(TEXTS)


def watch(model, index):
    """What the block returns, as a list that grows."""
    block, position = model.backbone.tap(model.trunk, index)
    seen = []
    block.register_forward_hook(lambda *call: seen.append(call[2] if position is None else call[2][position]))
    return seen


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("taps, sides", [("auto", (4, 8, 16)), ([1, 2], (4, 4)), ([6, 0], (16, 8))])
def test_critic_reads_the_pixels_of_its_blocks_as_tokens(make, taps, sides, guidance):
    model = make(critic={"taps": taps}, rollout={"guidance_scale": guidance})
    given = []
    model.critic.register_forward_pre_hook(lambda _critic, features, _others: given.extend(features), with_kwargs=True)
    seen = [watch(model, index) for index in model.tap_indices]
    prediction, values = model(*inputs_of(model), model.backbone.encode_prompts([""]))
    assert prediction.shape == (3, 4, 16, 16) and values.shape == (3, 2)
    assert prediction.dtype == values.dtype == torch.float32 and values.std() > 0.05
    width = model.backbone.tap_width(model.tap_indices[0])
    for tokens, (features,), side in zip(given, seen, sides, strict=True):
        assert features.shape == ((3 if guidance == 1.0 else 6), width, side, side)
        assert tokens.shape == (3, side * side, width) and tokens.stride(2) == 1
        assert torch.equal(tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2), features[-3:])  # with the prompt
    assert not any("tapped" in vars(block) for block in model.backbone.blocks(model.trunk))  # no activation is kept


def test_tokens_of_channels_last_features_are_not_copied(backbone):
    features = randn(2, 32, 8, 8)
    laid_out = features.to(memory_format=torch.channels_last)
    assert backbone.tokens(laid_out).data_ptr() == laid_out.data_ptr()
    assert torch.equal(backbone.tokens(laid_out), backbone.tokens(features))


def test_taps_of_several_widths_are_refused(make):
    with pytest.raises(UserError) as raised:
        make(critic={"taps": [5, 6]})
    assert str(raised.value) == (
        "critic.taps: [5, 6] - the critic reads one width, but block 5 is 32 wide, block 6 is 16 wide; "
        'use "auto" ([3, 4, 5]) or list blocks of one width (from block 0: 16, 32, 32, 32, 32, 32, 16)'
    )
    with pytest.raises(UserError, match=r"critic\.taps: \[7\] - this model has blocks 0 to 6"):
        make(critic={"taps": [7]})


@pytest.mark.parametrize("trunk", ["shared-detached", "shared"])
def test_value_loss_reaches_the_trunk_only_when_shared(make, trunk):
    model = make(critic={"trunk": trunk, "taps": [3, 4]})
    _, values = model(*inputs_of(model))
    values.square().sum().backward()
    reached = {n for n, p in model.trunk.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert all(bool(p.grad.any()) for p in model.critic.taps.parameters())
    if trunk == "shared-detached":
        assert not reached
    else:
        assert {"conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"} <= reached
        assert {"mid_block.resnets.1.conv2.weight", "up_blocks.0.upsamplers.0.conv.weight"} <= reached
        assert not any(name.startswith(("up_blocks.1", "up_blocks.2", "conv_out")) for name in reached)


def test_policy_loss_reaches_all_of_the_trunk_and_not_the_critic(make):
    model = make()
    prediction, _ = model(*inputs_of(model))
    prediction.square().sum().backward()
    assert all(p.grad is None for p in model.critic.parameters())
    assert all(bool(p.grad.any()) for p in model.trunk.parameters())


def sample(model, steps=4):
    """What a rollout does: latents [K + 1], log-probs [K] and the schedule."""
    schedule = model.backbone.schedule("ddim", 1.0, steps)
    latents, log_probs = [randn(3, 4, 16, 16)], []
    conditioning = model.backbone.encode_prompts(TEXTS)
    with torch.no_grad():
        for k, t in enumerate(schedule.timesteps):
            v, _ = model(latents[-1], t.expand(3), conditioning)
            z, log_prob = transition_step(v, latents[-1], randn(3, 4, 16, 16, seed=k + 1), schedule.table, k)
            latents.append(z)
            log_probs.append(log_prob)
    return latents, log_probs, schedule, conditioning


def test_ratio_of_a_fresh_batch_is_exactly_one(make):
    model = make()
    latents, log_probs, (table, timesteps), conditioning = sample(model)
    assert trained_steps(table).sum() == 3
    for k in range(3):
        v, _ = model(latents[k], timesteps[k].expand(3), conditioning)
        again = transition_log_prob(v, latents[k], latents[k + 1], table, k)
        assert torch.equal(again, log_probs[k]) and again.requires_grad


@torch.no_grad()
def test_a_deep_copy_has_weights_and_taps_of_its_own(make):
    model = make()
    inputs = inputs_of(model)
    expected = model(*inputs)
    twin = copy.deepcopy(model)
    assert twin.backbone is model.backbone and twin.trunk is not model.trunk
    for parameter in model.parameters():
        parameter += 0.01
    moved = model(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(twin(*inputs), expected, strict=True))
    assert not torch.equal(moved[0], expected[0]) and not torch.equal(moved[1], expected[1])


@torch.no_grad()
def test_a_step_reads_no_number_on_the_host(make):
    """Or a CUDA graph could not capture it. Fake tensors have no numbers to read."""
    model = make(rollout={"guidance_scale": 2.0})
    inputs = (*inputs_of(model), model.backbone.encode_prompts([""]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        latents, steps, *conditionings = inputs
        fake = [{name: mode.from_tensor(x) for name, x in conditioning.items()} for conditioning in conditionings]
        prediction, values = model(mode.from_tensor(latents), mode.from_tensor(steps), *fake)
    assert prediction.shape == (3, 4, 16, 16) and values.shape == (3, 2)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_replays_a_step(make):
    model = make().cuda()
    latents, steps, conditioning = inputs_of(model)
    static = latents.cuda(), steps.cuda(), {name: x.cuda() for name, x in conditioning.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model(*static)
    static[0].copy_(randn(3, 4, 16, 16, seed=1))
    static[1].copy_(STEPS.flip(0))
    for tensor in static[2].values():
        tensor.copy_(tensor.flip(0))
    graph.replay()
    expected = model(*static)
    for ours, eager in zip(found, expected, strict=True):
        # The same kernels on the same numbers, unless cuDNN chooses otherwise: float32 through some fifty layers.
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-4 * eager.abs().max().item())
        assert eager.std() > 0.05


# ----------------------------------------------------------------------------------------------------------- training


def loss_of(model, trajectory, train_policy):
    """PPO's in kind, at the second step: the log-probability of the action taken, and values."""
    latents, log_probs, (table, timesteps), conditioning = trajectory
    v, values = model(latents[1], timesteps[1].expand(3), conditioning)
    loss = (values - 1.0).square().mean()
    if train_policy:
        log_prob = transition_log_prob(v, latents[1], latents[2], table, 1)
        loss = loss - ((log_prob - log_probs[1]).exp() * torch.tensor([1.0, -2.0, 0.5])).sum()
    return loss


@pytest.mark.parametrize("trunk", ["shared-detached", "shared", "separate"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_training_under_zero3_equals_plain_pytorch(
    tiny_config, tiny_unet_pipeline, tiny_model, world, trunk, checkpointing
):
    """Each block is gathered and reduced as a whole, though its residuals come and go in tuples."""
    config = configure(tiny_config, tiny_unet_pipeline, critic={"trunk": trunk})
    options = config.optimizer
    reference, model = tiny_model(config), tiny_model(config)
    trajectory = sample(reference)
    start = copy.deepcopy(reference.state_dict())
    for part in model.trunks if checkpointing else ():
        part.enable_gradient_checkpointing()
    parts = (reference.policy_parameters, options.policy_lr), (reference.critic_parameters, options.critic_lr)
    groups = [{"params": parameters, "lr": lr} for parameters, lr in parts]
    optimizer = torch.optim.AdamW(groups, betas=options.betas, weight_decay=options.weight_decay)
    engine = shard(model, config, world)
    try:
        assert [z3_leaf_module(block) for block in model.backbone.blocks(model.trunk)] == [True] * 7
        for train_policy in (True, False, True):
            set_learning_rates(engine, options.policy_lr * train_policy, options.critic_lr)
            reference.trunk.requires_grad_(train_policy)
            engine.set_gradient_accumulation_boundary(True)
            loss, expected_loss = (loss_of(m, trajectory, train_policy) for m in (engine, reference))
            assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
            engine.backward(loss)
            expected_loss.backward()
            for (name, p), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
                if expected.grad is not None:
                    # Sums of some thousand float32 products, 2e-6 of the largest, of weights that agree to 1e-6.
                    difference = (safe_get_full_grad(p) - expected.grad).abs().max()
                    assert difference <= 3e-5 * expected.grad.abs().max(), name
            torch.nn.utils.clip_grad_norm_(reference.parameters(), options.gradient_clipping)
            engine.step()
            optimizer.step()
            optimizer.zero_grad()  # to None: what has no gradient rests
        found = gather_state(model)
    finally:
        engine.destroy()
    assert found.keys() == start.keys()
    for name, expected in reference.state_dict().items():
        # Adam's steps of 1e-4 (policy) and 1e-3 (critic), on gradients that agree to 3e-5. Where the gradient is
        # rounding noise alone, a step could differ by twice its rate: none is seen.
        assert (found[name] - expected).abs().max() < 1e-5, name
        # A critic's own trunk is not needed beyond the last block that is read.
        unused = name.startswith(tuple(f"critic_trunk.{part}" for part in ("up_blocks.2", "conv_norm_out", "conv_out")))
        assert unused or (found[name] - start[name]).abs().max() > 1.5e-5, name


def test_an_iteration_of_the_trainer(tiny_config, tiny_unet_pipeline, world, tmp_path):
    rollout = {"num_inference_steps": 3, "samples_per_iteration": 4}
    training = {"value_pretraining_iterations": 0, "updates_per_iteration": 2, "critic_epochs": 1}
    trainer = Trainer(configure(tiny_config, tiny_unet_pipeline, rollout=rollout, training=training), world, tmp_path)
    row = trainer.iterate(0)
    trainer.engine.destroy()
    assert (row["first_ratio"], row["first_ratio_deviation"], row["first_clipfrac"]) == (1.0, 0.0, 0.0)
    assert row["ratio_max_deviation"] > 0 and row["grad_norm/actor"] > 0 and row["grad_norm/critic"] > 0
