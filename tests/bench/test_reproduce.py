"""`python bench/reproduce.py`: its grid, the rule that decides claims, runs that stop and go on, and its report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_critic.engine.config import Config

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH / "reproduce_parts"))  # as the script itself does

import repro_claims  # noqa: E402
import repro_curves  # noqa: E402
import repro_grid  # noqa: E402
import repro_places  # noqa: E402
import repro_recipe  # noqa: E402
import repro_report  # noqa: E402
import repro_runner  # noqa: E402
import repro_tables  # noqa: E402

VARIANTS = {variant.name: variant for variant in repro_grid.variants()}
STEPS, SAMPLES = 8, 256
ABOUT = {
    "command": "python bench/reproduce.py",
    "commit": "abc1234",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": None},
    "processor": "Some Processor",
    "load_average": 0.5,
}


# ------------------------------------------------------------------------------------------------------------ the grid


@pytest.mark.parametrize("scale", [repro_grid.FULL, repro_grid.QUICK])
def test_every_variant_is_a_configuration_of_the_engine(scale):
    for variant in repro_grid.variants(scale):
        content = json.dumps({"seed": 0, "output_dir": "x", **variant.config})
        Config.model_validate_json(content).for_processes(1)


def test_names_and_groups_are_those_of_the_grid():
    names = [variant.name for variant in repro_grid.variants()]
    assert len(set(names)) == len(names)
    assert list(dict.fromkeys(variant.group for variant in VARIANTS.values())) == list(repro_grid.GROUPS)
    assert set(repro_grid.REFERENCES.values()) <= VARIANTS.keys()
    assert [name for name in names if VARIANTS[name].group == "algorithms"] == ["ours-long", "grpo-long", "ddpo-long"]
    assert [name for name in names if VARIANTS[name].group == "compute"] == ["grpo-long-clock", "ddpo-long-clock"]
    assert [name for name in names if VARIANTS[name].group == "pixels"] == ["ours", "ddpo", "pixel"]
    for group in ("algorithms", "pixels", "grpo-options", "pretraining", "unet"):
        assert VARIANTS[repro_grid.REFERENCES[group]].group == group
    assert all(VARIANTS[repro_grid.REFERENCES[group]].group == "algorithms" for group in ("group-std", "cfg-long"))
    assert {repro_grid.REFERENCES[group] for group in ("critic", "rewards", "cfg", "clip", "steps")} == {"ours"}
    kept, seed = repro_runner.KEPT
    assert VARIANTS[kept].config["algorithm"]["name"] == "ppo" and seed in repro_grid.SEEDS
    assert VARIANTS[kept].group in repro_grid.QUICK_GROUPS  # for a quick run's --credit
    named = {name for claim in repro_claims.claims(repro_grid.FULL) for _, name, _ in claim.shown}
    assert named <= VARIANTS.keys()
    quick = {variant.name for variant in repro_grid.variants(repro_grid.QUICK)}
    assert {name for claim in repro_claims.claims(repro_grid.QUICK) for _, name, _ in claim.shown} <= quick


def test_a_variant_differs_from_its_recipe_where_it_says_so():
    recipe = json.loads((repro_recipe.CONFIGS / "zero3_dit.json").read_text())
    ours, pixel, guided = (VARIANTS[name] for name in ("ours", "pixel", "guidance-4.5"))
    scale = {"evaluation.every": 20, "evaluation.num_prompts": 1024}
    assert ours.own_overrides == scale
    assert VARIANTS["ours-long"].own_overrides == scale | {"training.iterations": 96}
    assert VARIANTS["tuning-ours-1-warm-10"].own_overrides == {}
    assert pixel.own_overrides == scale | {"critic.trunk": "pixels", "critic.feature_dropout": 0.0}
    assert VARIANTS["trunk-shared"].own_overrides == scale | {
        "critic.trunk": "shared",
        "critic.feature_dropout": 0.0,
        "training.value_pretraining_epochs": 2,
        "training.critic_epochs": 1,
    }
    assert ours.config["training"]["iterations"] == recipe["training"]["iterations"] == 36
    assert ours.config["training"]["value_pretraining_iterations"] == 4 and ours.config["evaluation"]["every"] == 20
    assert ours.config["rollout"] == recipe["rollout"] and ours.config["logging"] == {"tensorboard": False}
    assert VARIANTS["lam-0.95"].own_overrides == scale | {"algorithm.lam": 0.95}
    assert guided.own_overrides == scale | {"rollout.guidance_scale": 4.5, "evaluation.guidance_scale": 4.5}
    assert VARIANTS["clip-0.0001"].config["algorithm"]["clip_range"] == 1e-4
    assert VARIANTS["unet-ours"].config["optimizer"]["lr_warmup_iterations"] == 10
    assert VARIANTS["taps-last"].config["critic"]["dim"] == recipe["critic"]["dim"]


def test_equal_compute_is_counted_in_forwards():
    # 8 forwards of a rollout, 4 trained steps at three forwards each, 8 critic-only passes of 8 steps at a tenth each;
    # before PPO 8 and such passes; without a critic 8 + 12; and where critic-only passes run the trunk 8 for each.
    ours, grpo, shared = (VARIANTS[name].config for name in ("ours", "grpo", "trunk-shared"))
    assert repro_recipe.forwards(ours)[:2] == pytest.approx((14.4, 26.4)) and repro_recipe.forwards(grpo).training == 20
    assert repro_recipe.forwards(shared)[:2] == (24, 28)
    assert repro_recipe.iterations_at_equal_compute(ours, grpo) == round((4 * 14.4 + 36 * 26.4) / 20) == 50
    assert repro_recipe.forwards(VARIANTS["ours-long"].config)[:2] == pytest.approx((14.4, 26.4))
    assert round((4 * 14.4 + 96 * 26.4) / 20) == 130
    for name in ("grpo", "ddpo"):
        matched = VARIANTS[f"{name}-long-clock"].config["training"]
        assert matched["iterations"] == 130 and matched["value_pretraining_iterations"] == 0
        assert VARIANTS[f"{name}-long"].config["training"]["iterations"] == 4 + 96
        assert VARIANTS[f"{name}-long"].config["training"]["value_pretraining_iterations"] == 0
        assert VARIANTS[name].config["training"]["iterations"] == 4 + 36
        assert VARIANTS[f"unet-{name}"].config["training"]["iterations"] == 4 + 40
    assert repro_recipe.forwards(VARIANTS["guidance-2"].config).training == pytest.approx(2 * 26.4)
    assert repro_recipe.forwards(VARIANTS["grpo-window"].config).training == 8 + 3 * 2
    for count in (0, 5, 15, 30):
        training = VARIANTS[f"pretraining-{count}"].config["training"]
        assert training["value_pretraining_iterations"] == count and training["iterations"] == 60 - count
    added = VARIANTS["pretraining-15-added"].config["training"]
    assert added["value_pretraining_iterations"] == 15 and added["iterations"] == 60


def test_tuning_asks_each_algorithm_at_the_same_rates_and_does_not_follow_its_own_result(monkeypatch):
    before = {name: VARIANTS[name].config for name in VARIANTS if name.startswith("tuning-")}
    assert len(before) == 15 + 6
    tuned = dict.fromkeys(repro_grid.ALGORITHMS, repro_grid.Rate(8))
    monkeypatch.setitem(repro_grid.TUNED, "tiny-dit", tuned)
    after = {variant.name: variant.config for variant in repro_grid.variants()}
    assert {name: after[name] for name in before} == before and after["ours"]["optimizer"]["policy_lr"] == 1.2e-3
    for name in repro_grid.ALGORITHMS:
        rates = [before[f"tuning-{name}-{factor}"]["optimizer"]["policy_lr"] for factor in ("0.5", "1", "2")]
        assert rates == [7.5e-5, 1.5e-4, 3e-4]
        warm = before[f"tuning-{name}-2-warm-10"]["optimizer"]
        assert (warm["policy_lr"], warm["lr_warmup_iterations"]) == (3e-4, 10)
        again = repro_grid.LONG_TUNING_RATES[name]  # two of these
        assert len(again) == 2 and set(again) < set(repro_grid.TUNING_RATES)
        length = before[f"tuning-{name}-{again[0].name}-long"]["training"]
        assert length["iterations"] + length["value_pretraining_iterations"] == 100


def test_runs_go_seed_by_seed_and_tuning_has_seeds_of_its_own():
    chosen = [VARIANTS[name] for name in ("ours", "grpo", "tuning-ours-1")]
    assert [run.name for run in repro_grid.runs(chosen, (0, 2))] == [
        "ours-0", "grpo-0", "ours-2", "grpo-2", "tuning-ours-1-100", "tuning-ours-1-101",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the rule


def test_the_rule_decides_by_students_distribution():
    # s = 0.01 and so an interval of +-4.303 * 0.01 / sqrt(3) = 0.0248.
    assert repro_claims.half_width([0.02, 0.03, 0.04]) == pytest.approx(0.02484, abs=1e-5)
    assert repro_claims.decide([0.02, 0.03, 0.04]) == "holds"
    assert repro_claims.decide([-0.02, -0.03, -0.04]) == "does not hold here"
    assert repro_claims.decide([0.01, 0.02, 0.03]) == "undecided"  # 3.5 standard errors of a spread hardly known
    assert repro_claims.decide([0.02, 0.03, 0.04], threshold=0.01) == "undecided"
    assert repro_claims.decide([0.02, 0.03, 0.04], threshold=0.06) == "does not hold here"
    assert repro_claims.decide([0.01, 0.02, 0.03], threshold=-0.02) == "holds"
    assert repro_claims.decide([0.03, 0.04]) == "undecided"  # +-12.7 standard errors of two seeds: 0.0635
    assert repro_claims.decide([0.5]) == "undecided" and repro_claims.decide([]) == "not measured"


def fake_result(name: str, seed: int, **changes) -> dict:
    """A result of a variant, of numbers that are easily told: see `end`, `background`, `seconds`, `explained`."""
    variant = VARIANTS[name]
    training = variant.config["training"]
    first, then = training["value_pretraining_iterations"], training["iterations"]
    values = {"end": 0.8 + 0.001 * seed, "background": 0.8, "seconds": 10.0, "explained": [0.1] * STEPS, **changes}
    has_critic = variant.config["algorithm"]["name"] == "ppo"

    def evaluation(iteration: int) -> dict:
        done = iteration / (first + then)
        means = {
            "composition": 0.78 + done * (values["end"] - 0.78),
            "composition_strict": 0.45 + 0.1 * done,
            "background": 0.86 + done * (values["background"] - 0.86),
            "jpeg_compressibility": -2.5,
        }
        return {
            "iteration": iteration,
            "images": iteration * SAMPLES,
            "seconds": iteration * values["seconds"],
            "scores": {reward: {"mean": mean, "stderr": 0.009} for reward, mean in means.items()},
            "strict_by_task": {"counting": 0.3},
            "explained_variance_per_step": [done * v for v in values["explained"]] if has_critic else None,
            "squared_error_per_step": [1 - done * v for v in values["explained"]] if has_critic else None,
        }

    every = variant.config["evaluation"]["every"] or first + then
    iterations = [*range(0, first + then, every), first + then]
    return {
        "variant": name, "seed": seed, "group": variant.group, "model": variant.model,
        "overrides": variant.own_overrides, **ABOUT, "threads": 1, "jobs": 2,
        "config": {"seed": seed, **variant.config},
        "seconds": (first + then) * values["seconds"], "iteration_seconds": values["seconds"],
        "training": {
            "phase": ["value_pretraining"] * first + ["ppo" if has_critic else "grpo"] * then,
            "seconds": [values["seconds"]] * (first + then),
            "reward": {"composition": list(np.linspace(0.74, values["end"], first + then))},
            "explained_variance_per_step": [None] * (first + then),
        },
        "evaluations": [evaluation(iteration) for iteration in iterations],
        "prompts": [f"{count} red circles" for count in range(2, 10)],
    }  # fmt: skip


def verdicts(results: dict) -> dict[str, tuple[str, float | None]]:
    found = {}
    for claim in repro_claims.claims(repro_grid.FULL):
        numbers = list(claim.numbers(results).values())
        found[claim.says] = repro_claims.decide(numbers, claim.threshold), np.mean(numbers) if numbers else None
    return found


def test_claims_are_paired_over_the_seeds_that_both_have():
    results = {}
    for seed, gain in enumerate((0.050, 0.055, 0.060)):
        # Seeds differ by more than the algorithms do.
        results["ours-long", seed] = fake_result("ours-long", seed, end=0.80 + 0.04 * seed + gain)
        results["grpo-long", seed] = fake_result("grpo-long", seed, end=0.80 + 0.04 * seed)
        results["grpo-long-clock", seed] = fake_result("grpo-long-clock", seed, end=0.86 + 0.04 * seed + gain)
        results["grpo", seed] = fake_result("grpo", seed, end=0.99)  # short ones have no part in it
    results["ddpo-long", 1] = fake_result("ddpo-long", 1, end=0.95)
    found = verdicts(results)
    word, mean = found["PPO with a latent critic is better than GRPO on tiny-dit, at equal images"]
    assert word == "holds" and mean == pytest.approx(0.055)
    word, mean = found["PPO with a latent critic is better than GRPO on tiny-dit, at equal compute"]
    assert word == "does not hold here" and mean == pytest.approx(-0.06)
    word, mean = found["PPO with a latent critic is better than DDPO on tiny-dit, at equal images"]
    assert word == "undecided" and mean == pytest.approx(0.895 - 0.95)
    assert found["PPO with a latent critic is better than GRPO on tiny-unet, at equal images"] == ("not measured", None)


def test_the_critics_claims_are_of_cost_explained_variance_and_background():
    results = {}
    for seed in range(3):
        rising = [0.05 + 0.02 * step + 0.001 * seed for step in range(STEPS)]
        results["ddpo", seed] = fake_result("ddpo", seed, seconds=7.0)
        results["ours", seed] = fake_result("ours", seed, seconds=9.0, explained=rising, background=0.80 - 0.002 * seed)
        results["pixel", seed] = fake_result("pixel", seed, seconds=15.0 + 0.1 * seed, explained=rising)
        results["joint", seed] = fake_result("joint", seed, background=0.855 + 0.001 * seed)
        results["ours-long", seed] = fake_result("ours-long", seed, explained=[2 * number for number in rising])
    found = verdicts(results)
    word, ratio = found["The latent critic costs a 2.6th of a pixel critic or less"]
    assert word == "holds" and ratio == pytest.approx(8.1 / 2)
    assert found["The latent critic values at least as well as the pixel critic"] == ("holds", pytest.approx(0.0))
    word, least = found["The critic explains variance at every timestep"]
    assert word == "holds" and least == pytest.approx(0.102)
    word, growth = found["It explains more toward the clean end"]
    assert word == "holds" and growth == pytest.approx(0.28)
    word, damage = found["Training on composition alone damages the background, which it does not reward"]
    assert word == "holds" and damage == pytest.approx(0.062)
    word, change = found["Joint training does not damage the background"]  # by less than counts as damage
    assert word == "holds" and change == pytest.approx(-0.004)
    assert found["Joint training keeps more of the background"][0] == "holds"


# ----------------------------------------------------------------------------------------------------------- the runner

# Trains nothing: writes what a trainer writes, an iteration every 10 ms, and goes on where it was stopped.
FAKE_TRAINING = """
import json, sys, time
from pathlib import Path
import numpy as np

config = json.loads(Path(sys.argv[1]).read_text())
folder = Path(config["output_dir"])
(folder / "evaluations").mkdir(parents=True, exist_ok=True)
first, total = config["training"]["value_pretraining_iterations"], config["training"]["iterations"]
total += first
path = folder / "metrics.jsonl"
done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
print("goes on after", len(done), "rows", flush=True)
if config["algorithm"]["name"] == "ddpo":
    print("something broke", flush=True)
    sys.exit(3)
name = config["algorithm"]["name"]
for iteration in range(len(done), total + 1):
    row = {"iteration": iteration}
    if iteration:
        time.sleep(0.01)
        phase = "value_pretraining" if iteration <= first else name
        row |= {"phase": phase, "samples": 256, "reward/composition": 0.5 + iteration / 100,
                "reward/composition_std": 0.2, "seconds": 2.0 if iteration <= first else 3.0}
        row["seconds"] += 900.0 * (iteration == 9)  # a pause, which counts for nothing
        if name == "ppo":
            row["explained_variance_per_step"] = [0.1, 0.2]
    if iteration in (0, total):
        row |= {"eval/composition": 0.7 + iteration / 1000, "eval/composition_stderr": 0.01, "eval/task/counting": 0.3}
        kept = {"images": np.full((32, 4, 4, 3), iteration, np.uint8)}
        if name == "ppo":
            row["eval/explained_variance_per_step"] = [0.1, 0.3]
            kept |= {"values": np.zeros((5, 2)), "rewards": np.full(5, 2.0)}
        np.savez(folder / "evaluations" / f"iteration-{iteration:06d}", **kept)
        prompts = [f"prompt {i}" for i in range(32)]
        (folder / "evaluations" / f"iteration-{iteration:06d}.json").write_text(json.dumps({"prompts": prompts}))
    with path.open("a") as file:
        file.write(json.dumps(row) + "\\n")
(folder / "checkpoints" / "iteration-000040").mkdir(parents=True)
(folder / "checkpoints" / "iteration-000040" / "run_state.safetensors").write_text("state")
"""


@pytest.fixture
def places(tmp_path) -> repro_places.Places:
    (tmp_path / "training.py").write_text(FAKE_TRAINING)
    return repro_places.Places(tmp_path / "results", tmp_path / "runs")


def runner(places: repro_places.Places, jobs: int = 2, cores: int = 5) -> repro_runner.Runner:
    script = places.output.parent / "training.py"
    return repro_runner.Runner(places, ABOUT, jobs, cores, lambda recipe: [sys.executable, str(script), recipe], 0.02)


def test_a_run_becomes_a_result_and_a_strip_and_its_folder_goes(places):
    planned = repro_grid.runs([VARIANTS[name] for name in ("ours-long", "ours", "grpo")], (0, 1))
    assert runner(places)(planned) == []
    result = json.loads((places.output / "runs" / "ours-0.json").read_text())
    assert result["variant"] == "ours" and result["seed"] == result["config"]["seed"] == 0
    assert result["config"]["training"] == VARIANTS["ours"].config["training"] and "output_dir" not in result["config"]
    assert result["commit"] == "abc1234" and result["threads"] == 2 and result["jobs"] == 2
    assert result["seconds"] == 4 * 2 + 36 * 3 and result["iteration_seconds"] == 3
    assert result["training"]["phase"] == ["value_pretraining"] * 4 + ["ppo"] * 36
    assert result["training"]["reward"]["composition"][:2] == [0.51, 0.52]
    before, after = result["evaluations"]
    assert before["images"] == before["seconds"] == 0 and after["images"] == 40 * 256 and after["seconds"] == 116
    assert after["scores"] == {"composition": {"mean": 0.74, "stderr": 0.01}}
    assert after["strict_by_task"] == {"counting": 0.3} and after["explained_variance_per_step"] == [0.1, 0.3]
    assert after["squared_error_per_step"] == [4.0, 4.0] and result["prompts"] == [f"prompt {i}" for i in range(8)]
    grpo = json.loads((places.output / "runs" / "grpo-1.json").read_text())
    assert (
        grpo["overrides"]["algorithm.name"] == "grpo" and grpo["training"]["explained_variance_per_step"] == [None] * 40
    )
    assert (
        grpo["evaluations"][-1]["squared_error_per_step"]
        is grpo["evaluations"][0]["explained_variance_per_step"]
        is None
    )

    strips = places.pictures("ours"), places.pictures("ours-before")
    with Image.open(strips[0]) as after, Image.open(strips[1]) as before:
        assert after.size == before.size == (32, 4)
        assert np.unique(after).tolist() == [40] and np.unique(before).tolist() == [0]
    with Image.open(places.pictures("ours-long")) as after:
        assert np.unique(after).tolist() == [100]
    # What --credit needs of seed 0 of `ours-long` stays.
    assert [folder.name for folder in places.runs.iterdir() if folder.is_dir()] == ["ours-long-0"]
    kept = places.runs / "ours-long-0" / "run"
    assert (kept / "metrics.jsonl").exists() and not (kept / "checkpoints").exists()


def test_finished_runs_are_not_repeated_and_failed_ones_are_told(places, capfd):
    planned = repro_grid.runs([VARIANTS["ddpo"], VARIANTS["grpo"]], (3,))
    assert [run.name for run in runner(places, jobs=1)(planned)] == ["ddpo-3"]
    told = capfd.readouterr().err
    assert "ddpo-3 failed with exit code 3" in told and "    something broke" in told and "grpo-3 done" in told
    written = places.result(planned[1]).stat().st_mtime_ns
    assert [run.name for run in runner(places)(planned)] == ["ddpo-3"]
    assert places.result(planned[1]).stat().st_mtime_ns == written
    assert places.log(planned[0]).read_text().count("something broke") == 2


INTERRUPTED = """
import signal, sys
sys.path.append({parts!r})
from pathlib import Path
import repro_grid, repro_places, repro_runner

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born without it
places = repro_places.Places(Path({output!r}), Path({runs!r}))
chosen = [variant for variant in repro_grid.variants() if variant.name in ("ours", "grpo")]
command = lambda recipe: [sys.executable, {script!r}, recipe]
try:
    repro_runner.Runner(places, {about!r}, 2, 2, command, 0.02)(repro_grid.runs(chosen, (1,)))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_what_is_interrupted_goes_on(places):
    script = places.output.parent / "training.py"
    script.write_text(FAKE_TRAINING.replace("time.sleep(0.01)", "time.sleep(60.0 if iteration == 25 else 0)"))
    folders = {"output": str(places.output), "runs": str(places.runs), "script": str(script)}
    code = INTERRUPTED.format(parts=str(BENCH / "reproduce_parts"), about=ABOUT, **folders)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    planned = repro_grid.runs([VARIANTS["ours"], VARIANTS["grpo"]], (1,))
    rows = [places.run_folder(run) / "metrics.jsonl" for run in planned]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_bytes().count(b"\n") == 25 for path in rows):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    with pytest.raises(repro_places.Mistake, match="another reproduce.py works there"):
        runner(places)(planned)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and not places.output.exists()

    script.write_text(FAKE_TRAINING)
    assert runner(places)(planned) == []
    assert {path.name for path in (places.output / "runs").iterdir()} == {"ours-1.json", "grpo-1.json"}
    assert all(len(repro_places.result_of(run, places)["training"]["phase"]) == 40 for run in planned)


def test_an_unfinished_run_keeps_what_it_had(places):
    """The log of one that goes on says so."""
    run = repro_grid.Run(VARIANTS["ours-long"], 0)
    script = places.output.parent / "training.py"
    script.write_text(FAKE_TRAINING.replace("time.sleep(0.01)", "iteration == 7 and sys.exit(1)"))
    assert runner(places)([run]) == [run]
    script.write_text(FAKE_TRAINING)
    assert runner(places)([run]) == []
    assert places.log(run).read_text() == "goes on after 0 rows\ngoes on after 7 rows\n"


def test_results_of_other_settings_are_refused(places):
    run = repro_grid.Run(VARIANTS["ours"], 0)
    result = fake_result("ours", 0)
    repro_places.write_json(places.result(run), result)
    repro_places.check_settings([run], places)
    result["config"]["algorithm"] = {**result["config"]["algorithm"], "clip_range": 0.02}
    repro_places.write_json(places.result(run), result)
    with pytest.raises(repro_places.Mistake, match=r"ours-0\.json .* algorithm.clip_range 0.02 \(now 0.01\)"):
        repro_places.check_settings([run], places)


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_report_has_every_claim_table_and_run(places):
    ends = {"ours-long": 0.87, "grpo-long": 0.84, "ddpo-long": 0.83, "grpo-long-clock": 0.86,
            "ours": 0.85, "ddpo": 0.81, "grpo": 0.82, "grpo-kl": 0.80, "pretraining-0": 0.8, "pretraining-15": 0.86,
            "joint": 0.83, "tuning-ours-1": 0.83, "tuning-ours-2": 0.80}  # fmt: skip
    for name, end in ends.items():
        for seed in (100, 101) if name == "tuning-ours-1" else (100,) if name.startswith("tuning") else (0, 1, 2):
            seconds = 9.0 if name in ("ours-long", "ours", "joint") else 6.5
            result = fake_result(name, seed, end=end + 0.001 * (seed % 100), seconds=seconds)
            repro_places.write_json(places.result(repro_grid.Run(VARIANTS[name], seed)), result)
    other = fake_result("ours", 7)
    other["config"] = {**other["config"], "optimizer": {**other["config"]["optimizer"], "policy_lr": 1.0}}
    repro_places.write_json(places.result(repro_grid.Run(VARIANTS["ours"], 7)), other)
    for strip in ("ours", "ours-before", "joint"):
        Image.new("RGB", (8 * 64, 64)).save(places.pictures(strip))

    page = repro_report.report(list(VARIANTS.values()), repro_grid.FULL, places, "python bench/reproduce.py --report")
    text = page.read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]

    def row(first: str) -> list[str]:
        (found,) = [cells for cells in rows if cells[0] == first]
        return found

    claim = row("PPO with a latent critic is better than GRPO on tiny-dit, at equal images")
    assert claim[1] == "composition, ours-long minus grpo-long" and claim[2] == "+0.030 +- 0.000 (3 seeds)"
    assert claim[3] == "ours-long 0.871, grpo-long 0.841" and claim[-1] == "**holds**"
    clock = row("PPO with a latent critic is better than GRPO on tiny-dit, at equal compute")
    assert clock[2] == "+0.010 +- 0.000 (3 seeds)" and clock[3] == "ours-long 0.871, grpo-long-clock 0.861"
    pretrained = "15 iterations of value pretraining are better than none"
    assert row(f"{pretrained}, at equal images")[-1] == "**holds**"
    assert row(f"{pretrained}, before as many of PPO")[1].startswith("composition, pretraining-15-added minus")
    assert row("Training without guidance ends best: 1 against 4.5, short runs")[-1] == "not measured"
    longer = row("Training without guidance ends best: 1 against 2, long runs")
    assert longer[1] == "composition, ours-long minus guidance-2-long" and longer[-1] == "not measured"
    ours = row("`ours-long` PPO with the latent critic")
    assert ours[1:4] == ["3", "4 + 96", "0.871 +- 0.001"] and ours[7:10] == ["-", "900 +- 0", "9.00 +- 0.00"]
    assert row("`grpo-long-clock` GRPO, as many forwards of the trunk")[7] == "-0.010 +- 0.000"
    ours = row("`ours` PPO with the latent critic")
    assert ours[1:4] == ["3", "4 + 36", "0.851 +- 0.001"] and ours[7:10] == ["-", "360 +- 0", "9.00 +- 0.00"]
    assert row("`guidance-2` guidance 2 in training and evaluation")[1] == "0"
    assert row("`ddpo` DDPO: no critic, as many images")[7] == "-0.040 +- 0.000"
    assert row("`grpo` GRPO in groups of 8")[7] == "-"  # the others of its group are compared with it
    assert row("`grpo-kl` GRPO with a KL penalty")[7] == "-0.020 +- 0.000"
    assert row("`joint` three rewards, a value head each")[7] == "-0.020 +- 0.000"
    assert any(cells[:4] == ["`ours`", "3", "4 + 36", "0.851 +- 0.001"] for cells in rows)  # beside them
    assert row("ours-2")[1] == "0.780 -> 0.852 +- 0.009" and row("tuning-ours-2-100")
    tuned = next(cells for cells in rows if cells[0] == "ours, 40 iterations")  # the grid's rate
    assert tuned[1:4] == ["-", "**0.8201** (0.8196, 0.8205)", "0.7931 (0.7931)"]
    by_images = next(cells for cells in rows if cells[0] == "grpo-long-clock" and len(cells) == 9)  # to iteration 130
    assert by_images[1:3] == ["0.780 +- 0.000", "0.792 +- 0.000"] and by_images[-1] == "0.861 +- 0.001"
    compared = [variant.name for variant in VARIANTS.values() if variant.group in ("algorithms", "compute")]
    by_clock = {cells[0]: cells[1:] for cells in rows if len(cells) == 5 and cells[0] in compared}
    assert row("seconds of training") == ["seconds of training", "225", "450", "675", "900"]
    assert set(by_clock) == {"ours-long", "grpo-long", "ddpo-long", "grpo-long-clock"}
    assert by_clock["ours-long"] == ["0.803 +- 0.000", "0.826 +- 0.001", "0.848 +- 0.001", "0.871 +- 0.001"]
    assert by_clock["grpo-long"] == ["0.801 +- 0.000", "0.822 +- 0.001", "-", "-"]  # it ended after 650 s
    assert by_clock["grpo-long-clock"][2:] == ["0.845 +- 0.001", "-"]  # it ended after 845 s
    planned = {cells[0]: cells[1:] for cells in rows if len(cells) == 4 and cells[0] in compared}
    assert planned["ours-long"] == ["25,600", "2,592", "900 +- 0"] and planned["ddpo-long-clock"][-1] == "-"
    assert planned["grpo-long-clock"] == ["33,280", "2,600", "845 +- 0"]
    assert list(planned) == compared
    assert "ours-7 was made with other settings: optimizer.policy_lr 1.0 (now 0.00015), and is in the last" in text
    assert row("ours-7")[1] == "0.780 -> 0.807 +- 0.009"
    assert "Some Processor, 2 runs at a time with 1 thread each; python 3.11.7, torch 2.13.0; commit abc1234" in text
    assert "triton" not in text
    for plot in ("curves", "explained_variance", "hacking", "curves_options"):
        assert f"]({plot}.png)" in text and (places.output / f"{plot}.png").stat().st_size > 10_000


def test_curves_have_each_variant_once(tmp_path, monkeypatch):
    names = ("ours-long", "grpo-long", "grpo-long-clock", "ours", "pixel", "grpo", "grpo-kl", "joint", "unet-ours")
    results = {(name, 0): fake_result(name, 0) for name in names}
    drawn: dict[str, list[str]] = {}

    def learning(axes, variants, results, over):
        drawn[over] = [*drawn.get(over, []), "/".join(variants)]
        axes.plot([0], [0], label="some")

    monkeypatch.setattr(repro_curves, "_learning", learning)
    assert repro_curves.plot_curves(results, tmp_path / "curves.png")
    assert drawn == dict.fromkeys(("images", "seconds"), ["ours-long/grpo-long/grpo-long-clock", "unet-ours"])
    drawn.clear()
    assert repro_curves.plot_options(list(VARIANTS.values()), results, tmp_path / "curves_options.png")
    assert drawn == {"images": ["ours/pixel", "grpo/grpo-kl", "ours/joint"]}
    every = {(name, 0): fake_result(name, 0) for name in VARIANTS}
    drawn.clear()
    repro_curves.plot_curves(every, tmp_path / "curves.png")
    repro_curves.plot_options(list(VARIANTS.values()), every, tmp_path / "curves_options.png")
    shown = {name for names in drawn["images"] for name in names.split("/")}
    assert shown == {variant.name for variant in VARIANTS.values() if variant.group != "tuning"}


def test_seconds_are_matched_between_evaluations():
    result = fake_result("ours", 0, end=0.82, seconds=10.0)  # 0.78 to 0.82 in 400 s
    assert repro_tables.at_seconds(result, 200.0) == pytest.approx(0.80)
    assert repro_tables.at_seconds(result, 50.0) == pytest.approx(0.785)
    assert repro_tables.at_seconds(result, 500.0) is None


# ----------------------------------------------------------------------------------------------------------- the script


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCH / "reproduce.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_script_lists_and_reports_without_runs(tmp_path):
    folders = ("--output-dir", tmp_path / "results", "--runs-dir", tmp_path / "runs")
    places = repro_places.Places(tmp_path / "results", tmp_path / "runs")
    repro_places.write_json(places.result(repro_grid.Run(VARIANTS["pixel"], 1)), fake_result("pixel", 1))
    listed = run_script("--list", "--only", "algorithms,pixels,clip-0.0001,steps-2", *folders)
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert [line.split()[1] for line in lines[::2]] == [
        "ours-long", "grpo-long", "ddpo-long", "ours", "ddpo", "pixel", "clip-0.0001", "steps-2",
    ]  # fmt: skip
    assert lines[10].endswith("done 1 of 3 (seed 1)") and "critic.trunk=pixels, " in lines[11]
    quick = run_script("--quick", "--list", *folders)
    assert quick.stdout.count("of 2") == 5
    assert [line.split()[:2] for line in quick.stdout.splitlines()[::2]] == [
        *(line.split()[:2] for line in lines[:6:2]),
        ["pretraining", "pretraining-0"],
        ["pretraining", "pretraining-3"],
    ]

    reported = run_script("--report", *folders)
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.strip() == str(tmp_path / "results" / "README.md")
    assert "pixel-1" in (tmp_path / "results" / "README.md").read_text() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "nothing"],
            "--only nothing: unknown; choose of algorithms, compute, group-std, pixels, grpo-options",
        ),
        (["--quick", "--only", "clip"], "--only clip: not part of --quick; choose of algorithms, pretraining"),
        (["--seeds", "0,-1"], '"0,-1": give whole numbers from 0'),
        (["--jobs", "0"], "--jobs 0: give 1 or more"),
        (["--report", "--list"], "--report, --list and --credit: give one of them"),
        (["--credit", "no-such-folder"], "no-such-folder: no run there"),
    ],
)
def test_a_mistake_is_one_clear_message(tmp_path, arguments, message):
    run = run_script("--output-dir", tmp_path / "results", "--runs-dir", tmp_path / "runs", *arguments)
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr
    assert not run.stdout and not list(tmp_path.iterdir())


def test_a_broken_result_is_named(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ours-0.json").write_text("{")
    run = run_script("--report", "--output-dir", tmp_path)
    assert run.returncode == 2 and "ours-0.json: not valid JSON" in run.stderr and "Traceback" not in run.stderr
