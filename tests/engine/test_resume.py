"""A run that is killed with kill -9 and resumed ends as if it had never stopped, to the last bit.

One run is killed three times: before its first checkpoint is complete, between two checkpoints, and with half a
checkpoint on the disk. It must end like its twin, which ran through.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import tiny_runs


@dataclass
class Story:
    through: Path
    killed: Path
    checkpoints: list[list[str]] = field(default_factory=list)  # what lay in checkpoints/ after each kill
    rows: list[list[int]] = field(default_factory=list)  # iterations in metrics.jsonl after each kill


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def story(tiny_pipeline, tmp_path_factory) -> Story:
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_runs.run_config(
        tiny_pipeline,
        optimizer={"policy_lr": 1e-4, "lr_scheduler": "linear", "lr_warmup_iterations": 2},
        training={"ema_decay": 0.5},
    )
    through = tiny_runs.train(tiny_runs.prepare(folder / "through", config))
    killed = tiny_runs.prepare(folder / "killed", config)
    story = Story(folder / "through" / "run", killed / "run")
    for patch in (
        "pause_before_the_first_checkpoint_is_renamed",
        "pause_in_the_last_iteration",
        "pause_in_the_middle_of_the_last_checkpoint",
    ):
        tiny_runs.train(killed, "--resume", "auto", patch=patch).kill()
        story.checkpoints.append(checkpoints(story.killed))
        story.rows.append([row["iteration"] for row in rows(story.killed)])
    tiny_runs.train(killed, "--resume", "auto").finish()
    through.finish()
    return story


def test_the_kills_came_where_they_should(story):
    assert story.checkpoints == [
        [".writing-000000"],
        ["iteration-000000", "iteration-000002"],
        [".writing-000004", "iteration-000000", "iteration-000002"],
    ]
    assert story.rows == [[0], [0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_half_written_checkpoints_are_gone_at_the_end(story):
    assert checkpoints(story.killed) == checkpoints(story.through) == ["iteration-000002", "iteration-000004"]


def test_learning_rates_rise_and_fall_to_the_end(story):
    found = [row["learning_rate"] for row in rows(story.killed) if row.get("phase") == "ppo"]
    assert found == pytest.approx([0.5e-4, 2e-4 / 3, 1e-4 / 3], rel=1e-12)


def test_resumed_metrics_equal_the_uninterrupted_ones(story):
    def measured(run_dir):
        return [
            {key: value for key, value in row.items() if not key.startswith("seconds") and key != "overhead"}
            for row in rows(run_dir)
        ]

    assert measured(story.killed) == measured(story.through)
    assert [row["iteration"] for row in rows(story.through)] == [0, 1, 2, 3, 4]
    assert all("reward/tiny_rewards:brightness" in row for row in rows(story.through)[1:])


def assert_bit_equal(a, b, where: str) -> int:
    """Compares nested containers; returns the number of numbers in tensors."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
        return a.numel()
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return sum(assert_bit_equal(a[key], b[key], f"{where}[{key!r}]") for key in a)
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return sum(assert_bit_equal(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    if isinstance(a, int | float | str | None):
        assert a == b, where
    return 0


@pytest.mark.parametrize("part", ["model", "optim"])
def test_resumed_weights_and_moments_are_bit_equal(story, part):
    (name,) = [p.name for p in (story.through / "checkpoints/iteration-000004").glob(f"*{part}_states.pt")]
    states = [
        torch.load(run_dir / "checkpoints/iteration-000004" / name, weights_only=False)
        for run_dir in (story.through, story.killed)
    ]
    pipeline = load_file(story.through / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    parameters = sum(tensor.numel() for name, tensor in pipeline.items() if name != "pos_embed.pos_embed")
    # Buffers; or master weights, which are all that ZeRO-3 keeps of weights, and two moments.
    assert assert_bit_equal(*states, part) >= (1 if part == "model" else 3 * parameters)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/iteration-000004/run_state.safetensors",  # reward statistics
        "checkpoints/iteration-000004/run_state_rank0.safetensors",  # the weights' running average
        "pipeline/transformer/diffusion_pytorch_model.safetensors",
        "evaluations/iteration-000002.json",
        "evaluations/iteration-000004.json",
    ],
)
def test_resumed_files_are_byte_equal(story, name):
    assert (story.killed / name).read_bytes() == (story.through / name).read_bytes()


def test_resumed_critic_is_bit_equal(story):
    """Its tensors: the order of the two notes in a safetensors header is left to chance."""
    critics = [load_file(run_dir / "critic.safetensors") for run_dir in (story.through, story.killed)]
    assert assert_bit_equal(*critics, "critic") > 1000
    assert any(tensor.any() for name, tensor in critics[0].items() if name.startswith("heads.0.2."))  # began at zero
