"""Rewards that say nothing, or stop in the middle of a run: who is named, and what is kept."""

import json
import re

import pytest

from latent_critic.engine.rewards import ANY_VALUE, ConstantGuard, Reward, RewardError, guards

from . import tiny_runs


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(guards, "notice", lines.append)
    return lines


def guard(*limits):
    return ConstantGuard(
        [Reward(f"r{m}", 1.0, ANY_VALUE, None, None, stop_if_constant=limit) for m, limit in enumerate(limits)]
    )


def test_three_constant_iterations_stop_after_a_warning(told):
    found = guard(3, 3)
    found.observe([0.0, 1.0], [0.0, 2.0], 256)
    assert told == []
    found.observe([0.5, 1.0], [0.5, 2.0], 256)
    assert told == [
        "reward 'r0' gave one score to all 256 pictures (now 0.5) for 2 iterations in a row; at 3 the run stops"
    ]
    expected = (
        r"^reward 'r0' gave one score to all 256 pictures \(now 0\) for 3 iterations in a row: there is nothing to "
        r"learn from it\. .* set rewards\[\]\.stop_if_constant to null"
    )
    with pytest.raises(RewardError, match=expected):
        found.observe([0.0, 1.0], [0.0, 2.0], 256)


def test_only_iterations_in_a_row_count(told):
    found = guard(3)
    for low, high in ((1, 1), (1, 1), (1, 1.5), (1, 1), (1, 1), (0, 1), (1, 1)):
        found.observe([low], [high], 8)
    assert len(told) == 2


def test_limits_of_their_own_and_none_at_all(told):
    found = guard(2, None)
    found.observe([0.0, 0.0], [0.0, 0.0], 8)
    assert len(told) == 1 and "'r0'" in told[0] and "for 1 iteration in a row; at 2" in told[0]
    with pytest.raises(RewardError, match="'r0' .* for 2 iterations"):
        found.observe([0.0, 0.0], [0.0, 0.0], 8)
    for _ in range(9):
        found.observe([1.0, 0.0], [2.0, 0.0], 8)
    assert len(told) == 1


def test_one_picture_is_no_constant(told):
    found = guard(2)
    for _ in range(5):
        found.observe([1.0], [1.0], 1)
    assert told == []


# ------------------------------------------------------------------------------------------------- in a run's middle

REWARDS = """
import json
from pathlib import Path
import torch

calls = []


def judge(images, prompts, metadata):
    calls.append(1)
    plan = json.loads(Path("plan.json").read_text())
    if len(calls) <= plan["constant"]:
        return [0.25] * len(prompts)
    values = images.float().mean((1, 2, 3)) / 255
    return values * torch.nan if len(calls) == plan["broken"] else values
"""


def start(pipeline, folder, constant=0, broken=0):
    """A run of 1 + 3 iterations that is evaluated before and after; its reward is called twice in each of these.

    Its first `constant` calls give one score to all, and the call number `broken` gives NaN.
    """
    config = tiny_runs.run_config(
        pipeline,
        rewards=[{"name": "tiny_rewards:judge"}],
        training={"checkpoint_every": 10},
        evaluation={"every": 0, "num_prompts": 2},
    )
    tiny_runs.prepare(folder, config)
    (folder / "tiny_rewards.py").write_text(REWARDS)
    (folder / "plan.json").write_text(json.dumps({"constant": constant, "broken": broken}))
    return tiny_runs.train(folder, "--resume", "auto")


def rows(folder):
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds") and k != "overhead"} for row in found]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir() if path.is_dir())


def test_a_reward_that_fails_leaves_a_checkpoint_and_the_run_goes_on_exactly(tiny_pipeline, tmp_path):
    """The guard stops it in the third iteration, of which nothing was learned. It goes on, and fails in the evaluation
    after the last. What was learned before is kept each time, and in the end the run is one that never stopped."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    run = start(tiny_pipeline, stopped, constant=99)
    assert run.wait() == [2]
    what = "reward 'tiny_rewards:judge' gave one score to all 4 pictures (now 0.25) for"
    assert f"{what} 2 iterations in a row; at 3 the run stops\n" in run.stderr()
    assert f"error: {what} 3 iterations in a row: there is nothing to learn" in run.stderr()
    assert checkpoints(stopped) == ["iteration-000000", "iteration-000002"]
    assert [row["iteration"] for row in rows(stopped)] == [0, 1, 2]

    run = start(tiny_pipeline, stopped, broken=5)  # after the calls of two iterations
    assert run.wait() == [2]
    assert re.search("^error: reward 'tiny_rewards:judge' returned nan for prompt", run.stderr(), re.MULTILINE)
    assert checkpoints(stopped) == ["iteration-000002", "iteration-000004"]
    assert [row["iteration"] for row in rows(stopped)] == [0, 1, 2, 3, 4]
    assert "eval/tiny_rewards:judge" not in rows(stopped)[-1]

    start(tiny_pipeline, stopped).finish()
    start(tiny_pipeline, whole, constant=6).finish()  # calls of the evaluation before, and of two iterations
    assert rows(stopped) == rows(whole) and len(rows(whole)) == 5
    assert rows(whole)[-1]["eval/tiny_rewards:judge"] != 0.25
