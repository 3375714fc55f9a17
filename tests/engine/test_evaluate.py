"""Evaluation: rows with their standard errors, the same on any number of ranks and the same twice, its own guidance."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from latent_critic.engine import evaluate, monitors
from latent_critic.engine.advantages import explained_variance
from latent_critic.engine.algorithms import build_algorithm
from latent_critic.engine.evaluate import Evaluation, Evaluator
from latent_critic.engine.prompt_cache import PromptCache
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.rewards import ANY_VALUE, Reward
from latent_critic.engine.rollout import Rollout
from latent_critic.engine.saved_evaluations import read_evaluations
from latent_critic.engine.world import World

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares"), Prompt("a dog", {"tag": "animals", "shift": 0.25})]


def red(images, prompts, metadata):
    """Mean of the red channel, 0 to 1, and what the prompt's metadata adds."""
    return [image[..., 0].double().mean() / 255 + m.get("shift", 0) for image, m in zip(images, metadata, strict=True)]


def blue(images, prompts, metadata):
    return images[..., 2].double().mean((1, 2)) / 255


CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
RED, BLUE = (Reward(f.__name__, 1.0, ANY_VALUE, f, lambda prompt: None) for f in (red, blue))


@pytest.fixture
def without_processes(monkeypatch):
    """Other tests may have left this process in a world of one, in which rewards would ask their peers how it went."""
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: False)


@pytest.fixture
def gather_alone(monkeypatch, without_processes):
    """all_gather_object of a world of one."""
    monkeypatch.setattr(evaluate.dist, "all_gather_object", lambda found, mine: found.__setitem__(0, mine))


@pytest.fixture
def make(tiny_config, tiny_model):
    """make(world, statistics, **sections) -> evaluator and the rollout it runs. statistics: count, mean and std of what
    the algorithm has observed of the reward."""

    def build(world=ALONE, statistics=(4, 0.5, 0.1), **sections):
        evaluation = {"num_prompts": 7, "num_inference_steps": 3, "seed": 4, **sections.pop("evaluation", {})}
        config = tiny_config(evaluation=evaluation, rewards=[{"name": "jpeg_compressibility"}], **sections)
        model = tiny_model(config)
        schedule = model.backbone.schedule("flow-sde", 0.7, config.rollout.num_inference_steps, num_trained_steps=2)
        algorithm, (count, mean, std) = build_algorithm(config, torch.ones(1)), statistics
        if config.has_critic:
            squares = torch.tensor([count * std**2])
            state = {"count": torch.tensor(count), "mean": torch.tensor([mean]), "sum_squared_deviation": squares}
            algorithm.load_state_dict(state)
        evaluator = Evaluator(config, world, model.backbone, PROMPTS, [RED], [BLUE, RED], algorithm, schedule)
        encode, shape = PromptCache(model.backbone, CPU), model.backbone.latent_shape
        return evaluator, Rollout([model], encode, shape, config.rollout.micro_batch_size, CPU)

    return build


# --------------------------------------------------------------------------------------------------------------- rows


def example():
    prompts = [
        Prompt("a red circle"),
        Prompt("a blue square"),
        Prompt("two red circles"),
        Prompt("a dog", {"tag": "animals"}),
    ]
    scores = torch.tensor([[0.2, 1.0], [0.4, 0.0], [0.9, 1.0], [0.5, 1.0]])
    values = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 3.0], [0.0, 3.0]])[:, :, None]
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None].expand(4, 2, 1)
    names, images = ["composition", "composition_strict"], torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    return Evaluation(prompts, names, scores, images, values, returns, {"diversity": 0.25})


def test_row_by_hand():
    """Scores .2 .4 .9 .5: mean .5, squared deviations .26, standard error sqrt(.26 / 3 / 4); strict: sqrt(.75 / 3 / 4).

    Returns 1 2 3 4 have variance 1.25. Step 0 predicts nothing: explained 0. Step 1 leaves 0 1 0 1: 1 - .25 / 1.25.
    """
    row = example().row()
    assert set(row) == {
        "eval/composition",
        "eval/composition_stderr",
        "eval/composition_strict",
        "eval/composition_strict_stderr",
        "eval/task/colors",
        "eval/task/counting",
        "eval/task/animals",
        "eval/monitor/diversity",
        "eval/explained_variance",
        "eval/explained_variance_per_step",
    }
    expected = {
        "eval/composition": 0.5,
        "eval/composition_stderr": math.sqrt(0.26 / 12),
        "eval/composition_strict": 0.75,
        "eval/composition_strict_stderr": 0.25,
        "eval/task/colors": 0.5,
        "eval/task/counting": 1.0,
        "eval/task/animals": 1.0,
        "eval/monitor/diversity": 0.25,
        "eval/explained_variance": 0.4,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-6), name  # scores are float32
    assert row["eval/explained_variance_per_step"] == pytest.approx([0.0, 0.8])
    assert json.loads(json.dumps(row)) == row


def test_tasks_are_scored_by_the_first_reward_without_a_strict_one():
    found = example()
    found.names = ["composition", "background"]
    assert found.row()["eval/task/colors"] == pytest.approx(0.3)


def test_rows_need_no_other_process(monkeypatch):
    """Every rank holds all prompts, and rank 0 alone may write a row: nothing is summed over ranks."""

    def refuse(*args, **kwargs):
        raise AssertionError("a collective")

    for name in ("all_reduce", "all_gather_object", "barrier"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert example().row()["eval/explained_variance"] == pytest.approx(0.4)


def test_explained_variance_is_that_of_training():
    generator = torch.Generator().manual_seed(0)
    found = example()
    found.values, found.returns = (torch.randn(50, 3, 2, generator=generator) for _ in range(2))
    found.returns[:, 1] = 0.3  # nothing to explain
    expected = explained_variance(found.values, found.returns)
    assert found.explained_variance[1].tolist() == [0, 0] == expected[1].tolist()
    torch.testing.assert_close(found.explained_variance, expected, rtol=1e-12, atol=1e-12)


def test_saved_files_hold_every_prompt(tmp_path):
    found = example()
    found.images = (torch.arange(4 * 12) % 256).view(4, 2, 2, 3).to(torch.uint8)
    found.save(tmp_path / "evaluations" / "iteration-000003", {"seed": 4, "guidance_scale": 1.0})
    content = json.loads((tmp_path / "evaluations/iteration-000003.json").read_text())
    assert content["settings"] == {"seed": 4, "guidance_scale": 1.0}
    assert content["prompts"] == ["a red circle", "a blue square", "two red circles", "a dog"]
    assert content["scores"]["composition"] == pytest.approx([0.2, 0.4, 0.9, 0.5])
    assert content["scores"]["composition_strict"] == [1, 0, 1, 1]
    stored = np.load(tmp_path / "evaluations/iteration-000003.npz")
    assert np.array_equal(stored["images"], found.images)
    assert stored["values"].tolist() == [[0, 1], [0, 1], [0, 3], [0, 3]] and stored["rewards"].tolist() == [1, 2, 3, 4]
    assert sorted(path.suffix for path in (tmp_path / "evaluations").iterdir()) == [".json", ".npz", ".png"]


def test_the_sheet_has_a_green_border_where_all_is_right_and_small_pictures(tmp_path):
    """Scores are 1 0 1 1. Pictures of 512 pixels are shown at 192, each with 8 of border and 10 to the next."""
    found = example()
    found.images = torch.full((4, 512, 512, 3), 90, dtype=torch.uint8)
    found.save(tmp_path / "evaluations" / "iteration-000003", {})
    with Image.open(tmp_path / "evaluations/iteration-000003.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    assert sheet.shape[1] == 4 * (192 + 8 + 10) + 10
    borders = [tuple(sheet[11, 12 + 210 * i]) for i in range(4)]
    assert borders == [(26, 152, 80), (215, 48, 39), (26, 152, 80), (26, 152, 80)]
    assert tuple(sheet[20, 20]) == (90, 90, 90)
    (evaluation,) = read_evaluations(tmp_path)
    assert evaluation.thumbnails.shape == (4, 192, 192, 3) and (evaluation.thumbnails == 90).all()
    assert evaluation.arrays["images"].shape == (4, 512, 512, 3) and evaluation.marks(3) == [True, False, True]


def test_a_file_of_scores_means_that_all_of_it_is_there(tmp_path, monkeypatch):
    """Killed while pictures are written, or scores: no JSON that a resumed run would take for an evaluation."""
    folder = tmp_path / "evaluations"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    for where, name in ((evaluate.np, "savez"), (evaluate.reports, "save_grid"), (evaluate.Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, killed)
            with pytest.raises(KeyboardInterrupt):
                example().save(folder / "iteration-000003", {})
        assert not list(folder.glob("iteration-*.json"))
    example().save(folder / "iteration-000003", {})
    assert [path.name for path in folder.glob("*.json*")] == ["iteration-000003.json"]


# ---------------------------------------------------------------------------------------------------------- evaluating


def test_evaluation_of_a_model(make, gather_alone):
    """Scores of ODE samples by all rewards, each once; values and returns along the stochastic rollouts."""
    evaluator, rollout = make()
    found = evaluator(rollout)
    assert [p.text for p in found.prompts] == [PROMPTS[i % 3].text for i in range(7)]
    assert found.names == ["red", "blue"] and found.scores.shape == (7, 2)
    assert found.images.shape == (7, 64, 64, 3) and found.images.dtype == torch.uint8
    shift = torch.tensor([p.metadata.get("shift", 0.0) for p in found.prompts])
    floats = found.images.double() / 255
    # Scores are float32, of numbers up to 1.25.
    torch.testing.assert_close(found.scores[:, 0].double(), floats[..., 0].mean((1, 2)) + shift, rtol=0, atol=2e-7)
    torch.testing.assert_close(found.scores[:, 1].double(), floats[..., 2].mean((1, 2)), rtol=0, atol=2e-7)
    assert found.images[0].ne(found.images[3]).float().mean() > 0.5  # the prompt comes again with another seed

    assert found.values.shape == found.returns.shape == (7, 4, 1)  # of all steps
    assert found.values.std() > 0.02 and torch.equal(found.returns[:, 0], found.returns[:, 2])
    earned = found.returns[:, 0, 0] * 0.1 + 0.5
    assert bool(((earned > 0) & (earned < 1.25)).all()) and not torch.allclose(earned, found.scores[:, 0], atol=0.01)
    row = found.row()
    assert row["eval/red"] == pytest.approx(found.scores[:, 0].double().mean().item())
    assert {key for key in row if "task" in key} == {"eval/task/colors", "eval/task/counting", "eval/task/animals"}

    expected = monitors.monitor(monitors.measure(found.images))
    assert found.monitors == expected and row["eval/monitor/diversity"] == expected["diversity"] > 1

    again = evaluator(rollout)
    for name in ("scores", "images", "values", "returns"):
        assert torch.equal(getattr(again, name), getattr(found, name)), name
    assert again.row() == row


def test_without_a_critic_there_is_one_rollout_and_nothing_to_explain(make, gather_alone, tmp_path):
    evaluator, rollout = make(algorithm={"name": "ddpo"})
    found, expected = evaluator(rollout), make()[0](make()[1])
    assert found.values is None and found.returns is None
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.images, expected.images)
    row = found.row()
    assert row == {key: value for key, value in expected.row().items() if "explained_variance" not in key}
    assert [loop.schedule is evaluator.ode for loop in rollout._loops.values()] == [True]
    found.save(tmp_path / "iteration-000000", {})
    assert list(np.load(tmp_path / "iteration-000000.npz")) == ["images"]


def test_one_head_for_the_sum_is_judged_by_the_sum(make, gather_alone):
    """Of one reward, which is its own sum: the same returns in the same units."""
    (evaluator, rollout), (plain, expected) = make(critic={"heads": "sum"}), make()
    found, per_reward = evaluator(rollout), plain(expected)
    assert found.values.shape == (7, 4, 1) and torch.equal(found.returns, per_reward.returns)
    assert math.isfinite(found.row()["eval/explained_variance"])


def test_before_the_first_update_returns_are_raw(make, gather_alone):
    (untaught, rollout), (taught, _) = make(statistics=(0, 0.0, 0.0)), make(statistics=(4, 0.5, 0.1))
    raw, scaled = untaught(rollout), taught(rollout)
    torch.testing.assert_close(raw.returns, scaled.returns * 0.1 + 0.5, rtol=0, atol=1e-6)  # float32 on the way
    assert torch.equal(raw.values, scaled.values)


def test_ranks_together_find_what_one_finds(make, monkeypatch, without_processes):
    """Seven prompts on three ranks: the last rank is filled up with two more, which count for nothing."""

    def evaluate_on(size):
        """The ranks one after the other; each hears those before it, so that the last one hears all."""
        heard = ([], [])  # in the first and the second gathering
        for rank in range(size):
            calls = iter(heard)

            def gather(found, mine, calls=calls):
                spoken = next(calls)
                spoken.append(mine)
                found[:] = spoken + [mine] * (size - len(spoken))

            monkeypatch.setattr(evaluate.dist, "all_gather_object", gather)
            evaluator, rollout = make(World(rank, size, CPU))
            result = evaluator(rollout)
        return result, heard

    one, _ = evaluate_on(1)
    three, heard = evaluate_on(3)
    assert [len(scores) for _, scores, _ in heard[0]] == [3, 3, 3]  # pictures, scores, monitors
    assert three.prompts == one.prompts and three.scores.shape == one.scores.shape == (7, 2)
    assert three.values.shape == one.values.shape and three.returns.shape == one.returns.shape
    # Micro-batches are cut elsewhere: latents differ by 1e-4 at most, so a byte in a hundred may round the other way,
    # which moves a mean over a picture by 1 / 255 / 100 at most.
    torch.testing.assert_close(three.scores, one.scores, rtol=0, atol=1 / 25_500)
    torch.testing.assert_close(three.returns, one.returns, rtol=0, atol=10 / 25_500)
    torch.testing.assert_close(three.values, one.values, rtol=0, atol=2e-4)
    assert three.images.shape == one.images.shape
    assert three.monitors == pytest.approx(one.monitors, rel=0.01)
    assert (three.images.int() - one.images.int()).abs().max() <= 1


def test_guidance_is_the_evaluations_own(make, gather_alone):
    """Pictures as the evaluation is guided, the critic's rollouts as the training is."""
    plain, unguided = make()
    trained, guided = make(rollout={"guidance_scale": 2.0})
    both, _ = make(rollout={"guidance_scale": 2.0}, evaluation={"guidance_scale": 2.0})
    only, _ = make(evaluation={"guidance_scale": 2.0})
    a, b, c, d = plain(unguided), trained(guided), both(guided), only(unguided)
    assert torch.equal(a.scores, b.scores) and torch.equal(c.scores, d.scores)
    assert torch.equal(a.values, d.values) and torch.equal(b.values, c.values)
    assert (a.scores - c.scores).abs().max() > 0.01 and (a.values - c.values).abs().max() > 0.01
