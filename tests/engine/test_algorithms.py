"""Advantage estimators by hand: PPO's, GRPO's and DDPO's; what they remember, on one process and on two; and a world of
two arms in which each finds the better one."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latent_critic.engine.algorithms import build_algorithm
from latent_critic.engine.algorithms.ddpo import KEPT
from latent_critic.engine.config import Config
from latent_critic.engine.likelihood import likelihood
from latent_critic.engine.noise import keyed_noise
from latent_critic.engine.passes import Part
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.trajectory import Trajectory
from latent_critic.engine.transitions import flow_sde_table
from latent_critic.kernels.ppo import PPOClips, policy_loss, ppo_loss
from latent_critic.kernels.transition import transition_step

from . import tiny_runs

NAMES = ["ppo", "grpo", "grpo, global std", "ddpo", "ddpo, prompt"]


def algorithm_options(name):
    name, _, statistics = name.partition(", ")
    return {"name": name} | {"global std": {"global_std": True}, "prompt": {"reward_statistics": "prompt"}}.get(
        statistics, {}
    )


def build(name, weights=(1.0,), heads="per-reward", **options):
    """An algorithm of one of NAMES, for rewards of these weights."""
    options |= algorithm_options(name)
    rewards = [{"name": f"reward {i}", "weight": weight} for i, weight in enumerate(weights)]
    sections = {"rewards": rewards, "algorithm": options, "critic": {"heads": heads}}
    return build_algorithm(Config.model_validate(sections), torch.tensor(weights))


def prompts_of(texts):
    return [Prompt(text) for text in texts]


def learn(algorithm, raw, values=None, trained=slice(0, 2), texts=None):
    """Advantages of rewards that are observed first, as an outcome does it. values: zeros of three steps."""
    prompts = prompts_of(texts or ["a red circle"] * len(raw))
    values = torch.zeros(len(raw), 3, raw.shape[1]) if values is None else values
    algorithm.observe(raw, prompts)
    return algorithm.advantages(raw, values, trained, prompts)


def column(*numbers):
    return torch.tensor(numbers)[:, None]


def assert_near(found, expected, tolerance=3e-6):
    """3e-6: float32 numbers up to 4, and what is added to a std of order 1 so that it is not 0 (PPO, DDPO: 1e-6)."""
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------- ppo

# Rewards: the first has mean 2 and std 1, the second mean 2 and std 2.
RAW = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 4.0], [3.0, 4.0]])
# Values of three steps, of which two are trained, in standardised units: a head for each reward.
FIRST = [[0.0, 2.0, -1.0], [0.0, -2.0, 1.0], [0.0, 2.0, -1.0], [0.0, -2.0, 1.0]]
SECOND = [[1.0, -3.0, 0.0]] * 4


@pytest.mark.parametrize(
    "lam, expected",
    [
        # A = R - V. The first head: R = -1 1 -1 1, so A is -1 1 -1 1 and -3 3 -3 3. The second: R = -1 -1 1 1, A is
        # -2 -2 0 0 and 2 2 4 4. Twice the first and half of the second: -3 1 -2 2 and -5 7 -4 8, of mean 0.5 and
        # variance 21.25.
        (1.0, [[-0.7592566, -1.1931175], [0.1084652, 1.4100480], [-0.5423261, -0.9761871], [0.3253957, 1.6269784]]),
        # G_2 = R, G_1 = 0.05 V_2 + 0.95 G_2, G_0 = 0.05 V_1 + 0.95 G_1. The first head has G_1 = R (V_2 is R), A_1 =
        # R - V_1 = 3 R, A_0 = 0.05 (-2 R) + 0.95 R = 0.85 R. The second has G_1 = 0.95 R, A_1 = 0.95 R + 3, A_0 =
        # -0.15 + 0.9025 R - 1: -2.0525 -2.0525 -0.2475 -0.2475 and 2.05 2.05 3.95 3.95. Together -2.72625 0.67375
        # -1.82375 1.57625 and -4.975 7.025 -4.025 7.975, of mean 0.4625 and variance 20.736032.
        (0.95, [[-0.7002573, -1.1940883], [0.0463910, 1.4411410], [-0.5020661, -0.9854660], [0.2445822, 1.6497634]]),
    ],
)
def test_ppo_by_hand(lam, expected):
    algorithm = build("ppo", (2.0, 0.5), lam=lam)
    values = torch.stack([torch.tensor(FIRST), torch.tensor(SECOND)], -1)
    assert_near(learn(algorithm, RAW, values), expected)
    # The critic learns what was earned, whatever lambda the policy has: `value_lam` is another.
    earned = [[[-1.0, -1.0]] * 3, [[1.0, -1.0]] * 3, [[-1.0, 1.0]] * 3, [[1.0, 1.0]] * 3]
    assert_near(algorithm.returns(RAW, values, slice(0, 3)), earned)


def test_the_critics_own_lambda_by_hand():
    """Of steps 0 and 1 of three, whose G_2 is R: G_1 = (V_2 + R) / 2, G_0 = (V_1 + G_1) / 2. In the first head V_2 = R
    and V_1 = -2 R, so G_1 = R, G_0 = -R / 2; in the second V_2 = 0 and V_1 = -3, so G_1 = R / 2, G_0 = R / 4 - 1.5."""
    algorithm, values = (
        build("ppo", (1.0, 1.0), value_lam=0.5),
        torch.stack([torch.tensor(FIRST), torch.tensor(SECOND)], -1),
    )
    algorithm.observe(RAW, prompts_of("abcd"))
    first = [[-r / 2, r, r] for r in (-1.0, 1.0, -1.0, 1.0)]
    second = [[r / 4 - 1.5, r / 2, r] for r in (-1.0, -1.0, 1.0, 1.0)]
    returns = algorithm.returns(RAW, values, slice(0, 2))
    assert_near(returns[..., 0], first)
    assert_near(returns[..., 1], second)


@pytest.mark.parametrize("trained", [slice(0, 1), slice(1, 2), slice(2, 3)])
def test_only_the_noise_of_stochastic_steps_is_bootstrapped_over(trained):
    """With lambda 0 a target is the value after the next stochastic step, or what is earned if there is none."""
    algorithm, values = build("ppo", lam=0.0, value_lam=0.0), torch.tensor([[[0.1], [0.2], [0.3], [0.4]]] * 4)
    algorithm.observe(RAW[:, :1], prompts_of("abcd"))
    for earned, found in zip(
        [-1.0, 1.0, -1.0, 1.0], algorithm.returns(RAW[:, :1], values, trained)[..., 0], strict=True
    ):
        following = 0.1 * (trained.stop + 1)  # V of the step after
        assert_near(found, [following] * trained.stop + [earned] * (4 - trained.stop))


def test_ppo_discounts_what_the_critic_learns():
    """gamma 0.5: the last of three steps earns R, the one before it R / 2, the first R / 4."""
    algorithm = build("ppo", gamma=0.5)
    algorithm.observe(RAW[:, :1], prompts_of("abcd"))
    values = torch.randn(4, 3, 1, generator=torch.Generator().manual_seed(0))
    returns = algorithm.returns(RAW[:, :1], values, slice(0, 3))
    assert_near(returns[..., 0], [[-0.25, -0.5, -1.0], [0.25, 0.5, 1.0]] * 2)


def test_ppo_takes_trained_steps_alone():
    """Normalised over those: a window's values, not others, whatever the critic says elsewhere."""
    values = torch.stack([torch.tensor(FIRST), torch.tensor(SECOND)], -1)
    moved = torch.cat([torch.full((4, 1, 2), 7.0), values[:, :2], torch.full((4, 1, 2), -7.0)], 1)
    found = learn(build("ppo", (2.0, 0.5)), RAW, moved, trained=slice(1, 3))
    assert torch.equal(found, learn(build("ppo", (2.0, 0.5)), RAW, values, trained=slice(0, 2)))


def test_a_reward_counts_by_its_weight_however_well_the_critic_foresees_it():
    """Of the second only a hundredth is a surprise, of the first all: 1 and 0.01 of equal rewards, not 1 and 1."""
    values = torch.stack([torch.zeros(4), 0.99 * torch.tensor([-1.0, -1.0, 1.0, 1.0])], -1)[:, None].expand(4, 3, 2)
    found = learn(build("ppo", (1.0, 1.0)), RAW, values)[:, 0]
    std = (1 + 0.01**2) ** 0.5
    assert_near(found, [(-1 - 0.01) / std, (1 - 0.01) / std, (-1 + 0.01) / std, (1 + 0.01) / std])


def test_ppo_one_head_for_the_sum_by_hand():
    """Weights 3 and 4 of rewards that are -1 1 -1 1 and -1 -1 1 1 standardised: 0.6 and 0.8, so -1.4 -0.2 0.2 1.4.

    With values 0 and 1 A is that and one less: mean -0.5, variance 1 + 0.25, so the deviations -0.9 0.3 0.7 1.9 and
    -1.9 -0.7 -0.3 0.9 are divided by 1.118034.
    """
    algorithm = build("ppo", (3.0, 4.0), heads="sum")
    values = torch.tensor([0.0, 1.0, 5.0])[None, :, None].expand(4, 3, 1)
    found = learn(algorithm, RAW, values)
    assert_near(
        found, [[-0.8049845, -1.6994117], [0.2683282, -0.6260990], [0.6260990, -0.2683282], [1.6994117, 0.8049845]]
    )
    assert_near(algorithm.earned(RAW), [[-1.4], [-0.2], [0.2], [1.4]])
    assert_near(algorithm.returns(RAW, values, slice(0, 3)), [[[-1.4]] * 3, [[-0.2]] * 3, [[0.2]] * 3, [[1.4]] * 3])


def test_ppo_before_any_reward_has_raw_units():
    assert torch.equal(build("ppo", (1.0, 1.0)).earned(RAW), RAW)
    assert_near(build("ppo", (3.0, 4.0), heads="sum").earned(RAW), [[0.6], [1.8], [3.8], [5.0]])


# ---------------------------------------------------------------------------------------------------------------- grpo


def test_grpo_by_hand():
    """Groups 1 2 3 (mean 2, population std 0.8164966) and 0 0 3 (mean 1, std 1.4142136), with 1e-4 beside a std."""
    found = learn(build("grpo", group_size=3), column(1.0, 2.0, 3.0, 0.0, 0.0, 3.0), torch.zeros(6, 3, 0))
    one_step = [-1.2245948, 0.0, 1.2245948, -0.7070568, -0.7070568, 1.4141136]
    assert_near(found, [[advantage] * 2 for advantage in one_step], 1e-6)


def test_grpo_by_hand_with_the_std_of_all():
    """The same groups: mean 1.5, squared deviations 0.25 0.25 2.25 2.25 2.25 2.25, population std 1.2583057."""
    found = learn(build("grpo, global std", group_size=3), column(1.0, 2.0, 3.0, 0.0, 0.0, 3.0), torch.zeros(6, 3, 0))
    one_step = [-0.7946563, 0.0, 0.7946563, -0.7946563, -0.7946563, 1.5893126]
    assert_near(found, [[advantage] * 2 for advantage in one_step], 1e-6)


def test_grpo_normalises_each_reward_before_it_weighs():
    """A pair is -1 and 1 whatever the reward's units (1 / (1 + 1e-4) and 100 / (100 + 1e-4)), but for a constant."""
    raw = torch.tensor([[1.0, 300.0], [3.0, 100.0], [5.0, 200.0], [7.0, 200.0]])
    found = learn(build("grpo", (2.0, 0.5), group_size=2), raw, torch.zeros(4, 3, 0))
    assert_near(found[:, 0], [-1.4998, 1.4998, -1.9998, 1.9998], 1e-6)


def test_grpo_clips_before_it_weighs():
    """One of 5 in a group differs: 2 std above the mean, the others half a std below."""
    raw = column(0.0, 0.0, 0.0, 0.0, 1000.0)
    found = learn(build("grpo", (3.0,), group_size=5, advantage_clip=1.25), raw, torch.zeros(5, 3, 0))
    assert_near(found[:, 1], [-1.5, -1.5, -1.5, -1.5, 3.75], 1e-6)


@pytest.mark.parametrize("trained", [slice(0, 2), slice(3, 7)])
def test_grpo_has_one_advantage_for_all_steps_and_none_for_a_group(trained):
    """The sum over a group is 0: four float32 numbers up to 2."""
    raw = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    found = learn(build("grpo", (2.0, -1.0), group_size=4), raw, torch.zeros(12, 8, 0), trained)
    assert found.shape == (12, trained.stop - trained.start) and found.std() > 0.5
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert found.view(3, 4, -1).sum(1).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------- ddpo


def test_ddpo_by_hand():
    """Two rewards of means 2 and 2, std 1 and 2: -1 1 -1 1 and -1 -1 1 1, twice the first and half of the second."""
    found = learn(build("ddpo", (2.0, 0.5)), RAW, torch.zeros(4, 3, 0), slice(1, 3))
    assert_near(found, [[-2.5, -2.5], [1.5, 1.5], [-1.5, -1.5], [2.5, 2.5]])


def test_ddpo_clips_before_it_weighs():
    raw = column(0.0, 0.0, 0.0, 0.0, 1000.0)
    assert_near(learn(build("ddpo", (3.0,), advantage_clip=1.25), raw)[:, 0], [-1.5, -1.5, -1.5, -1.5, 3.75])


def test_ddpo_compares_with_the_prompts_latest_16():
    """Of "often" there are 15 rewards, seven of 0 and eight of 4; of "rare" one, of 10."""
    algorithm = build("ddpo, prompt")
    raw = column(*[0.0] * 7, *[4.0] * 8, 10.0)
    found = learn(algorithm, raw, texts=["often"] * 15 + ["rare"])
    # No prompt has 16: all are compared with the iteration, of mean 42 / 16 = 2.625 and mean square 228 / 16 = 14.25,
    # so of variance 14.25 - 6.890625 = 7.359375 and std 2.712817.
    assert_near(found[:, 0], [-0.9676289] * 7 + [0.5068532] * 8 + [2.7185764])

    # Another 0 and "often" has 16, half of them 0 and half 4: mean 2, std 2. "rare" has the iteration's: 5 and 5.
    found = learn(algorithm, column(0.0, 10.0), texts=["often", "rare"])
    assert_near(found, [[-1.0, -1.0], [1.0, 1.0]])

    # Then three of 4: the oldest three, of 0, are forgotten. Five of 0 and eleven of 4: mean 2.75, variance 11 - 7.5625
    # = 3.4375, std 1.854050. "rare" and "new" have the iteration's 4 4 4 2 6: mean 4, variance 1.6, std 1.264911.
    found = learn(algorithm, column(4.0, 2.0, 4.0, 6.0, 4.0), texts=["often", "rare", "often", "new", "often"])
    assert_near(found[:, 0], [0.6741999, -1.5811388, 0.6741999, 1.5811388, 0.6741999])


def test_ddpo_forgets_rewards_in_the_order_they_came():
    """After 16 of 0 a 17th of 4: fifteen of 0 and one of 4, mean 0.25, variance 1 - 0.0625, std 0.968246."""
    algorithm = build("ddpo, prompt")
    learn(algorithm, torch.zeros(16, 1))
    assert_near(learn(algorithm, column(4.0))[:, 0], [3.8729793], 5e-6)  # 1e-6 beside the std: 4e-6 of 3.9
    learn(algorithm, torch.full((15, 1), 4.0))
    assert_near(learn(algorithm, column(4.0))[:, 0], [0.0])  # all that is left is 4


def test_ddpo_by_prompt_clips_and_weighs_each_reward():
    """15 of (0, 1) and one of (1, 0): 3.872983 standard deviations, clipped to 2, and the other way round."""
    algorithm = build("ddpo, prompt", (3.0, 0.5), advantage_clip=2.0)
    raw = torch.tensor([[0.0, 1.0]] * 15 + [[1.0, 0.0]])
    found = learn(algorithm, raw)[:, 0]
    assert_near(found, [-2.5 * 0.2581989] * 15 + [5.0])


def test_ddpo_keeps_no_history_of_global_statistics():
    algorithm = build("ddpo")
    learn(algorithm, RAW[:, :1])
    assert algorithm.state_dict() == {}


# ----------------------------------------------------------------------------------------------------- what all share


def drawn(count=24, seed=0, rewards=2):
    """Rewards of other units, values, and two prompts that come often."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(count, rewards, generator=generator) * torch.tensor([3.0, 0.01][:rewards]) + 0.5
    values = torch.randn(count, 4, rewards, generator=generator)
    return raw, values, ["a red circle", 'zwei "Kreise"\n/Ä'] * (count // 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_two_is_a_reward_listed_twice(name):
    """Sums in another order: three float32 roundings of numbers up to 4."""
    raw, values, texts = drawn(48)
    weighted, listed = build(name, (2.0, 1.0), group_size=4), build(name, (1.0, 1.0, 1.0), group_size=4)
    found = learn(weighted, raw, values, slice(0, 3), texts)
    expected = learn(listed, raw[:, [0, 0, 1]], values[..., [0, 0, 1]], slice(0, 3), texts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.std() > (0.9 if name == "ppo" else 1.5)  # PPO's have unit std, whatever the weights
    # And neither is a weight of one.
    assert (found - learn(build(name, (1.0, 1.0), group_size=4), raw, values, slice(0, 3), texts)).abs().max() > 0.5


@pytest.mark.parametrize("heads", ["per-reward", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_a_constant_reward_teaches_nothing(name, heads):
    """Advantages of exactly 0, and so the gradient of the policy's loss: no rounding error is blown up."""
    algorithm = build(name, (2.0, -0.5), heads, group_size=4)
    raw = torch.tensor([0.3, -7.7]).expand(24, 2)  # no sum of such numbers is what it would be without rounding
    values = torch.zeros(24, 3, 1 if heads == "sum" else 2)
    for _ in range(2):
        advantages = learn(algorithm, raw, values)
        assert torch.equal(advantages, torch.zeros(24, 2))
    log_probs = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, statistics = policy_loss(log_probs, torch.zeros(24, 2), advantages, 2e-3)
    loss.backward()
    assert loss == 0 and torch.equal(log_probs.grad, torch.zeros(24, 2)) and statistics.clipfrac > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_on_to_the_bit(name, tmp_path):
    """Through the file it is kept in: prompts are any text."""
    went, texts = build(name, (2.0, 1.0), group_size=4), drawn()[2]
    for seed in range(2):
        learn(went, *drawn(seed=seed)[:2], texts=texts)
    save_file(went.state_dict(), tmp_path / "state.safetensors")
    resumed = build(name, (2.0, 1.0), group_size=4)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for seed in (2, 3):
        raw, values, _ = drawn(seed=seed)
        expected = learn(went, raw, values, texts=texts)
        assert torch.equal(learn(resumed, raw, values, texts=texts), expected)
        fresh = learn(build(name, (2.0, 1.0), group_size=4), raw, values, texts=texts)
        # PPO's statistics stay those of before in part, and a prompt's; the others have none.
        assert torch.equal(fresh, expected) == (name not in ("ppo", "ddpo, prompt"))
    after, again = went.state_dict(), resumed.state_dict()
    assert after.keys() == again.keys() and all(torch.equal(after[key], again[key]) for key in after)
    expected = {"ppo": {"count", "mean", "sum_squared_deviation"}, "ddpo, prompt": {f"history/{t}" for t in texts}}
    assert after.keys() == expected.get(name, set())


def test_without_a_critic_there_is_nothing_for_it_to_learn():
    for name in ("grpo", "ddpo"):
        algorithm = build(name, (1.0, 1.0), group_size=2)
        assert algorithm.earned(RAW).shape == (4, 0)
        assert algorithm.returns(RAW, torch.zeros(4, 3, 0), slice(0, 3)).shape == (4, 3, 0)


def test_two_processes_estimate_what_one_does(tmp_path):
    """Each of two processes has half of the samples, in two iterations, of which the second meets the first's history.

    Groups are whole on a rank and a prompt's rewards are gathered, so those are equal to the bit; other means are of
    sums in another order, in float64, and so of numbers up to 10 to a float32's last bit.
    """
    iterations = [drawn(32, seed) for seed in range(2)]
    configs = {}
    for name in NAMES:
        options = {"group_size": 4} | algorithm_options(name)
        rewards = [{"name": "a", "weight": 2.0}, {"name": "b"}]
        configs[name] = Config.model_validate({"rewards": rewards, "algorithm": options}).model_dump(mode="json")
    run = tiny_runs.Run(tmp_path, "estimate", configs, iterations, ranks=2)
    ranks = [tiny_runs.seen(run, rank) for rank in range(2)]
    for name in NAMES:
        one = build(name, (2.0, 1.0), group_size=4)
        for i, (raw, values, texts) in enumerate(iterations):
            expected = learn(one, raw, values, slice(0, 3), texts)
            found = torch.cat([rank[name][i] for rank in ranks])
            tolerance = 0 if name == "grpo" or (name == "ddpo, prompt" and i) else 1e-6
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        assert one.state_dict().keys() == ranks[0][f"{name}, state"].keys()
        for key, state in one.state_dict().items():
            torch.testing.assert_close(ranks[0][f"{name}, state"][key], state, rtol=1e-12, atol=1e-12)
            assert torch.equal(ranks[0][f"{name}, state"][key], ranks[1][f"{name}, state"][key])
    assert len(ranks[0]["ddpo, prompt, state"]) == 2
    assert all(len(known) == KEPT for known in ranks[0]["ddpo, prompt, state"].values())


# ------------------------------------------------------------------------------------------------- a world of two arms

SHAPE, STEPS, SAMPLES = (1, 2, 2), 5, 64
SIGMAS = torch.linspace(1.0, 0.0, STEPS + 1)


class TwoArms(nn.Module):
    """The exact flow model of data that are all +1 or all -1, as often, with a learnable log-odds of these arms.

    Of a latent z the log-odds are 2 (1 - sigma) sum(z) / sigma^2, so x0 = tanh of half of it; v = (z - x0) / sigma.
    """

    def __init__(self):
        super().__init__()
        self.odds = nn.Parameter(torch.zeros(()))
        self.value = nn.Parameter(torch.zeros(STEPS, 2))  # of a constant and of the arm that the latent is near

    def forward(self, z, k):
        sigma = SIGMAS[k]
        clean = torch.tanh((1.0 - sigma) * z.flatten(1).sum(1) / sigma.square() + self.odds / 2)
        prediction = (z - clean[:, None, None, None]) / sigma
        arm = torch.tanh(z.flatten(1).mean(1)).detach()
        return prediction, self.value[k, 0] + self.value[k, 1] * arm


@dataclass
class Toy:
    """A policy, and an algorithm that trains it on a reward of 1 for the arm +1."""

    name: str

    def __post_init__(self):
        self.model, self.table = TwoArms(), flow_sde_table(SIGMAS, 0.7)
        self.algorithm = build(self.name, group_size=8)
        groups = [{"params": [self.model.odds], "lr": 0.3}, {"params": [self.model.value], "lr": 0.1}]
        self.optimizer = torch.optim.Adam(groups)

    @torch.no_grad()
    def sample(self, indices, seed=0):
        z = keyed_noise(seed, indices, 0, SHAPE)
        latents, log_probs, values = [z], [], []
        for k in range(STEPS):
            prediction, value = self.model(z, k)
            z, log_prob = transition_step(prediction, z, keyed_noise(seed, indices, k + 1, SHAPE), self.table, k)
            latents.append(z), log_probs.append(log_prob), values.append(value[:, None])
        tensors = torch.stack(latents, 1), torch.stack(log_probs, 1), torch.stack(values, 1)
        prompts = prompts_of(["heads or tails"] * len(z))
        return Trajectory(*tensors, 1000.0 * SIGMAS[:-1], self.table, {}, prompts, indices, seed)

    @staticmethod
    def reward(drawn):
        return (drawn.latents[:, -1].flatten(1).mean(1, keepdim=True) > 0).float()

    def iterate(self, iteration):
        drawn = self.sample(torch.arange(SAMPLES) + iteration * SAMPLES)
        raw, trained = self.reward(drawn), drawn.trained_steps
        self.algorithm.observe(raw, drawn.prompts)
        advantages = self.algorithm.advantages(raw, drawn.values, trained, drawn.prompts)
        returns = self.algorithm.returns(raw, drawn.values, trained)[:, trained]
        part = Part(slice(0, SAMPLES), trained, 1.0)
        for _ in range(2):
            steps = [self.model(drawn.latents[:, k], k) for k in range(STEPS)[trained]]
            predictions, values = (torch.stack(tensors, 1) for tensors in zip(*steps, strict=True))
            log_probs, _ = likelihood(drawn, part, predictions.flatten(0, 1))
            old, clips = drawn.log_probs[:, trained], PPOClips(0.2, None, 5.0)
            if self.name == "ppo":
                before = drawn.values[:, trained]
                loss, _ = ppo_loss(log_probs, old, advantages, values[..., None], returns, before, clips, 0.5)
            else:
                loss, _ = policy_loss(log_probs, old, advantages, clips.clip_range)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def probability(self):
        """Of the better arm, among 1000 unseen samples."""
        return self.reward(self.sample(torch.arange(1000), seed=9)).mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_each_algorithm_finds_the_better_arm(name):
    """From as often as not (+- 0.016, the standard error of 1000) to nearly always, and the log-odds with it."""
    toy = Toy(name)
    assert toy.probability() == pytest.approx(0.5, abs=0.05)
    final = toy.sample(torch.arange(1000), seed=9).latents[:, -1]
    assert (final.abs() - 1).abs().mean() < 0.1  # an arm, and nothing between
    found = []
    for iteration in range(30):
        toy.iterate(iteration)
        found.append(toy.probability())
    assert found[-1] > 0.95 and found[-1] > found[9] > 0.55, found
    assert toy.model.odds > 2
    if name == "ppo":  # the critic has learned that latents near the better arm earn more
        values = toy.model.value.detach()
        assert bool((values[2:4, 1] > 0).all()), values
