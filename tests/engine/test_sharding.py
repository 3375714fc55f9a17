"""ZeRO-3 on one process and on two against torch alone: the same rollouts, metrics and weights, from real shards.

The four runs, each in processes of its own, do one critic-only update and twice a PPO and a critic-only update. In one
of them both processes have two cores, and so two passes at a time.
"""

import pytest
import torch

from latent_critic.engine import sharding

from . import tiny_runs


@pytest.fixture(scope="module")
def runs(tiny_pipeline, tmp_path_factory):
    """Runs by name; all are started before the first is waited for."""
    kinds = {"plain": {"plain": True}, "one": {}, "two": {"ranks": 2}, "four cores": {"ranks": 2, "cores": 2}}
    return {
        name: tiny_runs.look(name, tiny_pipeline, tmp_path_factory.mktemp(name), **kind) for name, kind in kinds.items()
    }


@pytest.fixture(scope="module")
def plain(runs):
    return tiny_runs.seen(runs["plain"])


@pytest.fixture(scope="module")
def one(runs):
    return tiny_runs.seen(runs["one"])


@pytest.fixture(scope="module")
def two(runs):
    return tiny_runs.seen(runs["two"])


@pytest.fixture(scope="module")
def four_cores(runs):
    return tiny_runs.seen(runs["four cores"])


@pytest.mark.parametrize("sharded", ["one", "two", "four_cores"])
def test_weights_agree_with_torch_alone(plain, sharded, request):
    """After 5 updates, 2 of them of the policy. A gradient's rounding errors are 1e-6 of its largest elements, and
    Adam turns elements as small as those into steps of up to the learning rate, 1e-4 and 3e-4."""
    found = request.getfixturevalue(sharded)["final"]
    assert found.keys() == plain["final"].keys()
    errors = {name: (found[name] - plain["final"][name]).abs().max().item() for name in found}
    moved = {name: (found[name] - plain["initial"][name]).abs().max().item() for name in found}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-5, (worst, errors[worst])
    assert all(distance > 1e-4 for name, distance in moved.items() if not tiny_runs.UNTRAINED.search(name))


def test_every_rank_holds_its_part_only(one, two, runs):
    other = tiny_runs.seen(runs["two"], rank=1)["shards"]
    for name, (whole, part, in_use) in two["shards"].items():
        assert in_use == 0, name  # between uses nothing is gathered: the persistence threshold is 0
        assert part == other[name][1] == -(-whole // 2), name
        assert one["shards"][name] == (whole, whole, 0), name
    assert {name: whole for name, (whole, *_) in two["shards"].items()} == {
        name: tensor.numel() for name, tensor in two["final"].items() if name != "trunk.pos_embed.pos_embed"
    }


def test_whole_weights_are_gathered_on_rank_0_alone(two, runs):
    assert tiny_runs.seen(runs["two"], rank=1)["final"] == {}
    assert two["final"]["trunk.transformer_blocks.0.attn.to_q.weight"].shape == (64, 64)


def test_the_copy_for_sampling_follows_the_weights_at_fixed_addresses(plain, one, two, four_cores, runs):
    pairs = (plain, plain), (one, one), (two, two), (tiny_runs.seen(runs["two"], rank=1), two), (four_cores, four_cores)
    for run, whole in pairs:
        assert run["copy stayed"]
        assert run["copy"].keys() == {name for name in whole["final"] if name != "trunk.pos_embed.pos_embed"}
        assert all(torch.equal(tensor, whole["final"][name]) for name, tensor in run["copy"].items())


def test_ranks_together_draw_what_one_draws(plain, one, two, four_cores, runs):
    """The same micro-batches through the same weights: to the last bit."""
    assert torch.equal(one["rollout"], plain["rollout"])
    for name, first in (("two", two), ("four cores", four_cores)):
        both = torch.cat([first["rollout"], tiny_runs.seen(runs[name], rank=1)["rollout"]])
        assert torch.equal(both, plain["rollout"])
    assert both.std() > 0.3 and both.shape == (8, 4, 4, 16, 16)


def test_metrics_agree(plain, one, two, four_cores):
    """The first iteration starts from the same weights, so that only the order of sums differs; later ones follow from
    weights that differ by less than 1e-5, through a picture's 8 bits: a flip of one is 1 / 255 / (64 x 64 x 3)."""
    keys = ["reward/tiny_rewards:brightness", "reward/tiny_rewards:brightness_std", "reward/tiny_rewards:redness"]
    keys += ["value_loss", "explained_variance", "grad_norm/critic"]
    for found in (one, two, four_cores):
        assert [row["phase"] for row in found["rows"]] == ["value_pretraining", "ppo", "ppo"]
        for iteration, (expected, row) in enumerate(zip(plain["rows"], found["rows"], strict=True)):
            assert row["samples"] == 8
            tolerance = 1e-6 if iteration == 0 else 1e-4
            for key in keys:
                assert row[key] == pytest.approx(expected[key], rel=tolerance, abs=tolerance), (iteration, key)
            assert row["explained_variance_per_step"] == pytest.approx(
                expected["explained_variance_per_step"], abs=tolerance
            )
            if iteration:
                assert row["grad_norm/actor"] == pytest.approx(expected["grad_norm/actor"], rel=tolerance)
                assert row["first_ratio"] == row["ratio_mean"] == 1.0
                assert row["first_ratio_deviation"] == row["clipfrac"] == row["approx_kl"] == 0.0
    assert plain["rows"][2]["explained_variance"] != 0.0


def test_clipping_acted(plain):
    """What is compared includes DeepSpeed's gradient clipping."""
    assert all(row["grad_norm/critic"] > 0.05 for row in plain["rows"])


def test_evaluation_agrees_though_the_ranks_have_a_prompt_to_spare(plain, two, runs):
    expected, found = plain["evaluation"], two["evaluation"]
    assert found["prompts"] == expected["prompts"] and len(found["prompts"]) == 5
    assert found["images"].shape == (5, 64, 64, 3)
    assert (found["images"].int() - expected["images"].int()).abs().max() <= 1
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["values"], expected["values"], rtol=0, atol=1e-4)
    other = tiny_runs.seen(runs["two"], rank=1)["evaluation"]
    assert torch.equal(other["scores"], found["scores"]) and torch.equal(other["images"], found["images"])


def test_no_op_of_deepspeed_is_compiled(runs):
    for run in (runs["one"], runs["two"]):
        run.finish()
        assert not (run.folder / "extensions").exists()


@pytest.mark.parametrize("environment, share", [({}, 8), ({"LOCAL_SIZE": "2"}, 4), ({"LOCAL_SIZE": "16"}, 1)])
def test_processes_of_a_machine_share_its_cores(monkeypatch, environment, share):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sharding.cores_of_this_process() == share
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # asked for, for each process
    assert sharding.cores_of_this_process() == 8
