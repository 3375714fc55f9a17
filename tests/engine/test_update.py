"""Optimizer steps under DeepSpeed ZeRO-3 against plain PyTorch: losses, weights, rests, and what is refused."""

import copy
import dataclasses
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch.distributions import Normal, kl_divergence

from latent_critic.engine.errors import TrainingError
from latent_critic.engine.inference_copy import InferenceCopy
from latent_critic.engine.passes import EnginePasses, SideBySidePasses
from latent_critic.engine.prompt_cache import PromptCache
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.rollout import Rollout, rows
from latent_critic.engine.sharding import gather_state, shard
from latent_critic.engine.transitions import Schedule, ddim_table
from latent_critic.engine.trunk_clock import TrunkClock
from latent_critic.engine.update import Updater, parts_of

CPU = torch.device("cpu")
PROMPTS = [Prompt(text) for text in ("a red circle", "two blue squares", "a green triangle", "a yellow circle")]
NOISE_LEVELS = {"flow-sde": 0.7, "dance-sde": 0.3, "cps": 0.8}
STEPS, TRAINED = 3, 2
# ZeRO-3's hooks cost ten times what so small a model does: few samples, then. Two updates of two micro-batches each.
SMALL = {"num_inference_steps": STEPS, "samples_per_iteration": 4, "micro_batch_size": 1}


def schedule(backbone, transition):
    """ddim is of a diffusion model; here only its table is of interest."""
    if transition == "ddim":
        timesteps = backbone.schedule("ode", 0.0, STEPS).timesteps
        alphas = torch.linspace(0.9999**0.5, 0.1, 1000) ** 2
        return Schedule(ddim_table(alphas, (0.999 * timesteps).long(), 1.0, "v_prediction"), timesteps)
    return backbone.schedule(transition, NOISE_LEVELS[transition], STEPS)


class Run:
    """A sharded actor-critic with its updater, which runs so many passes at once."""

    def __init__(self, config, model, world, at_once=1):
        self.config, self.world, self.model = config, world, model
        if config.model.gradient_checkpointing:
            model.trunk.enable_gradient_checkpointing()
        self.clock = TrunkClock(CPU)
        self.clock.watch(model.trunk)
        self.encode = PromptCache(model.backbone, CPU)
        weights = InferenceCopy(model)
        self.engine = shard(model, config, world)
        self.passes = EnginePasses(self.engine, self.clock)
        if at_once > 1:
            weights.attach(self.engine, "auto", world)
            models = [weights.module() for _ in range(at_once)]
            for each in models:
                self.clock.watch(each.trunk, side_by_side=at_once)
            self.passes = SideBySidePasses(self.engine, weights, models, self.clock)
        self.updater = Updater(self.engine, self.passes, config, world)
        self.guided = config.rollout.guidance_scale > 1
        self.unconditional = self.encode([""]) if self.guided else None

    def sample(self, transition=None, first=0, model=None, keep_features=False):
        """By the sharded engine, or an unsharded model."""
        steps = schedule(self.model.backbone, transition or self.config.rollout.transition)
        count, size = self.config.rollout.samples_per_iteration, self.config.rollout.micro_batch_size
        rollout = Rollout([model or self.engine], self.encode, self.model.backbone.latent_shape, size, CPU)
        indices = torch.arange(first, first + count)
        return rollout(PROMPTS[:count], indices, schedule=steps, seed=5, keep_features=keep_features)

    def weights(self):
        return gather_state(self.model)

    def ppo(self, trajectory, advantages, returns, seed=0, **scales):
        order = torch.Generator().manual_seed(seed)
        outcome = SimpleNamespace(advantages=advantages, returns=returns)
        return self.updater.policy(trajectory, outcome, self.unconditional, order, **scales)

    def critic(self, trajectory, returns, epochs=1, seed=0):
        order = torch.Generator().manual_seed(seed)
        return self.updater.critic(trajectory, SimpleNamespace(returns=returns), self.unconditional, order, epochs)


@pytest.fixture
def start(tiny_config, tiny_model, world):
    """start(at_once, section={...}) -> Run. Engines are torn down, so that no hook of theirs outlives the test."""
    runs = []

    def make(at_once=1, **sections):
        config = tiny_config(**{**sections, "rollout": {**SMALL, **sections.get("rollout", {})}})
        runs.append(Run(config, tiny_model(config), world, at_once))
        return runs[-1]

    yield make
    for run in runs:
        run.engine.destroy()


def targets(trajectory, seed=0):
    """Advantages [N, T] of the trained and returns [N, K, M] of all steps, of order 1."""
    generator = torch.Generator().manual_seed(seed)
    count, trained = len(trajectory.latents), trajectory.trained_steps
    returns = torch.randn(count, 1, 2, generator=generator).expand(-1, STEPS, -1)
    return torch.randn(count, trained.stop - trained.start, generator=generator), returns


def moments(module):
    """Adam's, by parameter; DeepSpeed shows those of parameters that rest only if they are woken."""
    found = {}
    for name, parameter in module.named_parameters():
        resting = not parameter.requires_grad
        parameter.requires_grad_(True)
        for key in ("exp_avg", "exp_avg_sq"):
            found[name, key] = safe_get_full_optimizer_state(parameter, key).clone()
        parameter.requires_grad_(not resting)
    return found


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Reference:
    """PPO written out in plain PyTorch, on an unsharded model: two AdamWs, which only step when their part learns."""

    def __init__(self, config, model):
        self.config, self.model = config, model
        options = dict(betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay)
        self.policy = torch.optim.AdamW(model.trunk.parameters(), lr=config.optimizer.policy_lr, **options)
        self.critic = None
        if model.critic is not None:
            self.critic = torch.optim.AdamW(model.critic.parameters(), lr=config.optimizer.critic_lr, **options)
        self.base = copy.deepcopy(model.trunk)  # whose predictions a KL keeps the policy near to

    def run(self, trajectory, advantages, returns, unconditional, seed, train_policy):
        config, size = self.config, self.config.rollout.micro_batch_size
        updates, norms, losses = config.training.updates_per_iteration, [], []
        self.kls = []
        batches = torch.randperm(
            len(trajectory.latents) // size, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        share = len(batches) // updates
        for update in range(updates):
            self.model.zero_grad()
            mine, total = batches[update * share : (update + 1) * share], []
            trained = trajectory.trained_steps
            steps = range(STEPS)[trained] if train_policy else range(STEPS)
            for i in mine:
                batch = slice(i * size, (i + 1) * size)
                for k in steps:
                    z, z_next = trajectory.latents[batch, k], trajectory.latents[batch, k + 1]
                    t = trajectory.timesteps[k].expand(size)
                    conditioning = rows(trajectory.conditioning, batch)
                    v, values = self.model(z, t, conditioning, unconditional)
                    value, bound = torch.zeros(()), config.algorithm.target_clip
                    if self.critic:
                        value = 0.5 * (values - returns[batch, k].clamp(-bound, bound)).square().mean()
                    loss = value
                    policy = torch.zeros(())
                    if train_policy:
                        a, b, s = trajectory.table[k].tolist()
                        log_prob = (
                            (-((z_next - a * z - b * v) ** 2) / (2 * s**2) - math.log(s) - math.log(2 * math.pi) / 2)
                            .flatten(1)
                            .mean(1)
                        )
                        ratio = (log_prob - trajectory.log_probs[batch, k]).exp()
                        clip, gain = config.algorithm.clip_range, advantages[batch, k - trained.start]
                        policy = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain).mean()
                        with torch.no_grad():
                            base = self.model.backbone.predict(self.base, z, t, conditioning)
                        mean, std = a * z + b * v, torch.tensor(s)
                        here, there = Normal(mean, std), Normal(a * z + b * base, std)
                        kl = kl_divergence(here, there).mean()
                        loss = policy + config.critic.value_coef * value + config.algorithm.kl_coef * kl
                        self.kls.append(kl.item())
                    total.append(loss / (len(mine) * len(steps)))
                    losses.append((policy.item(), value.item()))
            sum(total).backward()
            if not train_policy:
                for parameter in self.model.trunk.parameters():
                    parameter.grad = None
            modules = [self.model.trunk, *([self.model.critic] if self.critic else [])]
            parts = [[p.grad for p in module.parameters() if p.grad is not None] for module in modules]
            norms.append([math.sqrt(sum(g.square().sum().item() for g in part)) for part in parts])
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.gradient_clipping)
            if train_policy:
                self.policy.step()
            if self.critic:
                self.critic.step()
        return torch.tensor(norms).mean(0).tolist(), torch.tensor(losses).mean(0).tolist()


MUST_MOVE = (
    "trunk.proj_out.weight",
    "trunk.pos_embed.proj.weight",
    "trunk.context_embedder.weight",
    "trunk.transformer_blocks.1.attn.to_k.weight",
    "trunk.transformer_blocks.2.norm1.linear.bias",
    "critic.taps.query",
    "critic.taps.value_weight",
    "critic.heads.0.0.weight",
)
CASES = {
    "flow-sde": ([False, True], {}),
    "two steps a forward": ([True], {"rollout": {"micro_batch_size": 2}, "training": {"steps_per_forward": 2}}),
    "cps, guided, shared trunk, checkpointed": (
        [True, False, True],
        {
            "model": {"gradient_checkpointing": True},
            "rollout": {"transition": "cps", "noise_level": 0.8, "guidance_scale": 2.0, "samples_per_iteration": 2},
            "critic": {"trunk": "shared", "taps": [0, 2]},
            "training": {"updates_per_iteration": 1},
        },
    ),
    "no critic, KL": ([True, True], {"algorithm": {"name": "grpo", "group_size": 2, "kl_coef": 40.0}}),
}


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_pytorch(start, tiny_model, case, at_once):
    """Value pretraining and PPO; PPO, critic, PPO: under ZeRO-3 against the reference, from the same trajectory."""
    phases, sections = CASES[case]
    algorithm = {"clip_range": 1e-3, "target_clip": 0.5, **sections.get("algorithm", {})}
    options = {"algorithm": algorithm, "optimizer": {"gradient_clipping": 0.5}}
    run = start(at_once, **{**sections, **options})
    model = tiny_model(run.config)
    reference = Reference(run.config, model)
    first = run.weights()
    assert same(first, model.state_dict())
    trajectory = run.sample(model=model)
    if run.guided:  # one case is enough for this
        sharded = run.sample()
        assert torch.equal(trajectory.latents, sharded.latents) and torch.equal(trajectory.values, sharded.values)
    advantages, returns = targets(trajectory)
    assert returns.abs().max() > 0.5  # the target clip has something to do
    fresh = True
    for seed, train_policy in enumerate(phases):
        norms, losses = reference.run(trajectory, advantages, returns, run.unconditional, seed, train_policy)
        if train_policy:
            found = run.ppo(trajectory, advantages, returns, seed)
            # Norms and losses are sums of 1e5 float32 numbers that agree to 1e-6.
            assert found["grad_norm/actor"] == pytest.approx(norms[0], rel=1e-4)
            assert found["policy_loss"] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
            assert math.hypot(*norms) > 0.5  # the gradient clip has something to do
            assert (found["first_ratio"] == 1.0 and found["first_ratio_deviation"] == 0.0) == fresh
            if run.config.algorithm.kl_coef:  # of order 1e-5, as far as an update goes; 0 in the first
                mean = sum(reference.kls) / len(reference.kls)
                assert found["reference_kl"] == pytest.approx(mean, rel=1e-2) and mean > 1e-6
            assert ("reference_kl" in found) == (run.config.algorithm.kl_coef > 0)
            fresh = False
        else:
            found = run.critic(trajectory, returns, seed=seed)
        if run.config.has_critic:
            assert found["grad_norm/critic"] == pytest.approx(norms[1], rel=1e-4)
            assert found["value_loss"] == pytest.approx(losses[1], rel=1e-4)
        else:
            assert not {"grad_norm/critic", "value_loss"} & found.keys()
    weights, expected = run.weights(), model.state_dict()
    # Adam's steps of 1e-4 (policy) and 1e-3 (critic), on gradients that agree to 1e-6. Where the gradient is rounding
    # noise alone, a step could differ by twice its rate: none is seen.
    for name in expected:
        assert (weights[name] - expected[name]).abs().max() < 1e-5, name
    moved = {name: (expected[name] - first[name]).abs().max().item() for name in expected}
    must_move = [name for name in MUST_MOVE if run.config.has_critic or not name.startswith("critic")]
    assert all(moved[name] > (1e-3 if name.startswith("critic") else 1e-4) for name in must_move), moved


@pytest.mark.parametrize(
    "sizes, steps, steps_per_forward, at_once, spans, samples",
    [
        ([8, 8], 4, 1, 1, [1] * 4, [8, 8]),
        ([8], 9, 4, 1, [3, 3, 3], [8]),
        ([8], 10, 4, 1, [3, 3, 4], [8]),
        ([8], 3, 8, 1, [3], [8]),
        ([64, 64], 4, 4, 2, [4], [64, 64]),  # a pass each
        ([64], 4, 4, 2, [4], [32, 32]),
        ([64, 64, 64], 4, 4, 2, [4], [32] * 6),  # else one of them would wait for the third
        ([64], 4, 2, 3, [2, 2], [21, 21, 22]),
        ([8, 8], 2, 2, 16, [2], [4] * 4),  # no fewer samples at once than round alike
        ([2], 2, 2, 2, [2], [2]),
    ],
)
def test_parts_cover_each_pair_once_and_weigh_it_the_same(sizes, steps, steps_per_forward, at_once, spans, samples):
    batches = [slice(100 * i, 100 * i + size) for i, size in enumerate(sizes)]
    first = 5  # the trained steps need not be the first
    parts = parts_of(batches, slice(first, first + steps), steps_per_forward, at_once)
    pairs = {}
    for part in parts:
        rows, numbers = range(10_000)[part.samples], range(10_000)[part.steps]
        for row in rows:
            for k in numbers:
                assert (row, k) not in pairs
                pairs[row, k] = part.weight / (len(rows) * len(numbers))
    expected = range(first, first + steps)
    assert set(pairs) == {(row, k) for batch in batches for row in range(10_000)[batch] for k in expected}
    assert all(weight == pytest.approx(1 / len(pairs)) for weight in pairs.values())
    assert [part.steps.stop - part.steps.start for part in parts] == spans * len(samples)
    assert [part.samples.stop - part.samples.start for part in parts[:: len(spans)]] == samples
    assert len(parts) % at_once == 0 or max(samples) < 8


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_passes_side_by_side_equal_those_of_the_engine(start, tiny_model, stage):
    """At each ZeRO stage; gradients are added in an order of their own, so to rounding."""
    sections = {"deepspeed": {"zero_optimization": {"stage": stage}}, "training": {"steps_per_forward": 2}}
    runs = [start(at_once, **sections) for at_once in (1, 3)]
    trajectory = runs[0].sample(model=tiny_model(runs[0].config))
    advantages, returns = targets(trajectory)
    before = runs[0].weights()
    for run in runs:
        run.found = run.ppo(trajectory, advantages, returns), run.critic(trajectory, returns)
    for expected, found in zip(*(run.found for run in runs), strict=True):
        drifts = [row.pop("first_log_prob_drift_per_step", [0.0] * TRAINED) for row in (expected, found)]
        # Two rows in a product and not one, which the rollout had: below four MKL may round otherwise. Of order 1.
        assert drifts == [pytest.approx([0.0] * TRAINED, abs=1e-6)] * 2
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    expected, found = (run.weights() for run in runs)
    assert all((found[name] - expected[name]).abs().max() < 1e-5 for name in expected)
    assert all((found[name] - before[name]).abs().max() > 1e-4 for name in MUST_MOVE)
    assert not any(twin.requires_grad for _, twin in runs[1].passes._weights.trained)


@pytest.mark.parametrize("at_once, steps_per_forward", [(1, 1), (1, 2), (3, 1)])
def test_drift_of_log_probs_is_told_by_step(start, tiny_model, at_once, steps_per_forward):
    """Of the first update alone: later ones see what it has changed."""
    run = start(at_once, training={"steps_per_forward": steps_per_forward})
    trajectory = run.sample(model=tiny_model(run.config))
    advantages, returns = targets(trajectory)
    apart = torch.tensor([0.0, 0.125, 0.0])  # as rounding in the rollout would have it
    drifted = dataclasses.replace(trajectory, log_probs=trajectory.log_probs + apart)
    found = run.ppo(drifted, advantages, returns)["first_log_prob_drift_per_step"]
    # Log-probabilities of order 1 in float32.
    assert found == pytest.approx(apart[:TRAINED].tolist(), abs=1e-6)


def test_which_thread_is_faster_changes_no_bit(start, tiny_model):
    """Nor does it which of a thread's passes ends first."""
    run = start(3)
    trajectory = run.sample(model=tiny_model(run.config))
    advantages, returns = targets(trajectory)
    parts = parts_of([slice(i, i + 1) for i in range(4)], trajectory.trained_steps, 1, 3)
    assert len(parts) == 8

    def gradients(slow: int) -> tuple[list, list]:
        kept, done = [], [threading.Event() for _ in parts]

        def forward(model, part):
            number = parts.index(part)
            if number == slow:  # until another thread has had its first part
                assert done[(number + 1) % 3].wait(60)
            outcome = SimpleNamespace(advantages=advantages, returns=returns)
            found = run.updater._policy_pass(trajectory, outcome, None, model, part)
            done[number].set()
            return found

        run.passes._hand_over = lambda _, gradients: kept.extend(gradients)
        return [terms.tolist() for terms in run.passes.run(parts, forward)], copy.deepcopy(kept)

    terms, expected = gradients(0)
    for slow in (1, 2):
        again, found = gradients(slow)
        assert again == terms and len(found) == len(expected) > 100
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(gradient.abs().max() > 1e-3 for gradient in expected)


def test_a_pass_that_fails_ends_the_step(start, tiny_model):
    run = start(2)
    trajectory = run.sample(model=tiny_model(run.config))
    before = run.weights()

    class Broken:
        @property
        def advantages(self):
            raise TrainingError("gone")

    with pytest.raises(TrainingError, match="gone"):
        run.updater.policy(trajectory, Broken(), None, torch.Generator())
    assert same(run.weights(), before)
    assert not any(twin.requires_grad for _, twin in run.passes._weights.trained)
    found = run.ppo(trajectory, *targets(trajectory))  # and nothing of it is left
    assert found["first_ratio_deviation"] == 0.0 and not same(run.weights(), before)


@pytest.mark.parametrize("at_once", [1, 2])
def test_first_update_of_a_fresh_batch_has_ratio_one(start, at_once):
    """To the last bit, before the policy has ever moved and after. flow-sde, cps and guidance: see above."""
    run = start(at_once, rollout={"samples_per_iteration": 2})
    for transition in ("dance-sde", "ddim"):
        trajectory = run.sample(transition)
        assert trajectory.trained_steps == slice(0, TRAINED)
        run.clock.read()
        found = run.ppo(trajectory, *targets(trajectory), lr_scale=0.5, warm_up=0.25)
        assert [group["lr"] for group in run.engine.optimizer.param_groups] == [0.125e-4, 0.5e-3]
        assert (found["first_ratio"], found["first_ratio_deviation"], found["first_clipfrac"]) == (1.0, 0.0, 0.0)
        assert found["ratio_max_deviation"] > 0  # the second update sees what the first has changed
        assert len(run.clock._spans) == 2 * 2 * TRAINED  # a forward and a backward of each micro-batch and step


def test_the_trunk_computes_while_the_last_pictures_are_scored(start):
    """An update asks what was earned after its first forward, not before."""
    run = start()
    trajectory = run.sample()
    forwards = []
    run.model.trunk.register_forward_hook(lambda *_: forwards.append("forward"))

    class Late:
        @property
        def advantages(self):
            forwards.append("asked")
            return targets(trajectory)[0]

        @property
        def returns(self):
            forwards.append("asked")
            return targets(trajectory)[1]

    for update in (run.updater.policy, lambda *inputs: run.updater.critic(*inputs, epochs=1)):
        forwards.clear()
        update(trajectory, Late(), None, torch.Generator())
        assert forwards[:2] == ["forward", "asked"]


def test_critic_updates_leave_the_policy_alone(start, tiny_model):
    """Weights and moments bit-identical, with a shared trunk too; the value error on unseen samples falls."""
    run = start(critic={"trunk": "shared"}, optimizer={"critic_lr": 1e-2}, rollout={"micro_batch_size": 2})
    model = tiny_model(run.config)
    trajectory, unseen = run.sample(model=model), run.sample(model=model, first=100)
    label = torch.tensor([1.0, -1.0, 0.5, 0.0])  # by prompt
    returns = torch.stack([label, -label], 1)[:, None].expand(-1, STEPS, -1)
    run.ppo(trajectory, targets(trajectory)[0], returns)  # so that there are moments to spoil

    @torch.no_grad()
    def unseen_error():
        steps = [(unseen.latents[:, k], unseen.timesteps[k].expand(4), unseen.conditioning) for k in range(STEPS)]
        values = torch.stack([run.engine(*inputs)[1] for inputs in steps], 1)
        return (values - returns).square().mean().item()

    weights, policy, critic, error = run.weights(), moments(run.model.trunk), moments(run.model.critic), unseen_error()
    run.clock.read()
    losses = [run.critic(trajectory, returns, epochs=2, seed=seed)["value_loss"] for seed in range(2)]
    assert len(run.clock._spans) == 2 * 2 * 2  # forwards only, of all steps at once
    after = run.weights()
    assert all(torch.equal(after[name], weights[name]) for name in after if name.startswith("trunk."))
    assert same(moments(run.model.trunk), policy) and all(bool(policy[key].any()) for key in policy if "to_k" in key[0])
    assert all(not torch.equal(moment, critic[key]) for key, moment in moments(run.model.critic).items())
    assert losses[-1] < 0.5 * losses[0], losses
    assert unseen_error() < 0.5 * error


@pytest.mark.parametrize(("at_once", "trunk"), [(1, "shared-detached"), (2, "shared-detached"), (2, "pixels")])
def test_the_critic_learns_the_same_from_features_that_were_kept(start, tiny_model, at_once, trunk):
    """Weights to the bit and losses too, after two epochs, and no forward of the trunk."""
    sections = {
        "rollout": {"micro_batch_size": 4},
        "training": {"updates_per_iteration": 1},
        "critic": {"trunk": trunk},
    }
    runs = [start(at_once, **sections) for _ in range(2)]
    model = tiny_model(runs[0].config)
    for run, keep_features in zip(runs, (False, True), strict=True):
        trajectory = run.sample(model=model, keep_features=keep_features)
        run.clock.read()
        run.found = run.critic(trajectory, targets(trajectory)[1], epochs=2)
        assert bool(run.clock._spans) != keep_features
    assert runs[0].found == runs[1].found and same(*(run.weights() for run in runs))


def test_dropped_features_differ_by_update_and_repeat(start, tiny_model):
    """Unscaled where kept, nothing where dropped; a run repeats to the bit."""
    weights = []
    for _ in range(2):
        run = start(critic={"feature_dropout": 0.25})
        trajectory = run.sample(model=tiny_model(run.config), keep_features=True)
        seen = []
        features = run.updater._features

        def watch(trajectory, part, seed, seen=seen, features=features):
            seen.append((part, features(trajectory, part, seed)))
            return seen[-1][1]

        run.updater._features = watch
        run.critic(trajectory, targets(trajectory)[1], epochs=2)
        weights.append(run.weights())
        masks = []
        for part, taps in seen:
            for kept, tap in zip(trajectory.features, taps, strict=True):
                whole = kept[part.samples, part.steps].flatten(0, 1)
                mask = tap != 0
                torch.testing.assert_close(tap[mask], whole[mask] / 0.75, rtol=1e-6, atol=0)
                masks.append(mask)
        numbers = sum(mask.numel() for mask in masks)
        dropped = 1 - sum(mask.sum().item() for mask in masks) / numbers
        assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / numbers) ** 0.5  # five standard errors
        by_epoch = len(masks) // 2
        assert not any(torch.equal(a, b) for a, b in zip(masks[:by_epoch], masks[by_epoch:], strict=True))
    assert same(*weights)


def test_the_critic_has_a_weight_decay_of_its_own(start):
    groups = start(optimizer={"critic_weight_decay": 0.5, "weight_decay": 0.1}).engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.5]
    assert [
        group["weight_decay"] for group in start(optimizer={"weight_decay": 0.1}).engine.optimizer.param_groups
    ] == [
        0.1,
        0.1,
    ]


def test_a_loss_that_is_not_finite_is_refused(start, tiny_model):
    run = start(rollout={"samples_per_iteration": 2})
    trajectory = run.sample(model=tiny_model(run.config))
    advantages, returns = targets(trajectory)
    returns = returns.clone()
    returns[:, 1, 1] = math.inf  # clipped to the target clip: harmless
    run.critic(trajectory, returns)
    before = run.weights()

    def refuse(term, place, update):
        with pytest.raises(TrainingError, match=f"the {term} loss is not finite at denoising {place}; ") as raised:
            update()
        assert raised.value.exit_code == 1 and "--resume auto" in str(raised.value)
        assert same(run.weights(), before)

    spoilt = returns.clone()
    spoilt[:, 1, 0] = math.nan
    refuse("value", "steps 0 to 2", lambda: run.critic(trajectory, spoilt))
    refuse("value", "step 1", lambda: run.ppo(trajectory, advantages, spoilt))
    spoilt = advantages.clone()
    spoilt[:, 0] = math.nan
    refuse("policy", "step 0", lambda: run.ppo(trajectory, spoilt, returns))
