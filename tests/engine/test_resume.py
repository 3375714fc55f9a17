"""A run that is killed with kill -9 and resumed ends as if it had never stopped, to the last bit.

One run is killed three times: before its first checkpoint is complete, between two checkpoints, and with half a
checkpoint on the disk. It must end like its twin, which ran through. Runs without a critic go on from a checkpoint of
such a twin, as if they had been killed after it.
"""

import json
import shutil
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


def measured(run_dir: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith("seconds") and key != "overhead"}
        for row in rows(run_dir)
    ]


def test_resumed_metrics_equal_the_uninterrupted_ones(story):
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


# ---------------------------------------------------------------------------------------------------- without a critic

WITHOUT = {
    "grpo": {"name": "grpo", "group_size": 4, "kl_coef": 0.1},
    "ddpo": {"name": "ddpo", "reward_statistics": "prompt"},
}


@pytest.fixture(scope="module")
def pairs(tiny_pipeline, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """By algorithm: a run that ran through, and one that went on from its second iteration.

    Two prompts come eight times an iteration, so that after the second each has statistics of its own.
    """
    folder, through, resumed = tmp_path_factory.mktemp("without"), {}, {}
    for name, algorithm in WITHOUT.items():
        config = tiny_runs.run_config(
            tiny_pipeline,
            algorithm=algorithm,
            rollout={"samples_per_iteration": 16, "micro_batch_size": 8},
            training={"iterations": 4},
            prompts={"train": "prompts.txt"},
        )
        for kind in (through, resumed):
            kind[name] = tiny_runs.prepare(folder / f"{name}-{len(kind)}-{kind is through}", config)
            (kind[name] / "prompts.txt").write_text("a red circle\na blue square\n")
    runs = {name: tiny_runs.train(path) for name, path in through.items()}
    for name, run in runs.items():
        run.finish()
        old, new = through[name] / "run", resumed[name] / "run"
        (new / "checkpoints").mkdir(parents=True)
        for kept in ("config.json", "metrics.jsonl"):
            shutil.copy(old / kept, new / kept)
        for kept in ("evaluations", "checkpoints/iteration-000002"):
            shutil.copytree(old / kept, new / kept)
        (new / "evaluations/iteration-000004.json").unlink(), (new / "evaluations/iteration-000004.npz").unlink()
    for run in [tiny_runs.train(path, "--resume", "auto") for path in resumed.values()]:
        run.finish()
    return {name: (through[name] / "run", resumed[name] / "run") for name in WITHOUT}


@pytest.mark.parametrize("name", WITHOUT)
def test_runs_without_a_critic_go_on_to_the_bit(pairs, name):
    """Weights and moments, metrics, evaluations, and what the algorithm remembers of each prompt. A KL's reference is
    the base model still, and in no checkpoint."""
    through, resumed = pairs[name]
    found, expected = measured(resumed), measured(through)
    assert found == expected and [row.get("phase") for row in found] == [None, *[name] * 4]
    assert all(("reference_kl" in row) == (name == "grpo") for row in found[1:])
    folder = "checkpoints/iteration-000004"
    for path in (
        f"{folder}/run_state.safetensors",
        "pipeline/transformer/diffusion_pytorch_model.safetensors",
        "evaluations/iteration-000004.json",
    ):
        assert (resumed / path).read_bytes() == (through / path).read_bytes(), path
    state = load_file(through / folder / "run_state.safetensors")
    prompts = ["a red circle", "a blue square"] if name == "ddpo" else []
    assert state.keys() == {f"history/{prompt}" for prompt in prompts}
    assert all(known.shape == (16, 1) and known.std() > 0 for known in state.values())
    for part in ("model", "optim"):
        (file,) = [path.name for path in (through / folder).glob(f"*{part}_states.pt")]
        states = [torch.load(run / folder / file, weights_only=False) for run in (through, resumed)]
        assert assert_bit_equal(*states, part) > 0
        if part == "model":
            names = [name for group in states[0]["param_shapes"] for name in group]
            names += [name for name in states[0]["module"] if not name.endswith("pos_embed.pos_embed")]  # a constant
            assert "trunk.proj_out.weight" in names and not any(name.startswith("reference") for name in names)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_a_run_without_a_critic_leaves_and_says(pairs, name):
    through, _ = pairs[name]
    assert not any("critic" in path.name for path in through.rglob("*"))
    said = (through.parent / "stdout-0.txt").read_text()
    assert (
        "critic" not in said.replace("latent-critic", "")
        and f"\n  length     4 {name.upper()} iterations, about " in said
    )
    assert "pictures:   run/comparison.png, samples_before.png, samples_after.png, curves.png\n" in said
    assert "model:      run/pipeline (DiffusionPipeline.from_pretrained)\n" in said
    card = (through / "pipeline/README.md").read_text()
    recipe = {
        "grpo": "| algorithm | GRPO (arXiv 2505.05470), groups of 4, KL 0.1 |",
        "ddpo": "| algorithm | DDPO (arXiv 2305.13301), reward statistics: prompt |",
    }
    assert recipe[name] in card and "value pretraining" not in card and ", critic" not in card
