"""Rewards in processes of their own: the same scores, errors that come through, and no process left behind.

A process of a pool takes seconds to start, as it imports torch. So one parent goes through everything, and the tests
look at what it saw.
"""

import json
import os
import select
import signal
import threading

import pytest

from latent_critic.engine.errors import UserError
from latent_critic.engine.rewards import pool

from .reward_processes import PATIENCE, start, wait_until

PROMPTS = ["a", "bb", "ccc", "dddd", "e"]
METADATA = [{"n": 12}] * 5
REWARDS = """
import os
import sys
import torch

MODELS = {"transformers", "diffusers", "onnxruntime", "scipy", "uvicorn"} & set(sys.modules)


class Judge:
    value_range = (0, 510)

    def __init__(self, scale=1):
        self.scale, self.calls = scale, 0

    def score(self, images, prompts, metadata):
        if "die" in prompts:
            os.kill(os.getpid(), 9)
        self.calls += 1
        known = {"process": os.getpid(), "calls": self.calls, "threads": torch.get_num_threads(), "batch": len(prompts)}
        extras = {name: [value] * len(prompts) for name, value in known.items()}
        extras["models"] = [len(MODELS)] * len(prompts)
        extras["metadata"] = [m["n"] / len(p) for p, m in zip(prompts, metadata)]
        return images[:, 0, 0, 0].float() * self.scale, extras

    def check_prompt(self, prompt, metadata):
        from latent_critic.engine.errors import UserError

        if prompt == "x":
            raise UserError(f"no x with {metadata['n']}")


class Broken(Judge):
    def __init__(self):
        raise OSError("no weights")
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the parent of a pool saw; then it is killed, and its child must end."""
    folder = tmp_path_factory.mktemp("pool")
    (folder / "pooled.py").write_text(REWARDS)
    os.mkfifo(folder / "alive")
    reward = {"name": "pooled:Judge", "params": {"scale": 2}, "workers": 2}
    images = [[[[n, n, n]]] for n in (3, 1, 4, 1, 5)]
    parent = start(folder, "go_through_a_pool", reward, images, PROMPTS, METADATA, daemon=False)
    wait_until(lambda: (folder / "paused").exists() or not parent.is_alive())
    assert parent.is_alive(), "the parent failed"
    output = os.open(folder / "alive", os.O_RDONLY)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(PATIENCE)
    found = json.loads((folder / "seen.json").read_text())
    # It ends when the last process has closed it.
    while (readable := select.select([output], [], [], PATIENCE)[0]) and os.read(output, 1000):
        pass
    found["all have ended"] = bool(readable)
    os.close(output)
    return found


def test_scores_are_those_of_one_process_in_their_order(seen):
    for call in ("first", "second"):
        assert seen[call]["values"] == [6, 2, 8, 2, 10]
        assert seen[call]["metadata"] == [12, 6, 4, 3, 12]
    assert seen["about"] == [[0, 510], True]


def test_a_batch_is_shared_out_and_each_process_builds_its_scorer_once(seen):
    """Of 5 pictures one process takes 3, another 2; in all each call of a process is counted by the same scorer."""
    assert seen["first"]["batch"] == seen["second"]["batch"] == [3, 3, 3, 2, 2]
    calls = [
        call for name in ("first", "second") for call in zip(seen[name]["process"], seen[name]["calls"], strict=True)
    ]
    by_process = {}
    for process, number in dict.fromkeys(calls):
        by_process.setdefault(process, []).append(number)
    assert sum(map(len, by_process.values())) == 4
    assert all(sorted(numbers) == list(range(1, len(numbers) + 1)) for numbers in by_process.values())


def test_its_processes_compute_on_one_thread(seen):
    assert seen["first"]["threads"] == [1] * 5


def test_rewards_are_imported_without_the_models_of_others(seen):
    assert seen["first"]["models"] == [0] * 5


def test_errors_are_those_of_one_process(seen):
    assert seen["raised"].startswith("RewardError: reward 'pooled:Judge' failed on prompt 'e': KeyError: 'n', at ")
    assert seen["checked"] == "UserError: no x with 7"


def test_a_killed_process_is_told_with_the_name_of_its_reward(seen):
    expected = "RewardError: reward 'pooled:Judge': one of its 2 processes ended by itself or was killed"
    assert seen["killed"].startswith(expected) and seen["afterwards"].startswith(expected)


def test_no_process_outlives_a_parent_that_was_killed(seen):
    assert seen["all have ended"]


def test_what_building_raises_comes_with_the_first_task(tmp_path, monkeypatch):
    """And whatever comes of building, the process watches its parent."""
    watching = threading.Event()
    (tmp_path / "pooled_too.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "_end_with_parent", watching.set)
    monkeypatch.setattr(pool.signal, "signal", lambda *_: None)
    monkeypatch.setattr(pool, "_built", None)
    pool._start("pooled_too:Broken", {}, "cpu")
    for task in (pool._value_range, lambda: pool._check_prompts(["a"], [{}])):
        with pytest.raises(UserError, match="'pooled_too:Broken' could not be built: OSError: no weights, at .*too.py"):
            task()
    assert watching.wait(PATIENCE)
