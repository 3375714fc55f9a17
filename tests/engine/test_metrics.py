"""metrics.jsonl survives kills and resumes, the mirrors show the same numbers, the bar works without a terminal too."""

import io
import json
import sys
import types

import pytest
import torch

from latent_critic.engine import metrics
from latent_critic.engine.errors import UserError
from latent_critic.engine.metrics import MetricsLogger, ProgressBar, read_metrics


def row(iteration: int) -> dict:
    return {"phase": "ppo", "reward/composition": iteration / 8, "explained_variance_per_step": [0.25, 0.5]}


@pytest.fixture
def logger(tmp_path):
    return MetricsLogger(tmp_path, tensorboard=False, wandb_project=None, config={})


def test_log_appends_one_json_line_a_row(logger, tmp_path):
    logger.log(1, row(1))
    logger.log(2, {"phase": "ppo", "clipfrac": torch.tensor(0.5), "per_step": torch.tensor([1.0, 2.0])})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iteration": 1, "phase": "ppo", "reward/composition": 0.125, "explained_variance_per_step": [0.25, 0.5]},
        {"iteration": 2, "phase": "ppo", "clipfrac": 0.5, "per_step": [1.0, 2.0]},
    ]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]


def test_not_finite_becomes_null_which_any_json_reader_takes(logger, tmp_path):
    logger.log(1, {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 1, "a": null, "b": [null, 1.0]}\n'


def test_read_metrics_of_a_run_without_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_resumed_file_equals_the_uninterrupted_one(logger, tmp_path):
    path = tmp_path / "metrics.jsonl"
    for iteration in range(1, 6):
        logger.log(iteration, row(iteration))
    uninterrupted = path.read_bytes()

    path.write_bytes(uninterrupted + b'{"iteration": 6, "phase": "pp')  # killed while writing row 6
    assert [r["iteration"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    resumed = MetricsLogger(tmp_path, tensorboard=False, wandb_project=None, config={})
    resumed.truncate(3)  # the last checkpoint is older than the last row
    assert [r["iteration"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    for iteration in (4, 5):
        resumed.log(iteration, row(iteration))
    assert path.read_bytes() == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_before_the_first_row(logger, tmp_path):
    logger.truncate(0)
    assert read_metrics(tmp_path) == []


def test_a_broken_row_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\nnonsense\n{"iteration": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a row of metrics"):
        read_metrics(tmp_path)


def test_full_disk_is_one_clear_message(logger, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device; make room"):
        logger.log(1, row(1))


def test_tensorboard_shows_the_scalars_and_a_resume_purges_later_ones(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = MetricsLogger(tmp_path, tensorboard=True, wandb_project=None, config={})
    for iteration in (1, 2, 3):
        first.log(iteration, row(iteration))
    first.close()
    resumed = MetricsLogger(tmp_path, tensorboard=True, wandb_project=None, config={})
    resumed.truncate(2)
    resumed.log(3, {"reward/composition": 0.75})
    resumed.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "reward/composition",
        "explained_variance_per_step/0",
        "explained_variance_per_step/1",
    }
    assert [(e.step, e.value) for e in events.Scalars("reward/composition")] == [(1, 0.125), (2, 0.25), (3, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("explained_variance_per_step/1")] == [(1, 0.5), (2, 0.5)]


def test_missing_wandb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    with pytest.raises(UserError, match=r"pip install latent-critic\[wandb\]"):
        MetricsLogger(tmp_path, tensorboard=False, wandb_project="demo", config={})


def test_wandb_gets_config_and_rows_and_resumes_the_same_run(tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(
        id="abc", log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    wandb = types.ModuleType("wandb")
    wandb.errors = types.SimpleNamespace(Error=RuntimeError)
    wandb.init = lambda **arguments: started.append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        logger = MetricsLogger(tmp_path, tensorboard=False, wandb_project="demo", config={"seed": 7})
    logger.log(4, row(4))
    logger.close()
    assert [(s["project"], s["config"], s["id"], s["resume"]) for s in started] == [
        ("demo", {"seed": 7}, None, "allow"),
        ("demo", {"seed": 7}, "abc", "allow"),
    ]
    numbers = {"reward/composition": 0.5, "explained_variance_per_step/0": 0.25, "explained_variance_per_step/1": 0.5}
    assert logged == [(4, numbers), "finished"]


FULL_ROW = {
    "phase": "ppo",
    "reward/composition": 0.51234,
    "reward/composition_std": 0.3,
    "reward/jpeg": -4.7,
    "ratio_mean": 1.00001,
    "clipfrac": 0.125,
    "explained_variance": 0.333,
}
DESCRIPTION = "reward composition 0.5123 jpeg -4.7, ratio 1.000010, clipfrac 0.125, explained variance 0.33"


class Clock:
    """Stands in for the time module."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_progress_in_a_file_is_plain_lines_ten_seconds_apart(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    file = io.StringIO()
    bar = ProgressBar(total=6, initial=1, file=file)
    for _ in range(5):  # iterations 2 to 6, 4 s each: 2 is printed, 3 and 4 are too early, 5 is due, 6 is the last
        clock.now += 4
        bar.update(FULL_ROW)
    bar.close()
    assert file.getvalue().splitlines() == [
        f"PPO 2/6 [00:04<00:16] {DESCRIPTION}",
        f"PPO 5/6 [00:16<00:04] {DESCRIPTION}",
        f"PPO 6/6 [00:20<00:00] {DESCRIPTION}",
    ]


def test_progress_on_a_terminal_is_a_bar_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file = io.StringIO()
    file.isatty = lambda: True
    bar = ProgressBar(total=2, file=file)
    bar.update({"phase": "value_pretraining", "reward/composition": 0.5, "ratio_mean": None})
    bar.update(FULL_ROW)
    bar.write("a message")
    bar.close()
    shown = file.getvalue()
    assert "\rvalue pretraining |" in shown and "| 1/2 [" in shown and ", reward composition 0.5]" in shown
    assert "\rPPO |" in shown and f"| 2/2 [00:00<00:00, {DESCRIPTION}]" in shown
    assert "a message\n" in shown


def test_progress_names_the_algorithm():
    for name, shown in (("ppo", "PPO"), ("grpo", "GRPO"), ("ddpo", "DDPO")):
        file = io.StringIO()
        ProgressBar(total=1, file=file).update({"phase": name, "reward/composition": 0.5, "clipfrac": 0.25})
        assert file.getvalue() == f"{shown} 1/1 [00:00<00:00] reward composition 0.5, clipfrac 0.250\n"


def test_first_update_is_explained_once():
    file = io.StringIO()
    bar = ProgressBar(total=3, file=file)
    bar.explain_first_update(ratio=1.0, max_ratio_deviation=0.0, clipfrac=0.0)
    bar.explain_first_update(ratio=1.1, max_ratio_deviation=0.2, clipfrac=0.5)
    assert file.getvalue() == (
        "first update of a fresh batch: ratio 1.000000, clip fraction 0 - as it must be; learning shows in reward and "
        "approx_kl from the second update on\n"
    )


def test_first_update_with_clipped_ratios_is_a_warning():
    file = io.StringIO()
    ProgressBar(total=3, file=file).explain_first_update(ratio=0.99996, max_ratio_deviation=4e-4, clipfrac=0.25)
    assert file.getvalue().startswith(
        "warning: first update of a fresh batch: ratio 0.999960, clip fraction 0.25, largest |ratio - 1| 4.0e-04; "
        "they must be 1 and 0."
    )
