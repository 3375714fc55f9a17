"""SDXL, FLUX.1 and FLUX.2 klein against stock diffusers: prompts, schedules, samples, pictures, folders, resolutions;
what the critic reads, and the ratio. `model.resolution` of SD3 and SD1.5 too."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latent_critic.engine.actor_critic import ActorCritic
from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.backbones.flux import FluxBackbone
from latent_critic.engine.backbones.flux2 import Flux2Backbone
from latent_critic.engine.backbones.sdxl import SDXLBackbone
from latent_critic.engine.config import CriticConfig
from latent_critic.engine.errors import UserError
from latent_critic.engine.transitions import trained_steps
from latent_critic.kernels.transition import transition_log_prob, transition_step

from . import families
from .families import FLUX2_KLEIN, FLUX_DEV, FLUX_SCHNELL, SDXL_BASE

EPS = torch.finfo(torch.float32).eps
TEXTS = ["a red circle", "two blue squares", "a green triangle left of a yellow circle"]
NAMES = ("sdxl", "flux-dev", "flux-schnell", "flux2")
T5_TOKENS, QWEN_TOKENS, CLIP_TOKENS = 16, 48, 12  # the longest text is 42 tokens of Qwen's
LENGTHS = {
    "sdxl": 0,
    "flux-dev": T5_TOKENS,
    "flux-schnell": T5_TOKENS,
    "flux2": QWEN_TOKENS,
    "sd1": 0,
    "sd3": T5_TOKENS,
}
BUILDERS = {
    "sdxl": families.sdxl,
    "flux-dev": families.flux,
    "flux-schnell": lambda folder: families.flux(folder, guidance_embeds=False),
    "flux2": families.flux2,
}
# scheduler_config.json of Stable Diffusion 3.5 medium and large, and of what SD3 may be with FLUX's shifts.
SD35 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLOWS = {
    "SD3.5": ("sd3", SD35, 64),
    "SD3, dynamic": ("sd3", FLUX_DEV, 64),
    "FLUX.1-dev": ("flux-dev", FLUX_DEV, 64),
    "FLUX.1-dev, 4096 tokens": ("flux-dev", FLUX_DEV, 512),
    "FLUX.1-schnell": ("flux-schnell", FLUX_SCHNELL, 64),
    "FLUX.2-klein": ("flux2", FLUX2_KLEIN, 64),
    "FLUX.2-klein, 4096 tokens": ("flux2", FLUX2_KLEIN, 512),
    "FLUX.2-klein, 4356 tokens": ("flux2", FLUX2_KLEIN, 528),  # from 4300 tokens on mu goes by another rule
}
DIFFUSIONS = {
    "SDXL base": SDXL_BASE,
    "SDXL-Turbo": {**SDXL_BASE, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "no offset": {**SDXL_BASE, "steps_offset": 0},  # SDXL's pipeline, unlike SD1's, leaves it
    "v-prediction": {**SDXL_BASE, "prediction_type": "v_prediction"},
}


class Family:
    """The engine's adapter at 64 x 64 pixels, and the stock pipeline on the same folder."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.stock = stock_pipeline(folder)
        self.backbone = self.load(64)
        self.trunk = getattr(self.stock, self.backbone.trunk_name)
        # All blocks of the widest width: of SDXL one down, the mid, one up.
        taps = [i for i in range(self.backbone.depth) if self.backbone.tap_width(i) == self.backbone.width]
        self.model = actor_critic(self.backbone, taps)

    def load(self, resolution=None):
        return load_backbone(str(self.folder), LENGTHS[self.name], resolution)

    def noise(self):
        return randn(3, *self.backbone.latent_shape, seed=7)


@pytest.fixture(scope="module")
def built(request, tmp_path_factory):
    """built(name) -> Family, made once."""
    made = {}

    def build(name):
        if name not in made:
            if name in BUILDERS:
                BUILDERS[name](folder := tmp_path_factory.mktemp(name) / name)
            else:
                folder = request.getfixturevalue({"sd1": "tiny_unet_pipeline", "sd3": "tiny_pipeline"}[name])
            made[name] = Family(name, folder)
        return made[name]

    return build


@pytest.fixture(params=NAMES)
def family(built, request):
    return built(request.param)


def stock_pipeline(folder):
    """With DDIM where it is a diffusion model, made of the folder's own scheduler as diffusers makes it."""
    parts = {}
    if (folder / "unet").is_dir():
        parts["scheduler"] = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def actor_critic(backbone, taps="auto"):
    torch.manual_seed(1)
    model = ActorCritic(backbone, CriticConfig(dim=32, num_heads=2, taps=taps), ["one", "two"]).eval()
    for head in model.critic.heads:
        nn.init.normal_(head[-1].weight)  # heads start at zero
    return model


def edited(folder, copy, **index):
    """A copy of a folder, its model_index.json changed."""
    shutil.copytree(folder, copy)
    path = copy / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    return copy


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layout(pipe, latents):
    """How the stock pipeline walks: the call's arguments for such latents, and its own way back to their layout."""
    count, channels, height, width = latents.shape
    size = height * pipe.vae_scale_factor
    if isinstance(pipe, FluxPipeline):
        packed = pipe._pack_latents(latents, count, channels, height, width)
        call = {"latents": packed, "height": size, "width": size}
        return call, lambda z: pipe._unpack_latents(z, size, size, pipe.vae_scale_factor)
    if isinstance(pipe, Flux2KleinPipeline):
        ids = pipe._prepare_latent_ids(latents)
        call = {"latents": latents, "height": 2 * size, "width": 2 * size}  # of patches
        return call, lambda z: pipe._unpack_latents_with_ids(z, ids, height, width)
    return {"latents": latents, "height": size, "width": size}, lambda z: z


def draw(family, noise, steps=4, guidance=1.0, output="pil", pipe=None):
    """The stock pipeline's latents [K], in the engine's layout, and its pictures."""
    pipe = pipe or family.stock
    call, unpacked = layout(pipe, noise)
    if LENGTHS[family.name]:
        call["max_sequence_length"] = LENGTHS[family.name]
    if family.name == "flux-schnell":  # not distilled from guidance: it can have the plain one, and has no scale
        call |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(noise)}
    latents = []

    def keep(_pipe, _step, _t, now):
        latents.append(unpacked(now["latents"]))
        return {}

    call |= {"guidance_scale": guidance, "num_inference_steps": steps, "output_type": output}
    pictures = pipe(prompt=TEXTS, callback_on_step_end=keep, **call).images
    return latents, pictures if output == "latent" else np.stack(pictures)


def sample(model, noise, transition="ode", noise_level=0.0, steps=4, guidance=1.0):
    """What a rollout does: latents [K + 1], log-probs [K] and the schedule."""
    schedule = model.backbone.schedule(transition, noise_level, steps)
    latents, log_probs = [noise], []
    conditionings = [model.backbone.encode_prompts(texts) for texts in (TEXTS, [""])]
    with torch.no_grad():
        for k, t in enumerate(schedule.timesteps):
            v, _ = model(latents[-1], t.expand(3), *conditionings, guidance)
            z, log_prob = transition_step(v, latents[-1], randn(*noise.shape, seed=k), schedule.table, k)
            latents.append(z)
            log_probs.append(log_prob)
    return latents, log_probs, schedule, conditionings


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    "name, kind, shape, own_shape, depth, width, text_width, taps",
    [
        ("sdxl", SDXLBackbone, (4, 16, 16), (4, 16, 16), 7, 32, 32, [3, 4]),
        ("flux-dev", FluxBackbone, (4, 16, 16), (4, 128, 128), 4, 48, 64, [0, 2, 3]),
        ("flux-schnell", FluxBackbone, (4, 16, 16), (4, 128, 128), 4, 48, 64, [0, 2, 3]),
        ("flux2", Flux2Backbone, (16, 8, 8), (16, 64, 64), 4, 48, 96, [0, 2, 3]),
    ],
)
def test_reads_the_folder(built, name, kind, shape, own_shape, depth, width, text_width, taps):
    backbone = built(name).backbone
    assert type(backbone) is kind
    assert backbone.latent_shape == shape and built(name).load().latent_shape == own_shape
    assert (backbone.depth, backbone.width, backbone.text_width) == (depth, width, text_width)
    assert backbone.default_taps() == taps and len(backbone.blocks(backbone.trunk)) == depth
    assert backbone.is_guidance_distilled == (name == "flux-dev")
    parts = [part for part in backbone.pipe.components.values() if isinstance(part, nn.Module)]
    frozen = [part for part in parts if part is not backbone.trunk]
    assert set(backbone.encoders) == {*frozen} - {backbone.pipe.vae} and len(frozen) == 2 + (name != "flux2")
    assert not any(p.requires_grad or part.training for part in frozen for p in part.parameters())
    assert all(p.requires_grad for p in backbone.trunk.parameters())
    assert all(
        p.dtype == torch.float32
        for part in parts
        for p in (*part.parameters(), *part.buffers())
        if p.is_floating_point()
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("sdxl", {"force_zeros_for_empty_prompt": False}),
        ("flux-dev", {}),
        ("flux-schnell", {}),
        ("flux2", {"is_distilled": True}),
    ],
)
@torch.no_grad()
def test_saved_folder_is_a_stock_pipeline_with_the_given_trunk_and_options(built, name, options, tmp_path):
    family = built(name)
    folder, saved = edited(family.folder, tmp_path / "edited", **options), tmp_path / "saved"
    backbone = load_backbone(str(folder), LENGTHS[name], 64)
    before = family.trunk.state_dict()
    trained = {name: p + 0.02 * randn(*p.shape) for name, p in before.items()}
    pictures = []
    handle = backbone.pipe.vae.decoder.register_forward_hook(lambda _decoder, _inputs, output: pictures.append(output))
    backbone.trunk.load_state_dict(trained)
    noise = family.noise()
    backbone.decode(sample(actor_critic(backbone), noise)[0][-1])
    handle.remove()

    backbone.trunk.load_state_dict(before)
    backbone.save(trained, saved)
    assert all(torch.equal(p, before[name]) for name, p in backbone.trunk.state_dict().items())
    assert json.loads((saved / "model_index.json").read_text()) == json.loads((folder / "model_index.json").read_text())
    assert not list(saved.rglob("*.bin"))

    stock = stock_pipeline(saved)
    assert options.items() <= dict(stock.config).items()
    found = getattr(stock, backbone.trunk_name).state_dict()
    assert found.keys() == trained.keys() and all(torch.equal(p, trained[name]) for name, p in found.items())

    _, drawn = draw(family, noise, output="np", pipe=stock)
    _, others = draw(family, noise, output="np")
    ours = (pictures[0] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    # Latents that agree to 1e-6 of their size, a decoder in another memory order: 2e-6 on a scale of 1, and room.
    assert np.abs(ours - drawn).max() < 1e-5 and not np.allclose(drawn, others, atol=0.05)


def test_a_scheduler_without_betas_is_refused(built, tmp_path):
    folder = edited(built("sdxl").folder, tmp_path / "edm", scheduler=["diffusers", "EDMEulerScheduler"])
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(UserError, match="model.pretrained: its scheduler is EDMEulerScheduler, whose noise levels"):
        load_backbone(str(folder), 0)


@pytest.mark.parametrize("name, encoder", [("flux-dev", "FLUX.1 needs T5"), ("flux2", "FLUX.2 needs Qwen3")])
def test_flux_without_text_tokens_is_refused(built, name, encoder):
    with pytest.raises(UserError, match=f"model.max_sequence_length = 0: {encoder}'s tokens"):
        load_backbone(str(built(name).folder), 0, 64)


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_are_encoded_as_by_the_stock_pipeline(family):
    backbone, stock, length = family.backbone, family.stock, LENGTHS[family.name]
    found = backbone.encode_prompts(TEXTS)
    with torch.no_grad():
        if family.name == "sdxl":
            embeds, _, pooled, _ = stock.encode_prompt(TEXTS, do_classifier_free_guidance=False)
            assert found.keys() == {"prompt_embeds", "pooled_prompt_embeds", "time_ids"}
            assert found["time_ids"].tolist() == [[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 3
        elif family.name == "flux2":
            embeds, _ = stock.encode_prompt(TEXTS, max_sequence_length=length)
            own = [stock.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in TEXTS]
            counts = [len(tokens["input_ids"]) for tokens in own]
            assert counts == [len(text) + 2 for text in TEXTS] and max(counts) < length
            pooled = torch.stack([row[:count].mean(0) for row, count in zip(embeds, counts, strict=True)])
        else:
            embeds, pooled, _ = stock.encode_prompt(TEXTS, None, max_sequence_length=length)
    assert embeds.shape == (3, length or CLIP_TOKENS, 96) and embeds.std() > 0.5
    assert torch.equal(found["prompt_embeds"], embeds)
    found_pooled = backbone.pooled_text(found)
    if family.name == "flux2":
        # Sums of 48 products, of numbers up to 20: another order of addition rounds them apart by a few ulps of 20.
        torch.testing.assert_close(found_pooled, pooled, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found_pooled, pooled)
    assert found_pooled.shape == (3, backbone.text_width) and found_pooled.std(0).min() > 1e-3
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in found.values())
    assert not any(encoder._forward_hooks or encoder._forward_pre_hooks for encoder in backbone.encoders)


def test_sdxl_encodes_the_empty_prompt_as_the_folder_has_it(built, tmp_path):
    """Zeros by default, as the stock pipeline's other side of guidance without a negative prompt."""
    family = built("sdxl")
    plain = edited(family.folder, tmp_path / "plain", force_zeros_for_empty_prompt=False)
    for backbone, stock, zeros in (
        (family.backbone, family.stock, True),
        (load_backbone(str(plain), 0), stock_pipeline(plain), False),
    ):
        with torch.no_grad():
            _, embeds, _, pooled = stock.encode_prompt(TEXTS, do_classifier_free_guidance=True)
        found = backbone.encode_prompts(["", "", ""])
        assert torch.equal(found["prompt_embeds"], embeds) and torch.equal(found["pooled_prompt_embeds"], pooled)
        assert all(found[name].any() != zeros for name in ("prompt_embeds", "pooled_prompt_embeds"))
        mixed, full = backbone.encode_prompts(["", *TEXTS[1:]]), backbone.encode_prompts(TEXTS)
        assert all(torch.equal(mixed[name][1:], full[name][1:]) for name in mixed)


def test_flux2_pools_the_text_without_its_padding(built):
    backbone = built("flux2").backbone
    longer = Flux2Backbone(backbone.pipe, 2 * QWEN_TOKENS, 64).encode_prompts(TEXTS)
    found = backbone.encode_prompts(TEXTS)
    assert longer["prompt_embeds"].shape[1] == 2 * QWEN_TOKENS
    # Attention over more keys, masked ones, may sum in another order: a few ulps of numbers up to 20.
    torch.testing.assert_close(backbone.pooled_text(longer), backbone.pooled_text(found), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("flow", FLOWS)
def test_flow_steps_are_the_stock_pipelines(built, monkeypatch, flow, steps):
    """The stock pipeline walks with random predictions, so that 4096 tokens cost no forward."""
    name, config, resolution = FLOWS[flow]
    family = built(name)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    stock = type(family.stock)(**{**family.stock.components, "scheduler": scheduler})
    stock.set_progress_bar_config(disable=True)
    adapter = type(family.backbone)(family.backbone.with_parts(scheduler=scheduler), LENGTHS[name], resolution)
    noise = randn(3, *adapter.latent_shape)
    call, unpacked = layout(stock, noise)
    predictions, conditions = [], []

    def forward(timestep, **_):
        predictions.append(randn(*call["latents"].shape, seed=len(predictions) + 1))
        if name == "flux2":
            predictions[-1] = stock._pack_latents(predictions[-1])
        conditions.append(timestep[0] if name == "sd3" else 1000 * timestep[0])
        return (predictions[-1],)

    monkeypatch.setattr(family.trunk, "forward", forward)
    latents, _ = draw(family, noise, steps, output="latent", pipe=stock)
    table, timesteps = adapter.schedule("ode", 0.0, steps)
    assert len(latents) == len(predictions) == len(table) == steps
    # sigma times 1000, and for FLUX divided and multiplied again: half an ulp each.
    torch.testing.assert_close(timesteps, torch.stack(conditions), rtol=2 * EPS, atol=0)
    for k, (z, v, expected) in enumerate(zip([noise, *latents], map(unpacked, predictions), latents, strict=False)):
        found, _ = transition_step(v, z, torch.zeros_like(z), table, k)
        # On either side a product, a sum and the rounded length of the step, at most half an ulp each.
        bound = 3 * EPS * (z.abs() + (table[k, 1] * v).abs()).max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["flux-dev", "flux2"])
@torch.no_grad()
def test_a_bfloat16_trunk_is_told_the_stock_pipelines_times(built, monkeypatch, name):
    """It is told a thousandth, which it rounds again: some steps differ if it is a thousandth of a float32."""
    family = built(name)
    conditioning = {part: x.bfloat16() for part, x in family.backbone.encode_prompts(TEXTS).items()}
    latents = family.noise().bfloat16()
    times = []

    def forward(hidden_states, timestep, **_):
        times.append((1000 * timestep.bfloat16()).tolist())
        return (torch.zeros_like(hidden_states, dtype=torch.bfloat16),)

    monkeypatch.setattr(family.trunk, "forward", forward)
    call, _ = layout(family.stock, latents)
    text = conditioning if name == "flux-dev" else {"prompt_embeds": conditioning["prompt_embeds"]}
    family.stock(**text, **call, guidance_scale=1.0, num_inference_steps=28, output_type="latent")
    expected = [*times]
    times.clear()
    for t in family.backbone.schedule("ode", 0.0, 28).timesteps:
        family.backbone.predict(forward, latents, t.expand(3), conditioning)
    assert times == expected and len(times) == 28


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [50, 30, 7])
@pytest.mark.parametrize("folder", DIFFUSIONS)
def test_sdxl_steps_are_the_stock_schedulers(built, folder, steps, eta):
    config, parts = DIFFUSIONS[folder], built("sdxl").backbone.pipe.components
    ddim = DDIMScheduler.from_config(config)
    StableDiffusionXLPipeline(**{**parts, "scheduler": ddim})  # which could correct it
    kind = getattr(diffusers, config["_class_name"])
    ours = SDXLBackbone(StableDiffusionXLPipeline(**{**parts, "scheduler": kind.from_config(config)}))
    # In float64, so that the scheduler's own rounding (1 - ab / ab' cancels) does not hide ours.
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    ddim.set_timesteps(steps)
    table, timesteps = ours.schedule("ddim", eta, steps, num_trained_steps=steps)
    assert table.shape == (steps, 3) and timesteps.tolist() == ddim.timesteps.tolist()
    z = randn(2, 4, 8, 8)
    for k, t in enumerate(ddim.timesteps):
        v, noise = randn(2, 4, 8, 8, seed=2 * k + 1), randn(2, 4, 8, 8, seed=2 * k + 2)
        expected = ddim.step(v.double(), t, z.double(), eta=eta, variance_noise=noise.double()).prev_sample
        z_next, _ = transition_step(v, z, noise, table, k)
        a, b, s = table[k].abs().tolist()
        # Three products, two sums and three rounded coefficients, at most half an ulp each of the magnitudes summed.
        bound = 4 * EPS * (a * z.abs() + b * v.abs() + s * noise.abs()).max().item()
        torch.testing.assert_close(z_next.double(), expected, rtol=0, atol=bound)
        z = z_next / z_next.std()  # far from data, predictions that are noise would let it grow
    if eta == 0.0:
        assert torch.equal(ours.schedule("ode", 0.7, steps).table, table)


# ------------------------------------------------------------------------------------------------- samples, pictures


def assert_same_pictures(found, expected):
    """Convolutions in another memory order, latents that differ by 1e-6: a pixel in a thousand may round otherwise."""
    difference = (found.int() - torch.from_numpy(expected).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert found.float().std() > 20 and found.unique().numel() > 200  # pictures, not a grey area


def bound_of(name, guidance, expected):
    """0 where both sides are the same forwards and the same float32 steps.

    DDIM's table and the stock scheduler round apart, by 6e-8 of the largest latent each and in each of four steps.
    Guidance is one forward of six samples here, and two of three there (but in SDXL): matrix products of another shape
    round by some ulps otherwise, 2 g - 1 = 3 times that in the guided prediction. The next steps pass both on.
    """
    exact = name not in ("sdxl", "sd1") and (guidance == 1.0 or name == "flux-dev")
    return 0.0 if exact else 2e-6 * expected.abs().max().item()


@torch.no_grad()
def test_prediction_depends_on_all_that_the_trunk_is_given(family):
    """Or the other tests here would say little."""
    latents, steps, conditioning = inputs_of(family)

    def predict(latents, steps, **parts):
        return family.backbone.predict(family.backbone.trunk, latents, steps, {**conditioning, **parts})

    before = predict(latents, steps)
    given = {name: part.flip(0) for name, part in conditioning.items() if name != "time_ids"}
    if family.name == "sdxl":
        given["time_ids"] = conditioning["time_ids"] + torch.tensor([16.0, 0, 0, 0, 0, 0])
    if family.name == "flux2":
        del given["pooled_prompt_embeds"]  # for the critic alone
    changed = {name: predict(latents, steps, **{name: part}) for name, part in given.items()}
    changed |= {"latents": predict(latents.flip(0), steps), "steps": predict(latents, steps.flip(0))}
    assert 0.2 < before.std() < 5
    for name, prediction in changed.items():
        assert (prediction - before)[0].abs().mean() > 0.02, name


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_ode_draws_the_stock_pipelines_samples_and_pictures(family, guidance):
    """At guidance 2 FLUX.1-dev takes it as an input, the others have the empty prompt beside."""
    noise = family.noise()
    expected, pictures = draw(family, noise, guidance=guidance)
    found, *_ = sample(family.model, noise, guidance=guidance)
    for ours, theirs in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound_of(family.name, guidance, theirs))
    assert (found[-1] - noise).abs().mean() > 0.5
    for ours in (family.backbone.decode(expected[-1]), family.backbone.decode(found[-1])):
        assert ours.dtype == torch.uint8 and ours.shape == (3, 64, 64, 3)
        assert_same_pictures(ours, pictures)


@pytest.mark.parametrize("name", ["flux-dev", "flux2"])
def test_guidance_changes_the_pictures(built, name):
    model, noise = built(name).model, built(name).noise()
    one, more = (sample(model, noise, guidance=guidance)[0][-1] for guidance in (1.0, 3.5))
    assert (one - more).abs().mean() > 0.05


def test_a_distilled_model_needs_no_unconditional_branch(built):
    for name in NAMES:
        backbone = built(name).backbone
        assert [backbone.needs_unconditional(guidance) for guidance in (1.0, 3.5)] == [False, name != "flux-dev"]
    family = built("flux-dev")
    latents, steps, conditioning = inputs_of(family)
    seen = []
    handle = family.backbone.trunk.register_forward_pre_hook(
        lambda _trunk, _inputs, named: seen.append(named["guidance"]), with_kwargs=True
    )
    with torch.no_grad():
        family.model(latents, steps, conditioning, guidance_scale=3.5)
    handle.remove()
    assert [guidance.tolist() for guidance in seen] == [[3.5, 3.5, 3.5]]


# ------------------------------------------------------------------------------------------------------- resolutions


@pytest.mark.parametrize(
    "name, shape",
    [
        ("sd1", (4, 8, 8)),
        ("sd3", (4, 8, 8)),
        ("sdxl", (4, 8, 8)),
        ("flux-dev", (4, 8, 8)),
        ("flux-schnell", (4, 8, 8)),
        ("flux2", (16, 4, 4)),
    ],
)
def test_ode_at_another_resolution_draws_the_stock_pipelines_samples_and_pictures(built, name, shape):
    family = built(name)
    backbone = family.load(32)
    assert backbone.latent_shape == shape
    noise = randn(3, *shape)
    expected, pictures = draw(family, noise)
    found, *_ = sample(actor_critic(backbone), noise)
    torch.testing.assert_close(found[-1], expected[-1], rtol=0, atol=bound_of(name, 1.0, expected[-1]))
    ours = backbone.decode(found[-1])
    assert ours.shape == (3, 32, 32, 3)
    assert_same_pictures(ours, pictures)


@pytest.mark.parametrize(
    "name, resolution, unit, nearest",
    [
        ("sd1", 62, "4, the pixels of this model's latent", "60 or 64"),
        ("sd3", 60, "8, the pixels of this model's patch", "56 or 64"),
        ("sdxl", 62, "4, the pixels of this model's latent", "60 or 64"),
        ("flux-dev", 60, "8, the pixels of this model's patch", "56 or 64"),
        ("flux2", 60, "8, the pixels of this model's patch", "56 or 64"),
    ],
)
def test_a_resolution_of_no_whole_patches_is_refused(built, name, resolution, unit, nearest):
    with pytest.raises(UserError) as raised:
        built(name).load(resolution)
    assert str(raised.value) == f"model.resolution = {resolution}: must be a multiple of {unit}; nearest: {nearest}"


def test_sd3_refuses_a_resolution_beyond_its_table_of_positions(built):
    with pytest.raises(UserError, match="model.resolution = 72: at most 64, which this model's table of positions"):
        built("sd3").load(72)


# ------------------------------------------------------------------------------------------------------- actor-critic


def inputs_of(family):
    return family.noise(), torch.tensor([981.0, 501.0, 1.0]), family.backbone.encode_prompts(TEXTS)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_critic_reads_the_image_tokens_of_its_blocks_in_raster_order(family, guidance):
    backbone, model = family.backbone, family.model
    given, seen, embedded, noise = [], [], [], family.noise()
    handles = [
        block.register_forward_hook(lambda _block, _inputs, output: seen.append(output))
        for block in backbone.blocks(model.trunk)
    ]
    handles.append(
        model.critic.register_forward_pre_hook(
            lambda _critic, features, _others: given.extend(features), with_kwargs=True
        )
    )
    if family.name != "sdxl":
        embedder = model.trunk.x_embedder
        handles.append(embedder.register_forward_pre_hook(lambda _embedder, inputs: embedded.extend(inputs)))
    prediction, values = model(*inputs_of(family), backbone.encode_prompts([""]), guidance)
    for handle in handles:
        handle.remove()
    assert prediction.shape == noise.shape and values.shape == (3, 2) and values.std() > 0.05
    assert prediction.dtype == values.dtype == torch.float32
    assert len(seen) == backbone.depth and len(given) == len(model.tap_indices)
    for index, tokens in zip(model.tap_indices, given, strict=True):
        assert tokens.stride(2) == 1 and tokens.shape[::2] == (3, backbone.tap_width(index))
        features = seen[index]
        if family.name == "sdxl":
            features = features[0] if isinstance(features, tuple) else features
            features = features.permute(0, 2, 3, 1).flatten(1, 2)
        elif isinstance(features, tuple):
            assert [part.shape[1] for part in features] == [LENGTHS[family.name], 64]
            features = features[1]
        else:  # text in front
            assert features.shape[1] == LENGTHS[family.name] + 64
            features = features[:, LENGTHS[family.name] :]
        assert len(features) == (6 if backbone.needs_unconditional(guidance) else 3)
        assert torch.equal(tokens, features[-3:])  # with the prompt
    if family.name != "sdxl":
        side = 1 if family.name == "flux2" else 2  # latents of a token
        for token in (0, 1, 8, 29, 63):
            row, column = divmod(token, 8)
            patch = noise[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert torch.equal(embedded[0][-3:, token], patch.flatten(1))
    assert not any("tapped" in vars(block) for block in backbone.blocks(model.trunk))  # no activation is kept


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_ratio_of_a_fresh_batch_is_exactly_one(family, guidance):
    sampler = ("ddim", 1.0) if family.name == "sdxl" else ("flow-sde", 0.7)
    latents, log_probs, (table, timesteps), conditionings = sample(
        family.model, family.noise(), *sampler, guidance=guidance
    )
    assert trained_steps(table).tolist() == [True, True, True, False]
    for k in range(3):
        v, _ = family.model(latents[k], timesteps[k].expand(3), *conditionings, guidance)
        again = transition_log_prob(v, latents[k], latents[k + 1], table, k)
        assert torch.equal(again, log_probs[k]) and again.requires_grad


def test_policy_loss_reaches_all_of_the_trunk_and_not_the_critic(family):
    prediction, _ = family.model(*inputs_of(family), guidance_scale=1.0)
    prediction.square().sum().backward()
    try:
        assert all(bool(p.grad.any()) for p in family.backbone.trunk.parameters())
        assert all(p.grad is None for p in family.model.critic.parameters())
    finally:
        family.model.zero_grad()


@torch.no_grad()
def test_a_step_reads_no_number_on_the_host(family):
    """Or a CUDA graph could not capture it. Fake tensors have no numbers to read."""
    latents, steps, conditioning = inputs_of(family)
    conditionings = conditioning, family.backbone.encode_prompts([""])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [{name: mode.from_tensor(x) for name, x in part.items()} for part in conditionings]
        prediction, values = family.model(mode.from_tensor(latents), mode.from_tensor(steps), *fake, 2.0)
    assert prediction.shape == latents.shape and values.shape == (3, 2)
