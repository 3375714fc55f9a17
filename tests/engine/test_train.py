"""The command line: what a person sees, what is refused with which words and exit code, and what a failure leaves."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latent_critic.engine.config import Config
from latent_critic.engine.sharding import gather_state
from latent_critic.engine.trainer import Trainer

from . import tiny_runs

DEEPSPEED = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
LAUNCHER = re.compile(r"\[[-\d]+ [:,\d]+\] \[(INFO|WARNING|ERROR)\] \[(launch|runner|real_accelerator)\.py:")
not_on_one_gpu = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="the launcher would put two ranks on one GPU"
)


def command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Runs a command as a person does: no process of ours has imported anything before."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return subprocess.run(words, cwd=folder, env=env, text=True, capture_output=True, timeout=tiny_runs.PATIENCE)


def deepspeed(folder: Path, *flags: str) -> tuple[int, list[str], str]:
    """Exit code, lines on stdout that are not the launcher's own, and stderr."""
    port = ("--master_port", str(tiny_runs.free_port()))
    done = command(folder, *DEEPSPEED, *port, str(tiny_runs.TRAIN), "--config", "config.json", *flags)
    lines = [line for line in done.stdout.splitlines() if not LAUNCHER.match(line)]
    return done.returncode, lines, done.stderr


# ---------------------------------------------------------------------------------------------------- a normal run


@not_on_one_gpu
def test_two_ranks_under_the_launcher(tiny_pipeline, tmp_path):
    config = tiny_runs.run_config(
        tiny_pipeline,
        training={"iterations": 1, "checkpoint_every": 1},
        logging={"tensorboard": True},
    )
    code, lines, stderr = deepspeed(tiny_runs.prepare(tmp_path, config))
    assert code == 0, stderr
    assert lines[0] == "latent-critic: run"
    names = [line.split()[0].rstrip(":") for line in lines[1:] if line]
    plan = ["model", "device", "sampling", "iteration", "rewards", "rollout", "attention", "memory", "length"]
    summary = ["held-out", "tiny_rewards:brightness", "overhead"]
    summary += ["report", "pictures", "metrics", "model", "checkpoint"]
    assert names == plan + summary
    assert "2 x CPU, DeepSpeed ZeRO stage 3" in lines[2]
    assert re.fullmatch(
        r"value pretraining 1/2 \[.*\] reward tiny_rewards:brightness 0\.\d+, explained variance 0\.00\n"
        r"(first update of a fresh batch: ratio 1\.000000, clip fraction 0 - as it must be; .*\n"
        r"|PPO 2/2 \[.*\] reward tiny_rewards:brightness 0\.\d+, ratio 1\.000000, clipfrac 0\.000, .*\n){2}",
        stderr,
    )
    run_dir = tmp_path / "run"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        *("checkpoints", "comparison.png", "config.json", "critic.png", "critic.safetensors", "curves.png"),
        *("evaluations", "metrics.jsonl", "pipeline", "report.html"),
        *("samples_after.png", "samples_before.png", "tensorboard"),
    ]
    assert sorted(path.name for path in (run_dir / "evaluations").iterdir()) == [
        f"iteration-00000{i}.{kind}" for i in (0, 2) for kind in ("json", "npz", "png")
    ]
    assert not (tmp_path / "extensions").exists()  # nothing was compiled


def test_plain_python(tiny_pipeline, tmp_path):
    training = {"iterations": 1, "value_pretraining_iterations": 0, "critic_epochs": 0}
    folder = tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline, training=training))
    flags = ("--config", "config.json", "--set", "evaluation.num_prompts=2", "--set", "output_dir=elsewhere")
    done = command(folder, sys.executable, str(tiny_runs.TRAIN), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("latent-critic: elsewhere\n  model ")
    assert "\nheld-out: 2 prompts (scenes:held-out), 2 ODE steps, guidance 1, seed 1000, before" in done.stdout
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["PPO", "first"]
    assert json.loads((folder / "elsewhere" / "config.json").read_text())["evaluation"]["num_prompts"] == 2


def test_control_c_says_how_to_go_on(tiny_pipeline, tmp_path):
    run = tiny_runs.train(
        tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline)), patch="pause_in_the_last_iteration"
    )
    assert run.interrupt() == [130]
    assert run.stderr().endswith("\nstopped; --resume auto goes on from the newest checkpoint\n")
    assert "Traceback" not in run.stderr()
    assert (tmp_path / "run" / "checkpoints" / "iteration-000002").is_dir()


def test_out_of_memory_says_what_to_lower(tiny_pipeline, tmp_path):
    run = tiny_runs.train(
        tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline)), patch="out_of_memory_in_the_last_iteration"
    )
    assert run.wait() == [2]
    assert run.stderr().splitlines()[-1] == (
        "error: CUDA out of memory. Tried to allocate 1.00 TiB. Lower rollout.micro_batch_size, or set "
        "model.gradient_checkpointing=true; --resume auto then goes on from the newest checkpoint"
    )


# ------------------------------------------------------------------------------------------------- what is refused


def refused(folder: Path, *flags: str, started: bool = False) -> str:
    """The one message of a run that ends as a mistake of the user's."""
    run = tiny_runs.train(folder, *flags)
    assert run.wait() == [2], run.stderr()
    message = run.stderr()
    assert message.startswith("error: ") and message.count("error: ") == 1 and "Traceback" not in message, message
    assert run.stdout().startswith("latent-critic: ") if started else run.stdout() == ""
    assert (folder / "run").exists() == started
    return message.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"trainig": {}}, r"config\.json: trainig = {}: unknown key; did you mean training\?"),
        (
            {"rollout": {"noise_levle": 0.5}},
            r"rollout\.noise_levle = 0\.5: unknown key; did you mean rollout\.noise_level",
        ),
        ({"optimizer": {"policy_lr": -1}}, r"optimizer\.policy_lr = -1: expected a number > 0 and <= 1"),
        ({"rollout": {"micro_batch_size": "2"}}, r'micro_batch_size = "2": expected an integer >= 1'),
        ({"rewards": []}, r"config\.json: rewards = \[\]: expected"),
        (
            {"rollout": {"samples_per_iteration": 6, "micro_batch_size": 4}},
            r"samples_per_iteration = 6: must be a multiple of 4 = .* nearest valid: 4 \(or 8\)$",
        ),
        ({"prompts": {"train": "gone.txt"}}, r"gone\.txt: no such prompt file; looked in /"),
        ({"prompts": {"train": "bad.jsonl"}}, r'bad\.jsonl:3: no key "prompt"; the keys are promt$'),
        ({"prompts": {"eval": "empty.txt"}}, r"empty\.txt: holds no prompt; give one or more"),
        ({"prompts": {"train": "scenes:trian"}}, r"trian"),
        ({"rewards": [{"name": "compositon"}]}, r"unknown reward 'compositon'; did you mean 'composition'\?"),
        ({"rewards": [{"name": "tiny_rewards:brightnes"}]}, r"tiny_rewards.* has no function or class 'brightnes'"),
        (
            {"model": {"pretrained": "models/gone"}},
            r"model\.pretrained: 'models/gone' is no local folder and could not be ",
        ),
        (
            {"model": {"pretrained": "."}},
            r"model\.pretrained: \. has no model_index\.json; give a diffusers pipeline folder",
        ),
        (
            {"critic": {"taps": [0, 3]}},
            r"critic\.taps: \[0, 3\] - this model has blocks 0 to 2; use \"auto\" \(\[0, 1, 2\]\)",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 9}}},
            r"(?s)^deepspeed: DeepSpeed refuses this section: .*stage",
        ),
        ({"deepspeed": {"fp16": {}}}, r"deepspeed\.fp16: derived by the engine; set model\.dtype instead"),
        (
            {"output_dir": "config.json/run"},
            r"output_dir: config\.json/run cannot be created \(Not a directory\); give",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_mistakes_in_the_config(tiny_pipeline, tmp_path, changes, expected):
    folder = tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline, **changes))
    (folder / "bad.jsonl").write_text('{"prompt": "a red circle"}\n\n{"promt": "a blue square"}\n')
    (folder / "empty.txt").write_text("\n\n")
    assert re.search(expected, refused(folder))


def test_mistakes_on_the_command_line(tiny_pipeline, tmp_path):
    folder = tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline))
    assert re.search(r'override "seed": expected section\.key=value', refused(folder, "--set", "seed"))
    assert re.search(r"--resume gone: no run there", refused(folder, "--resume", "gone"))
    assert re.search(
        r"confg\.json: no such file; nearest in \.: config\.json$", refused(folder, "--config", "confg.json")
    )


def test_a_damaged_model_is_named(tiny_pipeline, tmp_path):
    folder = tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline, model={"pretrained": "model"}))
    shutil.copytree(tiny_pipeline, folder / "model")
    weights = folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert re.search(r"model\.pretrained: model is incomplete or damaged: ", refused(folder))
    weights.unlink()
    assert re.search(r"model\.pretrained: model is incomplete or damaged: .*transformer", refused(folder))


@pytest.mark.parametrize(
    "reward, expected",
    [
        (
            {"name": "tiny_rewards:raises", "params": {"on": "blue"}},
            r"reward 'tiny_rewards:raises' failed on prompt 'a blue square': RuntimeError: "
            "the model of this reward is gone",
        ),
        (
            {"name": "tiny_rewards:not_a_number"},
            r"reward 'tiny_rewards:not_a_number' returned nan for prompt 'a red circle'",
        ),
        (
            {"name": "tiny_rewards:too_short"},
            r"reward 'tiny_rewards:too_short' returned shape \[1\] for 2 pictures "
            r"\(the first of prompt 'a red circle'\)",
        ),
    ],
)
def test_rewards_that_fail(tiny_pipeline, tmp_path, reward, expected):
    prompts = {"train": "prompts.txt", "eval": "prompts.txt"}
    config = tiny_runs.run_config(tiny_pipeline, rewards=[reward], prompts=prompts, evaluation={"num_prompts": 2})
    folder = tiny_runs.prepare(tmp_path, config)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    assert re.search(expected, refused(folder, started=True))


@not_on_one_gpu
def test_a_mistake_that_one_rank_meets_ends_all_with_one_message(tiny_pipeline, tmp_path):
    """The second prompt is rank 1's. Rank 0 waits for it in a collective, and must neither hang nor complain."""
    config = tiny_runs.run_config(
        tiny_pipeline,
        rewards=[{"name": "tiny_rewards:raises", "params": {"on": "blue"}}],
        prompts={"train": "prompts.txt", "eval": "prompts.txt"},
        evaluation={"num_prompts": 2},
    )
    folder = tiny_runs.prepare(tmp_path, config)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    code, _, stderr = deepspeed(folder)
    assert code == 2
    assert stderr.startswith("error: reward 'tiny_rewards:raises' failed on prompt 'a blue square'")
    assert stderr.count("\n") == 1


@not_on_one_gpu
def test_a_mistake_that_all_ranks_meet_is_said_once(tiny_pipeline, tmp_path):
    folder = tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline, trainig={}))
    code, lines, stderr = deepspeed(folder)
    assert (code, lines) == (2, [])
    assert stderr.startswith("error: config.json: trainig = {}: unknown key") and stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------- what a failure leaves


def test_failures_keep_what_was_written_and_the_run_goes_on(tiny_pipeline, tmp_path):
    """One run: its policy breaks, then the disk is full, then somebody resumes it wrongly, and then it ends."""
    folder = tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline))
    checkpoints = folder / "run" / "checkpoints"
    kept = ["iteration-000000", "iteration-000002"]

    def visible():
        return sorted(path.name for path in checkpoints.glob("iteration-*"))

    run = tiny_runs.train(folder, patch="policy_breaks_in_the_last_iteration")
    assert run.wait() == [1], run.stderr()
    assert re.search(
        r"^error: the policy loss is not finite at denoising step 0; this update was not applied\. Lower "
        r"optimizer\.policy_lr and optimizer\.critic_lr, or algorithm\.clip_range, and go on from the last checkpoint "
        r"with --resume auto$",
        run.stderr(),
        re.MULTILINE,
    )
    assert "Traceback" not in run.stderr() and visible() == kept
    content = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}

    run = tiny_runs.train(folder, "--resume", "auto", patch="full_disk_at_the_last_checkpoint")
    assert run.wait() == [1], run.stderr()
    assert re.search(
        r"^error: the disk is full \(\d+ MiB free\) while writing to run; earlier checkpoints are untouched\. "
        r"Free some "
        r"space and go on with --resume auto$",
        run.stderr(),
        re.MULTILINE,
    )
    assert "Traceback" not in run.stderr() and visible() == kept

    for flags, ranks, expected in (
        (
            ["--set", "critic.dim=32"],
            1,
            r"written by another model .* resume with the model\.pretrained, critic and rewards",
        ),
        ([], 2, r"written by 1 processes, this run has 2; resume with deepspeed --num_gpus 1"),
    ):
        run = tiny_runs.train(folder, "--resume", "auto", *flags, ranks=ranks)
        assert run.wait() == [2] * ranks, run.stderr()
        assert re.search(r"^error: run/checkpoints/iteration-000002 was " + expected, run.stderr())
        assert run.stderr().count("\n") == 1 and run.stdout() == ""
    assert all(path.read_bytes() == data for path, data in content.items())

    tiny_runs.train(folder, "--resume", "auto").finish()
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == [
        "iteration-000002",
        "iteration-000004",
    ]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------- value pretraining


def test_value_pretraining_teaches_the_critic_and_leaves_the_policy_alone(tiny_pipeline, world, tmp_path, monkeypatch):
    """On held-out prompts and seeds the critic's squared error falls by a quarter and more, measured against the mean:
    it has learned of single latents how bright their pictures will be. Not a bit of the policy has changed."""
    tiny_runs.prepare(tmp_path, {})
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_runs.run_config(
        tiny_pipeline,
        rollout={"samples_per_iteration": 32, "micro_batch_size": 16, "noise_level": 0.2},
        training={"value_pretraining_iterations": 4, "value_pretraining_epochs": 4, "updates_per_iteration": 2},
        optimizer={"critic_lr": 3e-3},
        evaluation={"num_prompts": 32},
    )
    trainer = Trainer(Config.model_validate_json(json.dumps(config)), world, tmp_path / "run")
    policy = gather_state(trainer.model.trunk)
    before = trainer.evaluator(trainer.rollout)
    rows = [trainer.iterate(iteration) for iteration in range(4)]
    trainer.refresh()
    after = trainer.evaluator(trainer.rollout)

    assert {row["phase"] for row in rows} == {"value_pretraining"}
    assert all("policy_loss" not in row and row["value_loss"] > 0 for row in rows)
    now = gather_state(trainer.model.trunk)
    assert all(torch.equal(now[name], policy[name]) for name in policy)
    assert torch.equal(after.images, before.images) and torch.equal(after.scores, before.scores)

    error = [(evaluation.values - after.returns).square().mean().item() for evaluation in (before, after)]
    mean_alone = after.returns[:, 0].var(correction=0).item()
    assert error[1] < 0.75 * min(error[0], mean_alone)
    assert dataclasses.replace(after).explained_variance.min() > 0.25 and bool((before.values == 0).all())
