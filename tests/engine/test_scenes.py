"""Scenes: captions read back, splits that share nothing, drawings that depend on the seed alone."""

import itertools

import numpy as np
import pytest

from latent_critic.engine.embedded import scenes
from latent_critic.engine.errors import UserError

EVERY_SCENE = list(itertools.chain(*scenes.all_scenes().values()))


def test_every_caption_reads_back_as_its_scene():
    for scene in EVERY_SCENE:
        read = scenes.parse(scene.caption())
        assert (read, read.task) == (scene, scene.task)


def test_captions_are_english_and_unique():
    captions = [scene.caption() for scene in EVERY_SCENE]
    assert len(set(captions)) == len(captions)
    for expected in (
        "a circle",
        "a square and a cross",
        "two red crosses",
        "two red circles and a blue square",
        "a yellow triangle",
        "a green triangle left of a yellow circle",
        "a purple cross and a green square",
        'a red circle and the text "47"',
    ):
        assert expected in captions


@pytest.mark.parametrize(
    "text", ["", "a dog", "a pink circle", "four red circles", "a red circle near a blue square", "a red circle."]
)
def test_other_text_is_refused_with_an_example(text):
    with pytest.raises(UserError, match="write it like 'two red circles and a blue square'"):
        scenes.parse(text)


def test_splits_share_no_combination_of_shape_colour_and_relation():
    used = {
        split: {c for p in scenes.prompts(split, scenes.TASKS) for c in scenes.parse(p).combinations()}
        for split in ("train", "held-out")
    }
    assert not used["train"] & used["held-out"]
    # Neither side is starved: a third of the combinations is held out.
    share = len(used["held-out"]) / (len(used["train"]) + len(used["held-out"]))
    assert 0.25 < share < 0.4


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_prompts_give_every_task_the_same_weight(split):
    prompts = scenes.prompts(split)
    tasks = [scenes.parse(p).task for p in prompts]
    counts = {task: tasks.count(task) for task in scenes.TASKS}
    assert counts.pop("text") == 0
    assert len(set(counts.values())) == 1
    assert len(set(tasks[: len(counts)])) == len(counts)  # interleaved, so that any prefix is balanced too
    assert prompts == scenes.prompts(split)


def test_prompts_of_chosen_tasks():
    assert {scenes.parse(p).task for p in scenes.prompts("train", ["counting", "text"])} == {"counting", "text"}


def test_unknown_split_or_task_is_named():
    with pytest.raises(UserError, match="no split 'test'"):
        scenes.prompts("test")
    with pytest.raises(UserError, match="no task 'colours'.*single_object"):
        scenes.prompts("train", ["colours"])


def test_drawing_is_a_function_of_scene_and_seed():
    scene = scenes.parse("two red circles and a blue square")
    first, again, other = (scenes.draw(scene, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_random_scenes_are_deterministic_and_cover_every_task():
    drawn = [[scenes.random_scene(rng) for _ in range(200)] for rng in map(np.random.default_rng, (0, 0))]
    assert drawn[0] == drawn[1]
    assert {scene.task for scene in drawn[0]} == set(scenes.TASKS)


def test_pictures_have_the_named_colour_and_dark_text_below():
    picture = scenes.draw(scenes.parse('a green square and the text "47"'), np.random.default_rng(0)).astype(int)
    # Drawn hues vary by at most 10 a channel; the text is (16, 16, 16) before its borders are smoothed.
    green = (abs(picture - scenes.COLORS["green"]) <= 10).all(axis=-1)
    dark = (picture <= 16).all(axis=-1)
    assert green[:32].sum() > 200 and green[32:].sum() == 0
    assert dark[32:].sum() > 50 and dark[:32].sum() == 0
