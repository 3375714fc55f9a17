"""Scoring beside the rollout: the same scores in the same order, and what a reward raises."""

import threading
from types import SimpleNamespace

import pytest
import torch

from latent_critic.engine.errors import UserError
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.rewards import ANY_VALUE, ConstantGuard, Reward, RewardError
from latent_critic.engine.scoring import Scoring

PATIENCE = 60  # seconds until a thread that should have moved on counts as hanging


class Pictures:
    """A backbone that decodes a latent to a grey of its mean."""

    def decode(self, latents):
        return latents.mean((1, 2, 3)).to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)


def part(*greys):
    latents = torch.tensor(greys, dtype=torch.float32)[:, None, None, None, None].expand(-1, 3, 1, 4, 4).clone()
    latents[:, :-1] = 200.0  # only the last latent is a picture
    prompts = [Prompt(f"grey {grey}", {"grey": grey}) for grey in greys]
    return SimpleNamespace(latents=latents, prompts=prompts)


def reward(score, **more):
    return Reward(score.__name__, 1.0, ANY_VALUE, score, lambda prompts, metadata: None, **more)


def grey(images, prompts, metadata):
    assert [m["grey"] for m in metadata] == [int(p.split()[1]) for p in prompts] == images[:, 0, 0, 0].tolist()
    return images.float().mean((1, 2, 3))


def twice(images, prompts, metadata):
    return 2 * grey(images, prompts, metadata)


def test_scores_come_in_the_order_of_the_samples():
    scoring = Scoring(Pictures(), [reward(grey), reward(twice)])
    for start, greys in ((2, (4, 1, 5)), (0, (3, 1)), (5, (9,))):  # side by side they end in any order
        scoring.submit(start, part(*greys))
    images, scores = scoring.result()
    assert images.shape == (6, 2, 2, 3) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [3, 1, 4, 1, 5, 9]
    assert scores.tolist() == [[x, 2 * x] for x in (3, 1, 4, 1, 5, 9)]


def test_sampling_goes_on_while_a_reward_scores():
    sampled = threading.Event()

    def slow(images, prompts, metadata):
        assert sampled.wait(PATIENCE), "submit() waited for the reward"
        return grey(images, prompts, metadata)

    scoring = Scoring(Pictures(), [reward(slow)])
    scoring.submit(0, part(7))
    sampled.set()
    assert scoring.result()[1].tolist() == [[7]]


def test_rewards_are_called_by_one_thread_of_the_process():
    """The libraries of a GPU plan for each thread anew."""
    threads = set()

    def here(images, prompts, metadata):
        threads.add(threading.get_ident())
        return grey(images, prompts, metadata)

    for _ in range(2):
        scoring = Scoring(Pictures(), [reward(here)])
        scoring.submit(0, part(7))
        scoring.result()
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_who_waits_for_the_scores_decodes_too():
    decoded = threading.Event()

    class Last(Pictures):
        def decode(self, latents):
            if latents.mean() == 9:
                decoded.set()
            return super().decode(latents)

    def slow(images, prompts, metadata):
        assert decoded.wait(PATIENCE), "the last picture waited for a reward"
        return grey(images, prompts, metadata)

    scoring = Scoring(Last(), [reward(slow)])
    scoring.submit(0, part(7))
    scoring.submit(1, part(9))
    assert scoring.result()[1].tolist() == [[7], [9]]


def test_a_failing_reward_stops_the_run():
    def broken(images, prompts, metadata):
        raise RuntimeError("its model is gone")

    scoring = Scoring(Pictures(), [reward(broken)])
    scoring.submit(0, part(7))
    with pytest.raises(UserError, match="'broken' failed on prompt 'grey 7'.*its model is gone"):
        scoring.result()


def test_a_failing_decoder_stops_the_run():
    class Broken(Pictures):
        def decode(self, latents):
            raise RuntimeError("no memory for the decoder")

    scoring = Scoring(Broken(), [reward(grey)])
    scoring.submit(0, part(7))
    with pytest.raises(RuntimeError, match="no memory for the decoder"):
        scoring.result()


def test_the_trunk_keeps_its_threads():
    before = torch.get_num_threads()
    seen = []

    def counting(images, prompts, metadata):
        seen.append(torch.get_num_threads())
        return grey(images, prompts, metadata)

    torch.set_num_threads(2)
    try:
        scoring = Scoring(Pictures(), [reward(counting)])
        scoring.submit(0, part(7))
        scoring.result()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_pictures_are_decoded_while_rewards_elsewhere_are_awaited():
    """Two of them, at once; one that computes here scores meanwhile. Columns and samples keep their order."""
    others, seen = threading.Barrier(2, timeout=PATIENCE), threading.Event()

    def remote(images, prompts, metadata):
        others.wait()
        assert seen.wait(PATIENCE), "decoding waited for the reward"
        return grey(images, prompts, metadata)

    def second(images, prompts, metadata):
        return 3 * remote(images, prompts, metadata)

    def here(images, prompts, metadata):
        if images[0, 0, 0, 0] == 9:
            seen.set()
        return twice(images, prompts, metadata)

    rewards = [reward(remote, is_elsewhere=True), reward(here), reward(second, is_elsewhere=True)]
    scoring = Scoring(Pictures(), rewards)
    scoring.submit(1, part(9))
    scoring.submit(0, part(7))
    assert scoring.result()[1].tolist() == [[7, 14, 21], [9, 18, 27]]


def test_extras_are_means_of_what_is_known():
    def extra(images, prompts, metadata):
        greys = grey(images, prompts, metadata)
        odd = torch.where(greys % 2 == 1, greys, torch.nan)
        return greys, {"odd": odd, "all": greys, "none": odd * torch.nan}

    scoring = Scoring(Pictures(), [reward(grey), reward(extra)])
    scoring.submit(0, part(3, 4))
    scoring.submit(2, part(5))
    scoring.result()
    assert scoring.extras == {"extra/odd": 4, "extra/all": 4}


def test_after_a_failure_no_other_batch_waits_as_long_again():
    """And who asks again is told the same: several threads of an update do."""
    calls = []

    def away(images, prompts, metadata):
        calls.append(prompts)
        raise RewardError("the server is away")

    scoring = Scoring(Pictures(), [reward(away), reward(grey, is_elsewhere=True)])
    for start in range(5):
        scoring.submit(start, part(start))
    for _ in range(2):
        with pytest.raises(RewardError, match="the server is away"):
            scoring.result()
    assert len(calls) == 1


def test_the_guard_is_shown_an_iteration():
    shown = []
    guard = ConstantGuard([])
    guard.observe = lambda *given: shown.append(given)
    scoring = Scoring(Pictures(), [reward(grey), reward(twice)], guard)
    scoring.submit(0, part(3, 4, 5))
    scoring.submit(3, part(2))
    scoring.result()
    scoring.result()
    assert shown == [([2, 4], [5, 10], 4)]
