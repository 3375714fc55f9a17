"""Rollout: what is stored, the same samples however the work is cut, and ratio 1 for every transition."""

import copy
import threading

import pytest
import torch
from diffusers import DDIMScheduler

from latent_critic.engine.denoising import DenoisingLoop
from latent_critic.engine.noise import keyed_noise
from latent_critic.engine.prompt_cache import PromptCache
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.rollout import Rollout, one_ahead, rows
from latent_critic.engine.trajectory import concatenate
from latent_critic.engine.transitions import Schedule, ddim_table
from latent_critic.kernels import policy_loss, transition_log_prob

CPU = torch.device("cpu")
PROMPTS = [Prompt(text) for text in ("a red circle", "two blue squares", "a green triangle", "a red circle")] * 2
STEPS, SEED = 4, 11


def schedule(backbone, transition, noise_level):
    """ddim is a diffusion sampler: only its table is used, on a flow model's latents."""
    if transition == "ddim":
        scheduler = DDIMScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(STEPS)
        table = ddim_table(scheduler.alphas_cumprod, scheduler.timesteps, noise_level, "v_prediction")
        return Schedule(table, scheduler.timesteps.float())
    return backbone.schedule(transition, noise_level, STEPS)


@pytest.fixture
def sample(tiny_config, tiny_model):
    """draw(...) -> Trajectory, of one and the same model; draw.model is that model."""
    models = {}

    def draw(
        which=slice(0, 8),
        micro_batch_size=4,
        transition="flow-sde",
        noise_level=0.7,
        guidance=1.0,
        seed=SEED,
        model=None,
        **options,
    ):
        if guidance not in models:
            models[guidance] = tiny_model(tiny_config(rollout={"guidance_scale": guidance}))
        draw.model = model or models[guidance]
        backbone = models[guidance].backbone
        draw.encode = PromptCache(backbone, CPU)
        rollout = Rollout([draw.model], draw.encode, backbone.latent_shape, micro_batch_size, CPU)
        steps = schedule(backbone, transition, noise_level)
        return rollout(PROMPTS[which], torch.arange(100, 108)[which], schedule=steps, seed=seed, **options)

    return draw


def test_trajectory_holds_what_was_sampled(sample):
    found = sample()
    assert found.latents.shape == (8, STEPS + 1, 4, 16, 16)
    assert found.log_probs.shape == (8, STEPS) and found.values.shape == (8, STEPS, 2)
    assert {found.latents.dtype, found.log_probs.dtype, found.values.dtype} == {torch.float32}
    assert not found.latents.requires_grad and not found.values.requires_grad
    assert found.prompts == PROMPTS and found.sample_indices.tolist() == list(range(100, 108))
    assert {name: len(tensor) for name, tensor in found.conditioning.items()} == {
        "prompt_embeds": 8,
        "pooled_prompt_embeds": 8,
    }
    assert found.trained_steps == slice(0, STEPS - 1) and found.seed == SEED  # the last step is the ODE's
    assert torch.equal(found.log_probs[:, -1], torch.zeros(8))
    assert torch.equal(found.latents[:, 0], keyed_noise(SEED, found.sample_indices, 0, (4, 16, 16)))


def test_each_step_is_the_formula_with_its_own_noise(sample):
    """z' = a z + b v + s eps with draw k + 1, and log_prob = mean of -eps^2 / 2 - ln s - ln(2 pi) / 2."""
    found = sample(micro_batch_size=8)
    for k, (a, b, s) in enumerate(found.table.tolist()):
        z, z_next = found.latents[:, k], found.latents[:, k + 1]
        with torch.no_grad():
            v, values = sample.model(z, found.timesteps[k].expand(8), found.conditioning)
        noise = keyed_noise(SEED, found.sample_indices, k + 1, (4, 16, 16))
        expected = a * z.double() + b * v.double() + s * noise.double()
        # Three products and two sums in float32 of numbers up to 10.
        torch.testing.assert_close(z_next.double(), expected, rtol=0, atol=5 * 1.2e-7 * 10)
        torch.testing.assert_close(found.values[:, k], values, rtol=0, atol=0)
        if s > 0:
            log_prob = -noise.double().square().flatten(1).mean(1) / 2 - torch.tensor([s, 6.283185307179586]).log() @ (
                torch.tensor([1.0, 0.5])
            )
            # The noise is got back from latents that were rounded: 1e-6 / s each, averaged over 1024.
            torch.testing.assert_close(found.log_probs[:, k].double(), log_prob.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    "transition, noise_level", [("flow-sde", 0.7), ("dance-sde", 0.3), ("cps", 0.8), ("ddim", 1.0)]
)
def test_ratio_is_exactly_one_on_a_fresh_batch(sample, transition, noise_level, guidance):
    """With gradients, as the update computes it: to the last bit, for each trained step of each micro-batch."""
    found = sample(transition=transition, noise_level=noise_level, guidance=guidance)
    unconditional = sample.encode([""]) if guidance > 1 else None
    assert found.trained_steps == slice(0, STEPS - 1)
    for batch in (slice(0, 4), slice(4, 8)):
        for k in range(STEPS - 1):
            z, z_next = found.latents[batch, k], found.latents[batch, k + 1]
            prediction, values = sample.model(
                z, found.timesteps[k].expand(4), rows(found.conditioning, batch), unconditional
            )
            log_prob = transition_log_prob(prediction, z, z_next, found.table, k)
            assert log_prob.requires_grad
            ratio = (log_prob - found.log_probs[batch, k]).exp()
            assert torch.equal(ratio, torch.ones(4))
            assert torch.equal(values, found.values[batch, k])
            _, statistics = policy_loss(log_prob, found.log_probs[batch, k], torch.ones(4), 1e-4)
            assert (statistics.ratio, statistics.clipfrac, statistics.max_ratio_deviation) == (1, 0, 0)


def test_ratio_notices_a_changed_policy(sample):
    """What ratio 1 means: the smallest optimizer step is seen."""
    found = sample()
    changed = copy.deepcopy(sample.model.trunk)
    changed.proj_out.bias.data.add_(1e-4)
    z, conditioning = found.latents[:4, 0], rows(found.conditioning, slice(0, 4))
    with torch.no_grad():
        prediction = sample.model.backbone.predict(changed, z, found.timesteps[0].expand(4), conditioning)
    log_prob = transition_log_prob(prediction, found.latents[:4, 0], found.latents[:4, 1], found.table, 0)
    assert bool((log_prob != found.log_probs[:4, 0]).all())


def close(left, right):
    """A batch of another size sums matrix products in other blocks: 1e-6 relative a forward, enlarged by the trunk's
    gain (about 5) at each of four steps at worst, and latents of up to 10. Log-probs average 1024 such errors, over s.
    """
    torch.testing.assert_close(left.latents, right.latents, rtol=0, atol=2e-4)
    torch.testing.assert_close(left.values, right.values, rtol=0, atol=2e-4)
    torch.testing.assert_close(left.log_probs, right.log_probs, rtol=0, atol=2e-5)
    assert torch.equal(left.latents[:, 0], right.latents[:, 0])
    assert torch.equal(left.sample_indices, right.sample_indices) and left.prompts == right.prompts


@pytest.mark.parametrize("micro_batch_size, guidance", [(1, 1.0), (3, 1.0), (8, 1.0), (2, 2.0)])
def test_micro_batch_size_does_not_matter(sample, micro_batch_size, guidance):
    expected = sample(guidance=guidance)
    assert expected.latents[0, -1].sub(expected.latents[3, -1]).abs().mean() > 0.1  # same prompt, another sample
    close(sample(micro_batch_size=micro_batch_size, guidance=guidance), expected)


def test_ranks_together_draw_what_one_draws(sample):
    """Two ranks, each with its half of the samples and micro-batches of the same shape: equal to the last bit."""
    whole = sample()
    parts = concatenate([sample(slice(0, 4)), sample(slice(4, 8))])
    assert torch.equal(parts.latents, whole.latents)
    assert torch.equal(parts.log_probs, whole.log_probs) and torch.equal(parts.values, whole.values)
    assert all(torch.equal(parts.conditioning[name], whole.conditioning[name]) for name in whole.conditioning)
    assert parts.prompts == whole.prompts and torch.equal(parts.sample_indices, whole.sample_indices)
    assert parts.seed == whole.seed == SEED
    assert torch.equal(parts.table, whole.table) and torch.equal(parts.timesteps, whole.timesteps)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_features_are_those_that_the_critic_read(sample, guidance):
    """Of each sample and step, with the prompt; what is drawn is the same, and nothing is kept unless asked for."""
    kept, plain = (sample(guidance=guidance, keep_features=keep) for keep in (True, False))
    assert torch.equal(kept.latents, plain.latents) and torch.equal(kept.values, plain.values)
    assert plain.features == [] and len(kept.features) == len(sample.model.tap_indices)
    unconditional = sample.encode([""]) if guidance > 1 else None
    for k in range(STEPS):
        inputs = kept.latents[:, k], kept.timesteps[k].expand(8), kept.conditioning, unconditional
        with torch.no_grad():
            _, _, *expected = sample.model(*inputs, with_features=True)
        for tap, features in zip(kept.features, expected, strict=True):
            assert torch.equal(tap[:, k], features)


def test_seed_changes_every_sample(sample):
    difference = (sample().latents - sample(seed=SEED + 1).latents).flatten(2).abs().mean(-1)
    assert bool((difference > 0.1).all())


def test_side_by_side_draws_the_same(sample, tiny_config):
    """Two modules over the same weights, a thread each; the last micro-batch is short."""
    expected = sample(micro_batch_size=3)
    backbone, encode = sample.model.backbone, sample.encode
    keep = {id(parameter): parameter for parameter in sample.model.parameters()}
    models = [sample.model, copy.deepcopy(sample.model, keep)]
    rollout = Rollout(models, encode, backbone.latent_shape, 3, CPU)
    steps = schedule(backbone, "flow-sde", 0.7)
    seen = {}
    for _ in range(3):  # the threads take turns as they like
        found = rollout(PROMPTS, torch.arange(100, 108), schedule=steps, seed=SEED, finished=seen.__setitem__)
        for name in ("latents", "log_probs", "values", "sample_indices"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert found.prompts == expected.prompts
        assert {start: len(part.latents) for start, part in seen.items()} == {0: 3, 3: 3, 6: 2}
        assert all(torch.equal(part.latents, found.latents[start : start + 3]) for start, part in seen.items())
    assert len(rollout._loops) <= 2 and all(loop.schedule is steps for loop in rollout._loops.values())


def test_one_thread_that_fails_stops_the_others(sample):
    steps = sample() and schedule(sample.model.backbone, "flow-sde", 0.7)
    calls = []

    class Broken(torch.nn.Module):
        guidance_scale, reward_names, trunk = 1.0, ["a", "b"], sample.model.trunk
        backbone = sample.model.backbone

        def forward(self, *inputs, **options):
            calls.append(1)
            raise RuntimeError("no memory for the trunk")

    rollout = Rollout([Broken(), Broken()], sample.encode, sample.model.backbone.latent_shape, 1, CPU)
    with pytest.raises(RuntimeError, match="no memory for the trunk"):
        rollout(PROMPTS, torch.arange(8), schedule=steps, seed=SEED)
    assert 1 <= len(calls) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("rollout", "one-ahead"))]


def test_what_cannot_be_captured_runs_from_python(sample, monkeypatch, capsys):
    expected = sample(micro_batch_size=4)
    backbone, steps = sample.model.backbone, schedule(sample.model.backbone, "flow-sde", 0.7)

    def refuse(loop, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")

    init = DenoisingLoop.__init__

    def on_a_gpu(self, *inputs, **options):
        init(self, *inputs[:7], **options)
        if len(inputs) > 7 and inputs[7] != "off":
            self._capture(None)

    monkeypatch.setattr(DenoisingLoop, "__init__", on_a_gpu)
    monkeypatch.setattr(DenoisingLoop, "_capture", refuse)
    rollout = Rollout([sample.model], sample.encode, backbone.latent_shape, 4, CPU, graph="step")
    capsys.readouterr()
    for _ in range(2):
        found = rollout(PROMPTS, torch.arange(100, 108), schedule=steps, seed=SEED)
        assert torch.equal(found.latents, expected.latents)
    reason = "a step cannot be captured: operation not permitted when stream is capturing"
    assert capsys.readouterr().err == f"rollouts run without a CUDA graph: {reason}\n"  # once, one line


def test_loops_are_kept_by_sampler_and_guidance(sample):
    backbone = sample() and sample.model.backbone
    rollout = Rollout([sample.model], sample.encode, backbone.latent_shape, 4, CPU)
    sde, ode = schedule(backbone, "flow-sde", 0.7), backbone.schedule("ode", 0.0, 6)
    for steps, guidance, loops in ((sde, None, 1), (ode, None, 2), (sde, 1.0, 2), (ode, 2.0, 3), (ode, 2.0, 3)):
        found = rollout(PROMPTS, torch.arange(8), schedule=steps, seed=SEED, guidance_scale=guidance)
        assert found.latents.shape[1] == len(steps.timesteps) + 1 and len(rollout._loops) == loops
    rollout.close()
    assert not rollout._loops


def test_one_ahead():
    """Order, what is made beside the one in use, and an error that comes where its item would have."""
    made = [threading.Event() for _ in range(3)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number
        raise RuntimeError("the last one fails")

    found = one_ahead(items())
    assert next(found) == 0
    assert made[1].wait(60) and not made[2].is_set()  # one ahead, though nobody has asked for it; and no more
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(RuntimeError, match="the last one fails"):
        next(found)
    assert list(one_ahead(iter([]))) == []
