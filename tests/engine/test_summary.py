"""The closing lines of a run, from a run folder written by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from latent_critic.engine import summary
from latent_critic.engine.config import Config, save_config
from latent_critic.engine.summary import summarize

SETTINGS = {"prompts": "scenes:held-out", "num_inference_steps": 10, "guidance_scale": 1.0, "seed": 1000}
PROMPTS = ["a red circle", "two blue squares", "a green star", "a yellow cross"]
BEFORE = {"dense": [0.1, 0.2, 0.3, 0.4], "composition_strict": [0.0, 0.0, 1.0, 1.0]}
BETWEEN = {"dense": [0.9, 0.9, 0.9, 0.9], "composition_strict": [1.0, 1.0, 1.0, 1.0]}
AFTER = {"dense": [0.2, 0.2, 0.5, 0.7], "composition_strict": [1.0, 0.0, 1.0, 1.0]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write({iteration: scores}, [rows]): a run folder; the pictures of an iteration have its number as their grey.

    has_critic: with values and rewards to compare them with. report: written too. evaluation: settings.
    """

    def write(scores, rows=(), count=4, has_critic=True, report=False, **evaluation):
        if not report:
            monkeypatch.setattr(summary, "write_report", lambda run_dir: None)
        rewards = [{"name": "dense"}, {"name": "composition_strict"}]
        save_config(Config.model_validate({"rewards": rewards, "evaluation": evaluation}), tmp_path / "config.json")
        (tmp_path / "evaluations").mkdir()
        for iteration, columns in scores.items():
            path = tmp_path / "evaluations" / f"iteration-{iteration:06d}"
            columns = {name: column[:count] for name, column in columns.items()}
            content = {"settings": SETTINGS, "prompts": PROMPTS[:count], "scores": columns}
            path.with_suffix(".json").write_text(json.dumps(content))
            values = np.linspace(-1, 1, count * 3, dtype=np.float32).reshape(count, 3)
            images = np.full((count, 64, 64, 3), iteration, np.uint8)
            critic = {"values": values, "rewards": values[:, -1]} if has_critic else {}
            np.savez(path, images=images, **critic)
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return write


def test_first_against_last_with_the_standard_error_of_paired_differences(write):
    lines = summarize(write({0: BEFORE, 9: BETWEEN, 10: AFTER})).splitlines()
    assert lines[1] == ("held-out: 4 prompts (scenes:held-out), 10 ODE steps, guidance 1, seed 1000, before -> after")
    # Differences 0.1, 0, 0.2, 0.3: mean 0.15, deviations -0.05, -0.15, 0.05, 0.15, their squares sum to 0.05, so the
    # standard error is sqrt(0.05 / 3 / 4) = 0.06455. (Unpaired it would be 0.138.)
    assert lines[2].split() == ["dense", "0.2500", "->", "0.4000", "(+0.1500", "+-", "0.0645)"]
    # Differences 1, 0, 0, 0: mean 0.25, squares of the deviations sum to 0.75: sqrt(0.75 / 3 / 4) = 0.25.
    assert lines[3].split() == ["composition_strict", "0.5000", "->", "0.7500", "(+0.2500", "+-", "0.2500)"]


def test_overhead_is_the_median_of_the_ppo_iterations(write):
    rows = [{"iteration": 0}, {"iteration": 1, "phase": "value_pretraining", "overhead": 9.0}]
    rows += [{"iteration": 2 + i, "phase": "ppo", "overhead": x} for i, x in enumerate((1.02, 5.0, 1.04))]
    lines = summarize(write({0: BEFORE, 4: AFTER}, rows)).splitlines()
    assert [line for line in lines if line.startswith("overhead")] == [
        "overhead: an iteration takes 1.040 x its trunk forwards and backwards (median)"
    ]


def test_pictures_and_where_they_are(write, monkeypatch):
    grids = {}
    drawn = summary.reports.save_grid

    def save_grid(images, captions, path, marks=None):
        grids[path.name] = SimpleNamespace(grey=images.mean(), captions=captions, marks=marks)
        drawn(images, captions, path, marks=marks)

    monkeypatch.setattr(summary.reports, "save_grid", save_grid)
    run_dir = write({0: BEFORE, 100: AFTER})
    text = summarize(run_dir)
    for name in ("comparison.png", "samples_before.png", "samples_after.png", "curves.png", "critic.png"):
        assert name in text
        with Image.open(run_dir / name) as picture:
            assert min(picture.size) > 64
    for name in ("metrics.jsonl", "pipeline", "checkpoints"):
        assert f"{run_dir}/{name}" in text
    before, after = grids["samples_before.png"], grids["samples_after.png"]
    assert (before.grey, after.grey) == (0, 100)
    assert before.captions == after.captions == PROMPTS
    assert before.marks == [False, False, True, True] and after.marks == [True, False, True, True]


@pytest.mark.parametrize("name", ["grpo", "ddpo"])
def test_a_run_without_a_critic(write, name):
    rows = [{"iteration": 0}] + [
        {"iteration": 1 + i, "phase": name, "overhead": x} for i, x in enumerate((1.1, 1.2, 9))
    ]
    run_dir = write({0: BEFORE, 10: AFTER}, rows, has_critic=False)
    text = summarize(run_dir)
    assert "overhead: an iteration takes 1.200 x its trunk forwards and backwards (median)" in text
    assert f"pictures:   {run_dir}/comparison.png, samples_before.png, samples_after.png, curves.png\n" in text
    assert f"model:      {run_dir}/pipeline (DiffusionPipeline.from_pretrained)\n" in text
    assert (run_dir / "curves.png").exists() and not (run_dir / "critic.png").exists()


def test_a_lora_run_has_factors(write):
    run_dir = write({0: BEFORE})
    (run_dir / "lora").mkdir()
    assert f"model:      {run_dir}/lora (load_lora_weights), critic.safetensors" in summarize(run_dir)


def test_a_run_of_one_evaluation_compares_it_with_itself(write):
    lines = summarize(write({0: BEFORE})).splitlines()
    assert lines[2].split() == ["dense", "0.2500", "->", "0.2500", "(+0.0000", "+-", "0.0000)"]


def test_the_early_stop_has_its_say(write):
    """Differences to the best, 0.1 0 0.2 0.3 and then 0.9 less the scores before: in either case two in a row."""
    stop = {"reward": "dense", "min_fall": 2.0}
    run_dir = write({0: BEFORE, 9: BETWEEN, 10: AFTER, 11: BEFORE}, early_stop=stop)
    (run_dir / "best").mkdir()
    (line,) = (line for line in summarize(run_dir).splitlines() if line.startswith("early stop"))
    # From 0.25 to 0.9 a gain of 0.65. The last is 0.65 below, by .8 .7 .6 .5: an error of sqrt(.05 / 3 / 4) = 0.0645.
    assert line == (
        "early stop: fired after iteration 11: held-out dense is 0.6500 +- 0.0645 below its best, 100% of what it had "
        "gained; best is iteration 9 (dense 0.9000), kept in best/"
    )


def test_there_is_a_report(write):
    run_dir = write({0: BEFORE, 10: AFTER}, report=True)
    text = summarize(run_dir)
    assert f"report:     {run_dir}/report.html\n" in text and "early stop" not in text
    page = (run_dir / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "+0.1500 ± 0.0645" in page and "What the critic knows" in page
