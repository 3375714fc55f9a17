"""`python bench/throughput.py`: the stock loop's formulas, what is counted, and the script as a reader runs it."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from latent_critic.engine.transitions import build_table
from latent_critic.kernels.transition import transition_log_prob_reference, transition_step_reference

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH / "throughput_parts"))  # as the script itself does

import bench_accounting  # noqa: E402
import bench_summary  # noqa: E402
import bench_work  # noqa: E402
import comparison  # noqa: E402
import phase_clock  # noqa: E402
import stock_loop  # noqa: E402
import turns  # noqa: E402

STEPS, BATCH, SHAPE = 8, 3, (4, 6, 6)
EPS = torch.finfo(torch.float32).eps


def flow_sampler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    table = build_table("flow-sde", 0.7, sigmas=scheduler.sigmas, num_trained_steps=STEPS)
    return stock_loop.flow_sde_step, scheduler, 0.7, table


def ddim_sampler():
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(STEPS)
    table = build_table(
        "ddim",
        1.0,
        alphas_cumprod=scheduler.alphas_cumprod,
        timesteps=scheduler.timesteps,
        final_alpha_cumprod=scheduler.final_alpha_cumprod.item(),
        num_trained_steps=STEPS,
    )
    return stock_loop.ddim_step, scheduler, 1.0, table


@pytest.mark.parametrize("k", range(STEPS))
@pytest.mark.parametrize("sampler", [flow_sampler, ddim_sampler])
def test_a_step_of_the_stock_loop_is_the_engines(sampler, k):
    step, scheduler, noise_level, table = sampler()
    v, z = torch.randn(2, BATCH, *SHAPE).unbind()
    timesteps = scheduler.timesteps[k].repeat(BATCH)
    torch.manual_seed(k)
    z_next, log_prob = step(scheduler, v, timesteps, z, noise_level)
    torch.manual_seed(k)
    noise = torch.randn(BATCH, *SHAPE)
    expected, _ = transition_step_reference(v, z, noise, table, k)
    expected_log_prob = transition_log_prob_reference(v, z, z_next, table, k)

    a, b, s = table[k].abs()
    # Coefficients are computed in float32 here, from 1 - sigma or 1 - ab, which lose up to 20 ulp to cancellation and
    # hand on half of it through the square root; some ten operations follow, on terms that partly cancel (DDIM's x0).
    slack = 64 * EPS * (z.abs() * (1 + a) + v.abs() * (1 + b + a) + s * noise.abs())
    assert ((z_next - expected).abs() <= slack).all()
    # d logp / d z_next is -noise / s, element by element; what remains is rounding of log s and of the mean.
    tolerance = (slack * noise.abs() / s).mean() + 64 * EPS * (1 + s.log().abs())
    assert (log_prob - expected_log_prob).abs().max() <= tolerance
    assert torch.equal(step(scheduler, v, timesteps, z, noise_level, z_next)[1], log_prob)


def test_advantages_compare_within_a_prompt():
    rewards = np.array([1.0, 2.0, 3.0, 2.0, 5.0], dtype=np.float32)
    found = stock_loop.group_advantages(rewards, ["a", "b", "a", "b", "a"])
    # "a": 1, 3, 5 with mean 3 and std sqrt(8 / 3); "b": 2, 2.
    high = 2 / (math.sqrt(8 / 3) + 1e-4)
    np.testing.assert_allclose(found, [-high, 0.0, 0.0, 0.0, high], rtol=1e-6)


def test_flops_are_those_of_the_products():
    width, layers, channels, side, tokens, joint, pooled = 32, 2, 4, 8, 5, 12, 20
    with torch.device("meta"):
        trunk = SD3Transformer2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=width,
            joint_attention_dim=joint,
            pooled_projection_dim=pooled,
            pos_embed_max_size=side // 2,
        )
    shapes = {"prompt_embeds": (tokens, joint), "pooled_prompt_embeds": (pooled,)}
    found = bench_accounting.count_flops(trunk, (channels, side, side), shapes)

    image, patch = (side // 2) ** 2, 4 * channels
    embed = image * patch * width + tokens * joint * width + (256 + pooled) * width  # these need no gradient of inputs
    macs = embed + 2 * width**2
    both = image + tokens
    macs += layers * (12 * width**2 + 4 * both * width**2 + 2 * both**2 * width + 8 * both * width**2)
    # The last block's text: modulated by 2 vectors in place of 6, no output projection, no feed-forward.
    macs -= 4 * width**2 + tokens * width**2 + 8 * tokens * width**2
    macs += 2 * width**2 + image * width * patch
    assert found == {"forward": 2 * macs, "backward": 4 * macs - 2 * embed}


def test_the_models_have_the_published_sizes():
    # Parameters of the published checkpoints' trunks.
    for name, millions in (("sd35-medium", 2243), ("sd15", 860)):
        trunk = stock_loop.build_trunk(name, Path(), "meta")
        assert round(sum(p.numel() for p in trunk.parameters()) / 1e6) == millions


def test_operator_calls_are_counted():
    x = torch.ones(3)
    assert bench_accounting.count_calls(lambda: (x + 1) * 2, torch.device("cpu")) == {"operator_calls": 2}


def test_threads_side_by_side_each_count_their_share_as_the_main_threads():
    clock = phase_clock.PhaseClock(torch.device("cpu"))
    threads = [threading.Thread(target=clock.timed("forward", time.sleep, share=1 / 4), args=(0.04,)) for _ in range(4)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = clock.read()
    assert found["beside"] == {} and found["main"].keys() == {"forward"}
    assert 0.04 <= found["main"]["forward"] <= time.perf_counter() - began


def test_what_a_graph_captures_is_no_span(monkeypatch):
    """An event of a capture has no time: asking for it is an error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = phase_clock.PhaseClock(torch.device("cuda"))
    assert clock.timed("decode", lambda x: x + 1)(1) == 2
    assert clock.read() == {"main": {}, "beside": {}}


def test_a_span_within_another_counts_for_itself_alone():
    clock = phase_clock.PhaseClock(torch.device("cpu"))

    def beside():
        with clock.span("decode"):
            time.sleep(0.02)

    began = time.perf_counter()
    with clock.span("rollout"):
        time.sleep(0.02)
        clock.timed("refresh", time.sleep)(0.05)
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    slack = time.perf_counter() - began - 0.09 + 1e-6  # what a busy machine adds, to whichever span
    found = clock.read()
    assert found["main"].keys() == {"rollout", "refresh"} and found["beside"].keys() == {"decode"}
    # The rollout's own 0.02 s and the 0.02 s it waits for the thread, of 0.09 s in all.
    assert found["main"]["refresh"] >= 0.05 and found["beside"]["decode"] >= 0.02
    assert 0.04 <= found["main"]["rollout"] < 0.04 + slack
    assert clock.read() == {"main": {}, "beside": {}}


def test_speedups_compare_within_rounds():
    seconds = {bench_work.STOCK: [2.0, 20.0, 4.0], bench_work.OURS: [1.0, 10.0, 2.0]}
    counts = dict.fromkeys(seconds, {"operator_calls": 30})
    rollout = {"batch": 2, "images": 8, "seconds": seconds, "counts": counts}
    results = {
        "work": {"steps": 10},
        "stock": {"flops_per_image": {"forward": 5.0, "backward": 9.0}},
        "peak": {"flops_per_s": 1000.0},
        "rollouts": [rollout],
        "iterations": {},
        "critics": {"seconds": {bench_work.TRUNK: [1.0, 2.0], bench_work.SHARED: [1.1, 2.2]}},
    }
    found = bench_summary.summarize(results)
    ours = found["rollouts"][0]["loops"][bench_work.OURS]
    assert ours["speedup"] == [2.0, 2.0, 2.0] and ours["images_per_s"][1] == 4.0
    assert ours["mfu"] == pytest.approx(8 * 10 * 5 / 2.0 / 1000) and ours["per_step"] == {"operator_calls": 3.0}
    assert found["critics"][bench_work.SHARED]["price"] == pytest.approx([0.1, 0.1, 0.1])


def test_a_loop_that_does_not_fit_is_left_out_and_named():
    work = bench_work.usual("tiny-dit", rounds=2)

    class Process:
        def call(self, method, loop, *_):
            if loop == bench_work.COMPILED:
                raise turns.OutOfMemory("CUDA out of memory.")
            return 1.0

    compared = comparison._Comparison(work, False, Process(), Process())
    loops = [bench_work.STOCK, bench_work.COMPILED, bench_work.OURS]
    found = compared._take_turns("rollouts", loops, lambda loop: compared.workers[loop].call("rollout", loop))
    assert found == {bench_work.STOCK: [1.0, 1.0], bench_work.OURS: [1.0, 1.0]}
    (note,) = compared.notes
    assert bench_work.COMPILED in note and "CUDA out of memory." in note


def test_what_a_process_raises_is_raised_here():
    worker = turns.Worker("fractions", "Fraction", 3, 4).ready()
    assert worker.call("limit_denominator", 2) == 1
    with pytest.raises(turns.WorkerError, match="AttributeError.*nothing"):
        worker.call("nothing")
    worker.close()
    worker = turns.Worker("fractions", "Fraction", 1, 0)
    with pytest.raises(turns.WorkerError, match="ZeroDivisionError"):
        worker.ready()
    worker.close()


# ---------------------------------------------------------------------------------------------------------- the script


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "CXX": "no-such-compiler", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, BENCH / "throughput.py", "--output-dir", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def numbers(content) -> list[float]:
    if isinstance(content, dict):
        return [n for value in content.values() for n in numbers(value)]
    if isinstance(content, list):
        return [n for value in content for n in numbers(value)]
    return [content] if isinstance(content, int | float) else []


@pytest.mark.parametrize("model", ["tiny-dit", "tiny-unet"])
def test_the_script_measures_every_loop(tmp_path, model):
    run = run_script(tmp_path, "--model", model, "--batch", "2", "--steps", "2", "--rounds", "1")
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "throughput_cpu.json").read_text())
    assert {"command", "commit", "cores", "load_average", "python", "torch", "diffusers", "deepspeed"} <= results[
        "about"
    ].keys()
    assert all(math.isfinite(number) for number in numbers(results))
    (case,) = results["cases"]
    assert case["work"] | {"images": 8, "trained_steps": 1, "batch": 2, "steps": 2} == case["work"]
    assert case["stock"]["device"].startswith("CPU") and case["stock"]["threads"] >= 1 <= case["ours"]["threads"]
    stock, ours, trained = bench_work.STOCK, bench_work.OURS, bench_work.WITH_CRITIC_PASSES
    summary = case["summary"]
    (rollout,) = summary["rollouts"]
    assert rollout["loops"].keys() == {stock, ours} and summary["iterations"].keys() == {stock, ours, trained}
    for row in (*rollout["loops"].values(), *summary["iterations"].values()):
        assert 0 < row["images_per_s"][0] <= row["images_per_s"][1] <= row["images_per_s"][2] and row["mfu"] > 0
    assert all(row["per_step"]["operator_calls"] > 10 for row in rollout["loops"].values())
    for loop, row in summary["iterations"].items():
        main, beside = row["phases"]["main"], row["phases"]["beside"]
        for phase in ("rollout", "forward", "backward", "optimizer"):
            assert main[phase] > 0, (loop, phase)
        for phase in ("decode", "reward"):
            assert main[phase] + beside[phase] > 0, (loop, phase)
        assert sum(main.values()) == pytest.approx(np.mean([r["seconds"] for r in case["iterations"][loop]]), rel=0.05)
        assert row["peak_memory"] > 2**20
    rows = [summary["iterations"][loop] for loop in (ours, trained)]
    work, with_passes = (row["mfu"] * row["seconds"][1] for row in rows)
    assert work == pytest.approx(with_passes)  # critic-only passes are no work of the trunk's
    assert summary["iterations"][ours]["phases"]["main"]["refresh"] > 0
    critics = summary["critics"]
    assert list(critics) == [bench_work.TRUNK, bench_work.SHARED, bench_work.SEPARATE, bench_work.PIXELS]
    assert critics[bench_work.SEPARATE]["price"][1] > 0.3  # twice the trunk, and a busy machine

    text = (tmp_path / "throughput_cpu.md").read_text()
    assert run.stdout == text + "\n"
    for part in ("Full iteration: ours is", "| decode |", "is left out, since nothing can be compiled here"):
        assert part in text
    assert (tmp_path / "throughput_cpu.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sd4"], "--model sd4: unknown; choose one of sd35-medium, sd15, tiny-dit, tiny-unet"),
        (["--model", "sd15", "--resolution", "500"], "--resolution 500: sd15 takes multiples of 64"),
        (["--model", "tiny-dit", "--resolution", "128"], "--resolution 128: tiny-dit takes multiples of 64 up to 64"),
        (["--model", "sd35-medium", "--steps", "1"], "--steps 1: give 2 or more"),
        (["--model", "sd15", "--batch", "0"], "--batch 0: give 1 or more"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--steps", "4"], "--steps needs --model"),
    ],
)
def test_a_mistake_is_one_clear_message(tmp_path, arguments, message):
    run = run_script(tmp_path, *arguments)
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr
    assert not run.stdout and not list(tmp_path.iterdir())
