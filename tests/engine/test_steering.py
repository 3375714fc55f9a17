"""Steering of stock pipelines by a critic from its file: DiT and UNet, flow and DDIM."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latent_critic.engine.backbones import backbone_of
from latent_critic.engine.checkpoint import export
from latent_critic.engine.critic_file import load_critic
from latent_critic.engine.errors import UserError
from latent_critic.engine.prompt_cache import PromptCache
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.reward_stats import RunningStandardizer
from latent_critic.engine.rewards import build_rewards
from latent_critic.engine.rollout import Rollout
from latent_critic.engine.steering import SMC, BestOfN, Guidance, GuidanceCallback, Steerer, steer

PROMPTS = ["a red circle", "two blue squares", "a green triangle"]
CPU = torch.device("cpu")
KINDS = {
    "flow-sde": ("tiny_pipeline", {"transition": "flow-sde", "num_inference_steps": 6}),
    "ddim": ("tiny_unet_pipeline", {"transition": "ddim", "noise_level": 1.0, "num_inference_steps": 6}),
}


@pytest.fixture(params=KINDS)
def run(request, tiny_config, tiny_model, tmp_path):
    """A pipeline and the critic.safetensors of a run, by the export of a run; run.config is its configuration."""
    folder, rollout = KINDS[request.param]
    return make_run(request.getfixturevalue(folder), rollout, tiny_config, tiny_model, tmp_path)


def make_run(folder, rollout, tiny_config, tiny_model, path, **changes):
    config = tiny_config(model={"pretrained": str(folder)}, rollout=rollout, **changes)
    model = tiny_model(config)
    standardizer = RunningStandardizer(2)
    standardizer.update(torch.tensor([[-5.0, 0.2], [-3.0, 0.8]]))
    export(path, model, config, path, state=standardizer.state_dict())

    class Run:
        critic = path / "critic.safetensors"

        @staticmethod
        def pipe(**options) -> DiffusionPipeline:
            return DiffusionPipeline.from_pretrained(folder, **options)

    Run.config, Run.model = config, model
    return Run


def draw(run, pipe=None, **options):
    """Prompts are as long as the critic's were: this pipeline's own are longer, and so are those of its first test."""
    return steer(pipe or run.pipe(), run.critic, PROMPTS, seed=5, **options)


def steerer(run, **options) -> Steerer:
    backbone = backbone_of(run.pipe(), 0)
    return Steerer(backbone, load_critic(run.critic, backbone), CPU, **options)


def near(left, right):
    """But for rounding: some CPUs round products of fewer than four rows (`LEAST`) in another way than larger ones'.
    Latents and values are of order 5, and six steps carry a few units in the last place on; levels of a picture are
    whole numbers."""
    apart = (left.double() - right.double()).abs()
    return bool((apart <= (1 if left.dtype == torch.uint8 else 1e-4)).all())


def test_without_steering_it_is_a_rollout(run):
    """To the bit, and near in batches of another size; so is guidance of scale 0."""
    model = run.model
    rollout = Rollout([model], PromptCache(model.backbone, CPU), model.backbone.latent_shape, 3, CPU)
    options = run.config.rollout
    schedule = model.backbone.schedule(options.transition, options.noise_level, options.num_inference_steps)
    expected = rollout([Prompt(text) for text in PROMPTS], torch.arange(3), schedule=schedule, seed=5)
    found = draw(run)
    assert torch.equal(found.latents, expected.latents[:, -1])
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.images, model.backbone.decode(found.latents))
    guided, others = draw(run, guidance=Guidance(0.0)), draw(run, batch_size=2)
    assert torch.equal(guided.latents, found.latents) and torch.equal(guided.images, found.images)
    assert near(others.latents, found.latents) and near(others.images, found.images)
    assert (found.cost.forwards, found.cost.backwards, found.cost.decoded) == (18, 0, 3)


def test_the_gradient_is_that_of_finite_differences(run):
    """In float64, through trunk and head, along random directions. diffusers' RMSNorm, of SD3's queries and keys,
    computes in float32 whatever its input: differences of values are good to 1e-7 there, so h is large and the formula
    of fourth order."""
    at = steerer(run)
    model = at.critic.model.double()
    z = torch.randn(2, *model.backbone.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conditioning = {name: x.double() for name, x in at.encode(PROMPTS[:2]).items()}
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64)

    def value(z):
        found = model(z, torch.tensor([700.0, 300.0]), conditioning)[1]
        assert found.dtype == torch.float64
        return found @ weights

    z.requires_grad_()
    (gradient,) = torch.autograd.grad(value(z).sum(), z)
    for seed in range(3):
        along = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1 + seed))
        h = 1e-2  # an error of h^4, 1e-8, beside roundings of 1e-7 / h, 1e-5
        values = {i: value(z.detach() + i * h * along) for i in (-2, -1, 1, 2)}
        slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
        assert torch.allclose(slope, (gradient * along).flatten(1).sum(1), rtol=1e-4, atol=1e-5)
    assert gradient.abs().max() > 1e-3


def test_a_little_guidance_raises_the_next_value(run):
    """Above it falls, below 0 it rises: the value that the next step finds, by a step that is otherwise the same."""
    at, scale = steerer(run, num_inference_steps=20), 1e-2
    conditioning = at.encode(PROMPTS)
    model, (table, timesteps) = at.critic.model, at.schedule
    weights = at.weights
    z = torch.randn(3, *model.backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    rises = []
    for k in range(6, 14):
        here, there = (timesteps[i].expand(3) for i in (k, k + 1))
        z = z.detach().requires_grad_()
        v, values = model(z, here, conditioning)
        (gradient,) = torch.autograd.grad((values @ weights).sum(), z)
        v, z = v.detach(), z.detach()
        a, b, _ = table[k]
        found = []
        with torch.no_grad():
            for guidance in (Guidance(-scale), Guidance(0.0), Guidance(scale)):
                steered = guidance(v, gradient, model.backbone.per_score(timesteps)[k])
                found.append(model(a * z + b * steered, there, conditioning)[1] @ weights)
            rises.append(torch.stack([found[1] - found[0], found[2] - found[1]]))
            z = a * z + b * v
    rises = torch.stack(rises)  # [steps, 2, prompts]
    assert bool((rises.mean((0, 2)) > 0).all()) and (rises > 0).float().mean() > 0.9
    # Small changes are linear: as much below as above.
    assert torch.allclose(rises[:, 0].sum(), rises[:, 1].sum(), rtol=0.1)


def test_guidance_moves_what_it_says(run):
    """Values along a steered trajectory rise over unsteered ones; a window leaves the steps outside of it alone; a
    normalised gradient has a root mean square of 1."""
    plain, up, down = draw(run), draw(run, guidance=Guidance(0.3)), draw(run, guidance=Guidance(-0.3))
    late = draw(run, guidance=Guidance(0.3, start=3, end=5))
    weights = torch.ones(2)
    means = [(found.values @ weights).mean(0)[-1].item() for found in (down, plain, up)]
    assert means[0] < means[1] < means[2]
    assert torch.equal(late.values[:, :4], plain.values[:, :4])  # step 3 is the first that moves a latent
    assert not torch.equal(late.latents, plain.latents)
    assert (up.cost.forwards, up.cost.backwards, late.cost.backwards) == (18, 18, 6)
    gradient = torch.randn(2, 4, 3, 3) * torch.tensor([1e-3, 50.0])[:, None, None, None]
    moved = Guidance(2.0, normalize=True)(torch.zeros(2, 4, 3, 3), gradient, torch.tensor(-0.5))
    assert torch.allclose(moved.square().mean((1, 2, 3)).sqrt(), torch.ones(2))


def test_best_of_n(run):
    """Every particle is a sample of its own, the first the unsteered one; the best by value is kept."""
    plain, best = draw(run), draw(run, particles=BestOfN(4), batch_size=5)
    assert torch.equal(best.potentials.argmax(1), best.chosen) and best.potentials.std(1).min() > 0
    assert near(best.potentials[:, 0], plain.potentials[:, 0])
    first = best.chosen == 0
    assert near(best.latents[first], plain.latents[first])
    pruned = draw(run, particles=BestOfN(4, prune={1: 2, 3: 1}), batch_size=12)
    assert pruned.cost.forwards == 3 * (2 * 4 + 2 * 2 + 2 * 1) and pruned.potentials.shape == (3, 1)
    every = draw(run, particles=BestOfN(4), batch_size=4).potentials
    assert all((row - value).abs().min() < 1e-4 for row, value in zip(every, pruned.potentials[:, 0], strict=True))


def test_best_of_n_by_reward(run, monkeypatch):
    """The kept picture is the one of the highest reward, standardised and weighted as in training."""
    rewards = build_rewards(run.config.rewards)
    units = load_critic(run.critic, backbone_of(run.pipe(), 0))
    for count in (1, 3):
        best = draw(run, particles=BestOfN(count, by="reward"))
        assert (best.cost.decoded, best.cost.scored) == (3 * count, 3 * count)
        scores = torch.tensor([reward.score(best.images, PROMPTS, [{}] * 3) for reward in rewards])
        expected = units.standardize(scores.T).sum(1)
        assert torch.allclose(best.potentials.max(1).values, expected, atol=1e-4)
    assert units.mean.tolist() == pytest.approx([-4.0, 0.5]) and units.std.tolist() == pytest.approx([1.0, 0.3])
    pruned = draw(run, particles=BestOfN(4, by="reward", prune={3: 2}), batch_size=12)  # by the pictures of step 3
    assert (pruned.cost.scored, pruned.potentials.shape) == (12 + 6, (3, 2))
    every = draw(run, particles=BestOfN(4, by="reward"), batch_size=12).potentials
    monkeypatch.setattr(Steerer, "_judge", lambda self, z, v, timestep: torch.tensor([0.0, 3.0, 1.0, 2.0]).repeat(3))
    left = draw(run, particles=BestOfN(4, by="reward", prune={3: 2}), batch_size=12).potentials
    assert near(left, every[:, [1, 3]])


def test_smc(run):
    found = draw(run, particles=SMC(4, scale=20.0, every=2), batch_size=4)
    assert found.ancestors.shape == (6, 3, 4) and found.potentials.shape == (3, 4)
    moved = (found.ancestors != torch.arange(4)).any(2).any(1)
    assert moved.tolist() == [False, False, True, False, True, False]
    again = draw(run, particles=SMC(4, scale=20.0, every=2), batch_size=12)  # other batches, a short one among them
    assert torch.equal(again.latents, found.latents) and torch.equal(again.ancestors, found.ancestors)
    by_reward = draw(run, particles=SMC(4, every=3, by="reward"), batch_size=12)
    assert by_reward.cost.scored == 12 + 12  # at step 3, and in the end
    kept = draw(run, particles=SMC(4, scale=20.0, every=2, keep="reward"), batch_size=12)
    assert torch.equal(kept.ancestors, found.ancestors) and (kept.cost.decoded, kept.cost.scored) == (12, 12)
    guided = draw(run, particles=SMC(4, scale=20.0, every=2), guidance=Guidance(0.3))
    assert guided.cost.backwards == guided.cost.forwards == 3 * 4 * 6
    assert guided.values[:, -1].sum() > found.values[:, -1].sum()
    with pytest.raises(UserError, match="would stay alike"):
        draw(run, particles=SMC(4), transition="ode")


def test_weights_are_changed_without_training(run):
    """By the names of rewards; the trained ones are the default."""
    both, first = draw(run, particles=BestOfN(2)), draw(run, particles=BestOfN(2), weights={"composition": 2.0})
    same = draw(run, particles=BestOfN(2), weights={"composition": 1.0, "jpeg_compressibility": 1.0})
    assert torch.equal(same.potentials, both.potentials)
    chosen = first.values[:, -1, 1] * 2
    assert torch.allclose(first.potentials.max(1).values, chosen, atol=1e-6)
    with pytest.raises(UserError, match="no value of beauty; it has jpeg_compressibility, composition"):
        draw(run, weights={"beauty": 1.0})


def test_the_pipeline_stays_as_it_was(run):
    pipe = run.pipe()
    trunk = pipe.components["unet" if "unet" in pipe.components else "transformer"]
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    call |= {} if isinstance(pipe, StableDiffusionPipeline) else {"max_sequence_length": 0}
    pipe.set_progress_bar_config(desc="mine")

    def stock():
        torch.manual_seed(0)
        return pipe(PROMPTS[0], **call).images

    before = stock()
    draw(run, pipe)
    assert torch.equal(stock(), before)
    assert not any(module._forward_hooks for module in trunk.modules())
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_callback_of_a_stock_pipeline(run):
    """Values at the end rise and fall with the scale; 0 changes no bit."""
    pipe = run.pipe()
    call = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent"}
    if isinstance(pipe, StableDiffusionPipeline):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    else:
        call["max_sequence_length"] = 0

    def end(callback):
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        options = {} if callback is None else {"callback_on_step_end": callback}
        return pipe(PROMPTS, generator=generators, **call, **options).images

    plain = end(None)
    found = {}
    for scale in (-0.3, 0.0, 0.3):
        callback = GuidanceCallback(pipe, run.critic, PROMPTS, Guidance(scale, start=1))
        latents = end(callback)
        last = pipe.scheduler.timesteps[-1].float().expand(3)
        found[scale] = (callback.model(latents, last, callback.conditioning)[1].sum().item(), latents)
        callback.close()
    assert torch.equal(found[0.0][1], plain)
    assert found[-0.3][0] < found[0.0][0] < found[0.3][0]
    callback = GuidanceCallback(pipe, run.critic, PROMPTS, Guidance(1.0, start=9))
    with pytest.raises(UserError, match="guidance from step 9 to 6"):
        end(callback)
    if not isinstance(pipe, StableDiffusionPipeline):  # the call's own noise levels, which the callback leaves alone
        call |= {"num_inference_steps": None, "sigmas": [1.0, 0.7, 0.3]}
        plain = end(None)
        assert torch.equal(end(GuidanceCallback(pipe, run.critic, PROMPTS, Guidance(0.0))), plain)
        assert not torch.equal(end(GuidanceCallback(pipe, run.critic, PROMPTS, Guidance(0.3))), plain)


def test_what_does_not_fit_is_said(tiny_config, tiny_model, tiny_pipeline, tiny_unet_pipeline, tmp_path):
    folder, rollout = tiny_pipeline, KINDS["flow-sde"][1]
    run = make_run(folder, rollout, tiny_config, tiny_model, tmp_path)

    def refused(words, pipe=None, critic=run.critic, **options):
        with pytest.raises(UserError, match=words):
            steer(pipe or run.pipe(), critic, options.pop("prompts", PROMPTS), **options)

    refused("no such file", critic=tmp_path / "nothing.safetensors")
    refused("its header has no critic", critic=folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"not one")
    refused("not a safetensors file", critic=tmp_path / "damaged.safetensors")
    refused("no prompt was given", prompts=[])
    refused("guidance from step 4 to 9: there are steps 0 to 5", guidance=Guidance(1.0, start=4, end=9))
    refused("guidance from step 3 to 2", guidance=Guidance(1.0, start=3, end=2))
    refused("prune: after step 5; steps are 0 to 5, and after the last all end", particles=BestOfN(2, prune={5: 1}))
    pipe = run.pipe()
    flow, pipe.scheduler = pipe.scheduler, DDIMScheduler()
    refused("StableDiffusion3Pipeline has a DDIMScheduler; give it a FlowMatchEulerDiscreteScheduler", pipe)
    unet = DiffusionPipeline.from_pretrained(tiny_unet_pipeline)
    refused(r"trained on .*tiny-pipeline.*, which this model is not like: critic\.taps: .* block", unet)
    unet = StableDiffusionPipeline(**{**unet.components, "scheduler": flow}, requires_safety_checker=False)
    refused("its scheduler is FlowMatchEulerDiscreteScheduler, whose noise levels are not Stable Diffusion's", unet)
    other = make_run(folder, rollout, tiny_config, tiny_model, tmp_path / "pixels", critic={"trunk": "pixels"})
    refused("a critic on pixels has no gradient", critic=other.critic)


def test_taps_that_do_not_exist(tiny_config, tiny_model, tiny_pipeline, tmp_path):
    """A critic of a deeper model of the same width."""
    run = make_run(tiny_pipeline, KINDS["flow-sde"][1], tiny_config, tiny_model, tmp_path)
    with safe_open(run.critic, "pt") as file:
        about = file.metadata()
    save_file(load_file(run.critic), run.critic, {**about, "taps": "[0, 1, 23]"})
    with pytest.raises(UserError, match="this model is not like: critic.taps: .* has blocks 0 to 2"):
        draw(run)


def test_a_trunk_of_its_own(tiny_config, tiny_model, tiny_pipeline, tmp_path):
    """It is read from beside the file, and its gradient steers."""
    run = make_run(tiny_pipeline, KINDS["flow-sde"][1], tiny_config, tiny_model, tmp_path, critic={"trunk": "separate"})
    plain, up = draw(run), draw(run, guidance=Guidance(0.3))
    assert up.values[:, -1].sum() > plain.values[:, -1].sum()
    (tmp_path / "critic_trunk").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="critic_trunk: not there"):
        draw(run)


def test_what_is_given_as_it_was_trained_changes_nothing(tiny_config, tiny_model, tiny_pipeline, tmp_path):
    """Only the first two steps of six add noise; with other steps there is no such number to go by."""
    rollout = KINDS["flow-sde"][1] | {"num_trained_steps": 2}
    run = make_run(tiny_pipeline, rollout, tiny_config, tiny_model, tmp_path)
    plain, settings = draw(run), run.config.rollout
    for name in ("transition", "noise_level", "num_inference_steps"):
        assert torch.equal(draw(run, **{name: getattr(settings, name)}).latents, plain.latents)
    assert not torch.equal(draw(run, noise_level=0.6).latents, plain.latents)


def test_cost_is_of_the_samples_that_were_asked_for(run):
    """Three prompts, two in a batch: neither what fills up the second batch nor what warms a loop up is counted."""
    options = {"guidance": Guidance(0.1), "batch_size": 4}
    by_value = draw(run, particles=BestOfN(2), **options).cost
    assert (by_value.forwards, by_value.backwards, by_value.decoded, by_value.scored) == (36, 36, 3, 0)
    by_reward = draw(run, particles=SMC(2, every=2, by="reward"), **options).cost
    assert (by_reward.forwards, by_reward.decoded, by_reward.scored) == (36, 18, 18)  # at steps 2 and 4, and the end


@pytest.mark.parametrize("about", [{"name": "os:getcwd"}, {"name": "vlm_judge", "params": {"base_url": "http://x"}}])
def test_a_strangers_file_runs_no_code_and_calls_no_server(tiny_config, tiny_model, tiny_pipeline, tmp_path, about):
    run = make_run(tiny_pipeline, KINDS["flow-sde"][1], tiny_config, tiny_model, tmp_path)
    with safe_open(run.critic, "pt") as file:
        header = file.metadata()
    own = json.loads(header["rewards"])
    save_file(load_file(run.critic), run.critic, {**header, "rewards": json.dumps([about, own[1]])})
    with pytest.raises(UserError, match=f"names the reward {about['name']}, which runs code or calls a server"):
        draw(run, particles=BestOfN(2, "reward"))
    draw(run, particles=BestOfN(2))  # judged by value it needs none
    assert draw(run, particles=BestOfN(2, "reward"), rewards=run.config.rewards).cost.scored == 6


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["step", "loop"])
def test_captured_steps_are_those_from_python(run, graph):
    """Best-of-N with pruning, and SMC, whose resampling is inside of the graph."""
    pipe = run.pipe().to("cuda")
    for particles in (BestOfN(4, prune={2: 2}), SMC(4, scale=20.0), SMC(4, scale=20.0, every=2)):
        eager, captured = (draw(run, pipe, particles=particles, graph=how) for how in ("off", graph))
        assert torch.equal(eager.latents, captured.latents) and torch.equal(eager.chosen, captured.chosen)
        assert eager.ancestors is None or torch.equal(eager.ancestors, captured.ancestors)
