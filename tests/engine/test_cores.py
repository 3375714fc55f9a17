"""Cores: a process's share, and the number of threads that is faster."""

import pytest
import torch

from latent_critic.engine import cores
from latent_critic.engine.cores import RETRY, Cores


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("environment, share", [({}, 8), ({"LOCAL_SIZE": "2"}, 4), ({"LOCAL_SIZE": "16"}, 1)])
def test_processes_of_a_machine_share_its_cores(monkeypatch, environment, share):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores.cores_of_this_process() == share
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # asked for, for each process
    assert cores.cores_of_this_process() == 8


@pytest.fixture
def run(monkeypatch):
    """run(kind, seconds={threads: s}) -> threads of the next pass of this kind, which takes so long on so many."""
    now = [0.0]
    monkeypatch.setattr(cores.time, "perf_counter", lambda: now[0])
    shared = Cores(2)

    def one_pass(kind, seconds):
        with shared.one_pass(kind):
            found = torch.get_num_threads()
            now[0] += seconds[found]
        assert torch.get_num_threads() == 1
        return found

    return one_pass


QUIET, CROWDED = {2: 0.6, 1: 1.0}, {2: 9.0, 1: 2.0}


def test_takes_all_cores_where_they_help(run):
    found = [run("ppo", QUIET) for _ in range(3 * RETRY)]
    assert found[:3] == [2, 1, 2]  # now it is known
    assert found.count(1) == 3 and found[3:RETRY] == [2] * (RETRY - 3)  # and tried again twice


def test_a_crowded_machine_is_left_to_others_and_taken_again(run):
    for _ in range(10):
        run("ppo", QUIET)
    assert run("ppo", CROWDED) == 2  # who could know
    crowded = [run("ppo", CROWDED) for _ in range(RETRY)]
    assert crowded[0] == 1 and crowded.count(2) == 1
    quiet = [run("ppo", QUIET) for _ in range(2 * RETRY)]
    assert quiet[-10:] == [2] * 10


def test_kinds_of_passes_are_judged_apart(run):
    for _ in range(3):
        assert run("critic", {2: 3.0, 1: 1.0}) in (1, 2)
    assert run("critic", {2: 3.0, 1: 1.0}) == 1
    assert [run("ppo", QUIET) for _ in range(4)] == [2, 1, 2, 2]


def test_the_first_pass_may_be_slow(run):
    assert [run("ppo", {2: 5.0, 1: 1.0}), *(run("ppo", QUIET) for _ in range(4))] == [2, 1, 2, 2, 2]


def test_one_core_changes_nothing(monkeypatch):
    monkeypatch.setattr(cores.time, "perf_counter", lambda: pytest.fail("measured"))
    torch.set_num_threads(2)
    with Cores(1).one_pass("ppo"):
        assert torch.get_num_threads() == 2


def test_a_pass_that_fails_gives_the_cores_back():
    with pytest.raises(RuntimeError), Cores(2).one_pass("ppo"):
        raise RuntimeError
    assert torch.get_num_threads() == 1
