"""The early stop: paired standard errors by hand, a fall seen early, noise let through, and the same after a resume."""

import json

import numpy as np
import pytest

from latent_critic.engine.config import EarlyStopConfig, load_config
from latent_critic.engine.early_stop import EarlyStop
from latent_critic.engine.errors import UserError
from latent_critic.engine.saved_evaluations import drop_evaluations, read_evaluations

from . import tiny_runs

# Of a run: falls from the fourth evaluation on. How many there have been is seen in the folder.
WATCHED = """
from pathlib import Path


def falls(images, prompts, metadata):
    done = len(list(Path("run/evaluations").glob("*.json")))
    return [(0.5, 0.5, 0.9, 0.6)[min(done, 3)] + image.float().mean().item() / 1e5 for image in images]
"""


def rule(patience=2, min_fall=2.5):
    return EarlyStop(EarlyStopConfig(reward="held", patience=patience, min_fall=min_fall))


def observe(stop, *columns):
    """Whether it fires after each of these evaluations, at iterations 0, 10, 20, ..."""
    fired = []
    for column in columns:
        stop.observe(10 * len(stop.judged), np.array(column, dtype=float))
        fired.append(stop.fired)
    return fired


def test_falls_and_their_errors_by_hand():
    """Of 4 prompts, against the best before: mean 0.5. Then changes -.1 0 -.2 -.3: a fall of .15, whose squared
    deviations sum to .05, so an error of sqrt(.05 / 3 / 4). Unpaired, with scores 0 to 1, it would be 0.26 or more."""
    stop = rule(patience=1, min_fall=2.0)
    best = np.array([0.0, 0.3, 0.7, 1.0])
    assert observe(stop, best, best - [0.1, 0.0, 0.2, 0.3]) == [False, True]
    first, second = stop.judged
    assert (first.iteration, first.mean, first.fall, first.error, first.low) == (0, 0.5, 0, 0, 0)
    assert second.iteration == 10 and second.mean == pytest.approx(0.35)
    assert second.fall == pytest.approx(0.15) and second.error == pytest.approx((0.05 / 12) ** 0.5)
    assert observe(rule(1, 2.4), best, best - [0.1, 0.0, 0.2, 0.3]) == [False, False]  # it is 2.32 errors


def test_low_evaluations_must_come_in_a_row():
    best = np.linspace(0, 1, 8)
    low, high = best - 0.1, best + 1e-9  # every prompt by as much: an error near 0
    assert observe(rule(), best, low, best, low, low) == [False, False, False, False, True]
    assert observe(rule(), best, low, high, low, low) == [False, False, False, False, True]
    assert observe(rule(patience=1), best, low) == [False, True]
    assert observe(rule(patience=3), best, low, low, low) == [False, False, False, True]


def test_falls_are_measured_from_the_best_however_long_ago():
    """A slow slide of 0.02 an evaluation. Each of 400 prompts moves by 0.2 up or down besides, half of them each way:
    an error of 0.2 sqrt(2 / 400) = 0.0141 or so. No step is 2.5 errors, but two are, and so are three."""
    prompts, moves = np.linspace(0, 1, 400), np.random.default_rng(0).permutation(np.repeat([0.2, -0.2], 200))
    slide = [prompts - 0.02 * k + np.roll(moves, 7 * k) for k in range(4)]
    stop = rule()
    assert observe(stop, *slide) == [False, False, False, True]
    assert [judged.low for judged in stop.judged] == [0, 0, 1, 2]
    assert [judged.error for judged in stop.judged[1:]] == pytest.approx([0.0141] * 3, rel=0.1)


def test_a_frozen_policy_is_neither_better_nor_low():
    """Value pretraining: every evaluation is the same, and the first of equals is the best."""
    same = np.linspace(0, 1, 5)
    stop = rule(patience=1, min_fall=0.0)
    assert observe(stop, same, same, same) == [False] * 3
    assert stop.best.iteration == 0 and [judged.low for judged in stop.judged] == [0, 0, 0]


def test_a_reward_that_only_falls_stops_the_run():
    falling = [np.linspace(0, 1, 50) - 0.05 * k for k in range(3)]
    stop = rule()
    assert observe(stop, *falling) == [False, False, True]
    assert stop.best.iteration == 0
    assert stop.describe(is_kept=True) == (
        "fired after iteration 20: held-out held is 0.1000 +- 0.0000 below its best; best is iteration 0 "
        "(held 0.5000), kept in best/"
    )


def test_it_fires_before_a_tenth_of_the_gain_is_lost():
    """A reward that gains 0.2 in 10 evaluations, turns, and loses 0.005 an evaluation. 512 prompts, of whose score an
    evaluation moves each by 0.05 at random: an error of 0.05 sqrt(2 / 512) = 0.0031, and 2.5 of them are 0.0078. So it
    must fire after two evaluations that are 0.01 or more below the best, and has then lost 0.015 of 0.2 or less, give
    or take the noise of a mean, 0.0022."""
    rng = np.random.default_rng(3)
    prompts = rng.uniform(0.2, 0.7, 512)
    truth = [*np.linspace(0, 0.2, 11), *(0.2 - 0.005 * np.arange(1, 11))]
    columns = [prompts + mean + rng.normal(0, 0.05, 512) for mean in truth]
    stop = rule()
    for k, column in enumerate(columns):
        stop.observe(k, column)
        if stop.fired:
            break
    assert stop.fired and stop.best.iteration in (10, 11)
    assert truth[10] - truth[k] < 0.1 * 0.2
    assert stop.judged[-1].fall < 0.1 * (stop.best.mean - stop.judged[0].mean)
    assert "of what it had gained; best is iteration" in stop.describe(is_kept=False)
    assert not stop.describe(is_kept=False).endswith("best/")


def test_chance_seldom_stops_a_run_on_a_plateau():
    """30 evaluations of independent noise: the best of many is lucky, so later ones are below it more often than a
    single comparison would be, about one run in six. A rise of 8 errors an evaluation is never taken for a fall."""
    rng, runs = np.random.default_rng(1), 60
    stopped = sum(any(observe(rule(), *rng.normal(0, 1, (30, 32)))) for _ in range(runs))
    assert 0.05 < stopped / runs < 0.25
    climb = 2 * np.arange(30)[:, None] + rng.normal(0, 1, (30, 32))
    assert not any(observe(rule(patience=1), *climb))


@pytest.fixture
def folder(tmp_path):
    def write(scores):
        (tmp_path / "evaluations").mkdir()
        for iteration, columns in scores.items():
            path = tmp_path / "evaluations" / f"iteration-{iteration:06d}.json"
            path.write_text(json.dumps({"settings": {}, "prompts": ["a"] * 3, "scores": columns}))
        return tmp_path

    return write


def test_it_goes_on_from_the_evaluations_of_the_run(folder):
    """Up to the checkpoint: what was evaluated after it comes again, and a file torn by a kill is not even read."""
    best, low = [0.1, 0.2, 0.9], [0.0, 0.1, 0.8]
    run = folder({0: {"held": low}, 10: {"held": best}, 20: {"held": low}, 30: {"held": best}})
    (run / "evaluations" / "iteration-000040.json").write_text('{"settings"')
    options = EarlyStopConfig(reward="held")
    resumed = EarlyStop.over(options, read_evaluations(run, last=20))
    through = rule()
    observe(through, low, best, low)
    assert resumed.judged == through.judged and resumed.best == through.best and not resumed.fired
    assert observe(resumed, low) == [True]  # the second in a row
    (run / "evaluations" / "iteration-000030.json.partial").touch()
    drop_evaluations(run, after=20)
    left = sorted(path.name for path in (run / "evaluations").iterdir())
    assert left == [f"iteration-0000{i}.json" for i in ("00", "10", "20")]


def test_a_reward_that_earlier_evaluations_do_not_know_starts_late(folder):
    run = folder({0: {"other": [1, 1, 1]}, 10: {"other": [1, 1, 1], "held": [0.5, 0.5, 0.6]}})
    assert [it.iteration for it in EarlyStop.over(EarlyStopConfig(reward="held"), read_evaluations(run)).judged] == [10]
    assert not EarlyStop.over(EarlyStopConfig(reward="none"), read_evaluations(run)).fired


def test_another_number_of_prompts_is_refused():
    stop = rule()
    observe(stop, [0.1, 0.2])
    with pytest.raises(UserError, match="iteration 10 was evaluated on 3 prompts, earlier ones on 2.*num_prompts back"):
        observe(stop, [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"early_stop": {"reward": "backgruond"}}, 'reward = "backgruond": not evaluated; did you mean "background"'),
        ({"early_stop": {"reward": "background"}, "every": 0}, "evaluation.every = 0: evaluation.early_stop needs"),
        ({"early_stop": {"reward": "background", "patience": 0}}, "patience = 0: expected an integer >= 1"),
        ({"early_stop": {}}, "evaluation.early_stop.reward: missing"),
    ],
)
def test_mistakes_in_the_configuration_are_named(tmp_path, evaluation, message):
    content = {"rewards": [{"name": "composition"}], "evaluation": {"rewards": [{"name": "background"}], **evaluation}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "config.json")


def test_a_run_that_is_killed_and_resumed_stops_where_it_must(tiny_pipeline, tmp_path):
    """Evaluated after each iteration: 0.5 twice (the policy is frozen), 0.9, and 0.6 from iteration 3 on, so that it
    stops after iteration 4 of 7. It is killed before that, and resumed from iteration 2, the best."""
    stop = {"reward": "watched:falls"}
    config = tiny_runs.run_config(
        tiny_pipeline,
        training={"iterations": 6},
        evaluation={"every": 1, "rewards": [{"name": "watched:falls"}], "early_stop": stop},
    )
    (tiny_runs.prepare(tmp_path, config) / "watched.py").write_text(WATCHED)
    tiny_runs.train(tmp_path, patch="pause_in_the_last_iteration").kill()
    run = tmp_path / "run"
    best = (run / "best/pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    said = tiny_runs.train(tmp_path, "--resume", "auto").finish().stdout()
    assert [json.loads(row)["iteration"] for row in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in (run / "checkpoints").glob("iteration-*"))[-1] == "iteration-000004"
    assert "early stop: fired after iteration 4: held-out watched:falls is 0.3" in said
    assert "best is iteration 2 (watched:falls 0.9" in said and "kept in best/" in said
    # It is the model of iteration 2, which was not exported again, with its critic beside it; the last one is another.
    kept, last = (run / folder / "pipeline" for folder in ("best", ""))
    assert (kept / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == best
    assert (last / "transformer/diffusion_pytorch_model.safetensors").read_bytes() != best
    assert "| reward | before | after 2 iterations |" in (kept / "README.md").read_text()
    assert (run / "best/critic.safetensors").is_file()
    judged = EarlyStop.over(EarlyStopConfig(**stop), read_evaluations(run)).judged
    assert [it.low for it in judged] == [0, 0, 0, 1, 2]
