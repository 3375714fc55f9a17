"""`python bench/reproduce.py --credit`: moments of gradients, what advantages have in common, and a run's page."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from latent_critic.engine.advantages import explained_variance
from latent_critic.engine.checkpoint import export
from latent_critic.engine.config import save_config
from latent_critic.engine.critic_file import load_critic
from latent_critic.engine.noise import keyed_noise
from latent_critic.engine.saved_run import SavedRun
from latent_critic.kernels.transition import transition_log_prob

sys.path.append(str(Path(__file__).parents[2] / "bench" / "reproduce_parts"))  # as the script itself does

import repro_credit  # noqa: E402
import repro_foresight  # noqa: E402
import repro_gradients  # noqa: E402
import repro_places  # noqa: E402

SIZE = repro_credit.Size(prompts=8, group_size=4, groups_per_chunk=2)


def test_moments_are_the_covariances_trace_and_the_means_unbiased_square():
    torch.manual_seed(0)
    gradients = torch.randn(12, 50) + 0.5
    moments = repro_gradients.GradientMoments(3)
    for number, gradient in enumerate(gradients):
        moments.add(number % 3, gradient.clone())
    spread, without = moments.spread(), moments.spread(without=1)
    assert spread.variance == pytest.approx(torch.cov(gradients.T).trace().item(), rel=1e-5)
    products = gradients @ gradients.T
    pairs = (products.sum() - products.trace()) / (12 * 11)  # of different chunks, whose noise does not correlate
    assert spread.mean_squared == pytest.approx(pairs.item(), rel=1e-5)
    kept = gradients[[number for number in range(12) if number % 3 != 1]]
    assert without.variance == pytest.approx(torch.cov(kept.T).trace().item(), rel=1e-5)
    with pytest.raises(ValueError, match="0 chunks"):
        repro_gradients.GradientMoments(2).spread()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    numbers = [1.0, 2.0, 4.0, 8.0]
    without = [(sum(numbers) - number) / 3 for number in numbers]
    expected = torch.tensor(numbers).std().item() / 2
    assert repro_gradients.jackknife(without) == pytest.approx(expected, rel=1e-6)


def test_slopes_say_how_much_of_the_rewards_gradient_an_advantage_has():
    """Actions of mean theta and variance 1 earn themselves and what their prompt gives: the reward's gradient is 1, and
    an advantage's is its slope."""
    torch.manual_seed(0)
    size = 4
    actions, prompts = torch.randn(50_000, size), 3 * torch.randn(50_000, 1)
    rewards = (actions + prompts).double()
    deviation = rewards - rewards.mean(1, keepdim=True)
    grpo = deviation / deviation.square().mean(1, keepdim=True).sqrt()
    ddpo = (rewards - rewards.mean()) / rewards.std(correction=0)
    slope = repro_credit.within_groups(grpo.flatten(), rewards.flatten(), size)
    gradients = {name: (mine * actions).mean() for name, mine in {"grpo": grpo, "ddpo": ddpo}.items()}
    assert gradients["grpo"] / slope == pytest.approx(1.0, abs=0.01)
    assert gradients["ddpo"] * rewards.std(correction=0) == pytest.approx(1.0, abs=0.03)


def test_a_bootstrapped_advantage_has_what_the_critic_knows():
    torch.manual_seed(0)
    by_action, later = torch.randn(100_000), torch.randn(100_000)
    earned = by_action + later
    # A critic that foresees what the action did leaves out noise alone; one that knows nothing shrinks the reward.
    assert repro_credit.share(by_action, earned) == pytest.approx(1.0, abs=0.02)
    assert repro_credit.share(0.9 * earned, earned) == pytest.approx(0.9, rel=1e-6)


def test_ratios_are_per_reward_and_with_their_errors():
    moments = {name: repro_gradients.GradientMoments(2) for name in ("ddpo", "grpo")}
    for number, gradient in enumerate(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [2.0, -1.0]])):
        moments["ddpo"].add(number % 2, gradient.clone())
        moments["grpo"].add(number % 2, 2 * gradient)
    found = repro_credit.summarize(moments, {"ddpo": 1.0, "grpo": 4.0}, 2)
    assert found["ddpo"]["variance"] == pytest.approx(4 / 3) and found["grpo"]["relative_variance"] == 4.0
    assert found["grpo"]["reward_variance"] == pytest.approx(4 / 16) and found["grpo"]["reward_variance_error"] == 0.0
    assert found["ddpo"]["mean_squared"] == pytest.approx(4 - 1 / 3)
    unknown = repro_credit.summarize(moments, {"ddpo": None, "grpo": None}, 2)["grpo"]
    assert unknown["reward_variance"] is None and unknown["relative_variance"] == 4.0


def test_the_share_between_groups_is_unbiased():
    """Groups of variance 1 around means of variance 1/2: a third of it all, also where a group's mean is of few."""
    torch.manual_seed(0)
    groups = torch.randn(100_000, 2, 1) + torch.randn(100_000, 1, 1) * 0.5**0.5
    assert repro_foresight.between(groups) == pytest.approx(1 / 3, abs=0.01)
    assert repro_foresight.between(groups[:, :1].expand(-1, 3, -1)) == pytest.approx(1.0)


@pytest.fixture
def trained(tiny_config, tiny_model, tmp_path) -> Path:
    """A run folder as its end leaves it; of a critic that has learned to tell samples apart, if nothing else."""
    config = tiny_config(rewards=[{"name": "jpeg_compressibility"}])
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(config, folder / "config.json")
    units = {
        "count": torch.tensor(100.0).double(),
        "mean": torch.tensor([-3.0]).double(),
        "sum_squared_deviation": torch.tensor([25.0]).double(),
    }
    export(folder, tiny_model(config), config, folder, state=units)
    return folder


def test_a_run_is_measured_on_its_own_trajectories(trained, tmp_path, monkeypatch):
    made = []

    class Kept(repro_credit.Credit):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(repro_credit, "Credit", Kept)
    page = repro_credit.measure_credit(trained, tmp_path / "out", SIZE)
    (credit,) = made
    content = json.loads((tmp_path / "out" / "credit.json").read_text())

    trajectory, trained_steps = credit.trajectory, credit.trajectory.trained_steps
    assert [prompt.text for prompt in trajectory.prompts[:5]] == [trajectory.prompts[0].text] * 4 + [
        trajectory.prompts[4].text
    ]
    torch.testing.assert_close(credit.earned, (credit.raw + 3.0) / 0.5)
    returns = credit.earned[:, None].expand_as(trajectory.values)
    assert content["explained_variance_per_step"] == pytest.approx(
        explained_variance(trajectory.values, returns).mean(1).tolist(), abs=1e-9
    )
    errors = (trajectory.values - returns).square().mean(0) / returns.var(0, correction=0)
    assert content["value_error_per_step"] == pytest.approx(errors.mean(1).tolist(), rel=1e-4)

    advantages = credit.advantages()
    assert list(advantages) == list(content["estimators"])
    for name, (numbers, slope) in advantages.items():
        assert numbers.shape == (32, 3) and numbers.std(correction=0).item() == pytest.approx(1.0, rel=1e-4), name
        assert (abs(numbers.mean().item()) < 1e-5) == (name != "raw reward") and slope > 0
    groups = advantages["grpo"].numbers[:, 0].unflatten(0, (8, 4))
    assert groups.mean(1).abs().max() < 1e-4
    rewards = credit.earned[:, 0].unflatten(0, (8, 4))
    apart = (rewards - rewards.mean(1, keepdim=True)).flatten()
    global_std = advantages["grpo, global std"]
    torch.testing.assert_close(global_std.numbers[:, 0], apart / apart.std(correction=0), rtol=1e-4, atol=1e-5)
    # Less by the quarter that a sample is of its group's mean.
    assert global_std.slope == pytest.approx(0.75 / apart.std(correction=0).item(), rel=1e-4)
    gae = advantages["GAE, lambda 1"]
    errors = (returns - trajectory.values)[:, :3, 0]
    torch.testing.assert_close(gae.numbers, (errors - errors.mean()) / errors.std(correction=0))
    assert gae.slope == pytest.approx(1 / errors.std(correction=0).item(), rel=1e-4)

    assert content["foreseeable_per_step"][3:] == [1.0] * (trajectory.values.shape[1] - 3)
    assert all(share < 1 for share in content["foreseeable_per_step"][:3])

    # The gradient of a chunk, from its definition.
    parameters = list(credit.model.trunk.parameters())
    gradients = []
    for chunk in range(4):
        rows = slice(8 * chunk, 8 * chunk + 8)
        loss = 0.0
        for k in range(trained_steps.start, trained_steps.stop):
            conditioning = {name: tensor[rows] for name, tensor in trajectory.conditioning.items()}
            z = trajectory.latents[rows, k]
            prediction, _ = credit.model(z, trajectory.timesteps[k].expand(8), conditioning)
            log_probs = transition_log_prob(prediction, z, trajectory.latents[rows, k + 1], trajectory.table, k)
            loss = loss - (advantages["ddpo"].numbers[rows, k] * log_probs).mean() / 3
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        gradients.append(torch.cat([one.flatten() for one in found]))
    variance = torch.stack(gradients).double().var(0).sum().item()
    assert content["estimators"]["ddpo"]["variance"] == pytest.approx(variance, rel=1e-3)
    assert content["estimators"]["ddpo"]["relative_variance"] == content["estimators"]["ddpo"]["reward_variance"] == 1.0

    text = page.read_text()
    assert "4 samples of each of 8 held-out prompts" in text and "chunk of 8 samples" in text and "4 chunks" in text
    for name, row in content["estimators"].items():
        assert f"| {name} | {row['variance']:.4g} | {row['relative_variance']:.3f} +- " in text
    assert (tmp_path / "out" / "credit.png").stat().st_size > 10_000


def test_continuations_of_a_step_share_its_latents_and_nothing_else(trained, monkeypatch):
    run = SavedRun(trained)
    backbone = run.backbone(torch.float32)
    critic = load_critic(trained / "critic.safetensors", backbone)
    drawn = repro_credit.Credit(run.config, critic, SIZE, torch.device("cpu")).trajectory
    ends = []

    def score(latents, batch):
        ends.append(latents)
        return latents.mean((1, 2, 3))[:, None]

    def ended():
        shares = repro_foresight.foreseeable(
            critic.model, drawn, None, score, size=run.config.rollout.micro_batch_size, count=2
        )
        found = torch.stack(ends).unflatten(0, (3, 2, -1)).flatten(2, 3)  # [steps, continuations, N, ...]
        ends.clear()
        return shares, found

    shares, found = ended()
    assert len(found.flatten(0, 2).flatten(1).unique(dim=0)) == 3 * 2 * 32
    assert shares[3:] == [1.0] * (len(drawn.timesteps) - 3) and shares[0] < shares[1] < shares[2] < 1

    def own(seed, keys, k, shape):
        step = ((keys[0].item() >> 40) - 1) // 2
        return keyed_noise(seed, keys % (1 << 40), step + k + 1, shape)

    monkeypatch.setattr(repro_foresight, "keyed_noise", own)  # with the noise of their own past they repeat it
    shares, found = ended()
    assert all(torch.equal(of, drawn.latents[:, -1]) for of in found.flatten(0, 1)) and shares == [1.0] * len(shares)


def test_a_folder_without_a_critic_is_one_clear_message(trained, tiny_config, tmp_path):
    with pytest.raises(repro_places.Mistake, match="no run there"):
        repro_credit.measure_credit(tmp_path, tmp_path / "out", SIZE)
    save_config(tiny_config(algorithm={"name": "ddpo"}), trained / "config.json")
    with pytest.raises(repro_places.Mistake, match="ddpo trains no critic; give a run of algorithm.name ppo"):
        repro_credit.measure_credit(trained, tmp_path / "out", SIZE)
    save_config(tiny_config(), trained / "config.json")
    shutil.rmtree(trained / "pipeline")
    with pytest.raises(repro_places.Mistake, match="the run has not ended"):
        repro_credit.measure_credit(trained, tmp_path / "out", SIZE)
    assert not (tmp_path / "out").exists()
