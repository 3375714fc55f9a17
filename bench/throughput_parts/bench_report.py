"""The results as Markdown tables, a JSON file and a plot."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_plot import plot
from bench_summary import OTHER, PHASES, summarize
from bench_work import OURS, TRUNK, UPDATES, WITH_CRITIC_PASSES

PACKAGES = ("torch", "diffusers", "transformers", "deepspeed", "triton", "numpy")
COUNTS = {
    "operator_calls": "operator calls",
    "kernel_launches": "kernel launches",
    "graph_launches": "graph launches",
    "host_syncs": "host syncs",
}


def about() -> dict[str, Any]:
    """Machine, versions, commit and command of this run, and how busy the machine was before it."""
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "command": shlex.join(["python", "bench/throughput.py", *sys.argv[1:]]),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # triton exists for Linux alone


def save(cases: list[dict], machine: dict[str, Any], stem: Path) -> str:
    """Writes stem.json, .md and .png of what `comparison.compare` returned; returns the table."""
    cases = [{**case, "summary": summarize(case)} for case in cases]
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"about": machine, "cases": cases}, indent=1, allow_nan=False)
    stem.with_suffix(".json").write_text(content + "\n")
    text = table(cases, machine)
    stem.with_suffix(".md").write_text(text)
    plot(cases, machine, stem.with_suffix(".png"))
    return text


# ------------------------------------------------------------------------------------------------------------- table


def table(cases: list[dict], machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES) if machine[name])
    cores = f"{machine['cores']} cores with a load of {machine['load_average']:.1f} before the run"
    lines = [f"`{machine['command']}`: {cores}, {versions}, commit {machine['commit']}", ""]
    for case in cases:
        lines += [*_head(case), *_verdicts(case)]
        for rollout in case["summary"]["rollouts"]:
            lines += _rollouts(case, rollout)
        if case["summary"]["iterations"]:
            lines += [*_iterations(case), *_phases(case)]
        lines += [*_critics(case), *_graphs(case), *(f"- {note}" for note in case["notes"]), ""]
    return "\n".join(lines)


def _head(case: dict) -> list[str]:
    work, stock, ours = case["work"], case["stock"], case["ours"]
    peak, flops = case["peak"], stock["flops_per_image"]
    return [
        f"## {work['model']}, {work['resolution']} px, {stock['device']}",
        "",
        f"{work['steps']} steps, the first {work['trained_steps']} trained, guidance 1, {stock['dtype']}, "
        f"{stock['parameters'] / 1e6:,.1f} M parameters and {ours['critic_parameters'] / 1e6:,.1f} M of the critic; "
        f"{'random weights and conditioning; ' if work['model'] != 'tiny-dit' else ''}"
        f"threads: {stock['threads']} of the stock loop, {ours['threads']} of ours. "
        f"A forward of one image is {flops['forward'] / 1e9:,.4g} GFLOP, its backward {flops['backward'] / 1e9:,.4g}; "
        f"MFU is of {peak['flops_per_s'] / 1e12:,.4g} TFLOP/s ({peak['source']}). "
        f"Medians of {work['rounds']} rounds with 20th and 80th percentile; `x stock` compares within rounds.",
        "",
    ]


def _verdicts(case: dict) -> list[str]:
    """One line for each comparison with the stock loop, won or lost."""
    lines = []
    for rollout in case["summary"]["rollouts"]:
        if OURS in rollout["loops"]:
            lines.append(_verdict(f"Rollout at batch {rollout['batch']}", rollout["loops"][OURS]))
    for loop, row in case["summary"]["iterations"].items():
        if loop in (OURS, WITH_CRITIC_PASSES):
            lines.append(_verdict(loop.replace(OURS, "Full iteration"), row))
    return [*lines, ""]


def _verdict(what: str, row: dict) -> str:
    if row["speedup"] is None:
        return f"- {what}: the stock loop has no number to compare with."
    low, median, high = row["speedup"]
    word = ", **slower**" if high < 1 else ", no clear difference" if low <= 1 else ""
    return f"- {what}: ours is {median:.2f} times as fast as the stock loop ({low:.2f} to {high:.2f}){word}."


def _rollouts(case: dict, rollout: dict) -> list[str]:
    loops = rollout["loops"]
    counts = [name for name in COUNTS if any(name in row["per_step"] for row in loops.values())]
    head = ["rollout", "images/s", "p20 to p80", "x stock", "MFU", *(f"{COUNTS[name]} a step" for name in counts)]
    rows = [
        [loop, *_speed(row), f"{row['mfu']:.1%}", *(_count(row["per_step"], name) for name in counts)]
        for loop, row in loops.items()
    ]
    return [f"Rollouts alone, batch {rollout['batch']}:", "", *_markdown(head, rows), ""]


def _iterations(case: dict) -> list[str]:
    work, ours = case["work"], case["ours"]
    on_cpu = case["stock"]["device"].startswith("CPU")
    kind = "largest size of the process so far" if on_cpu else "peak memory of the process"
    head = ["full iteration", "images/s", "p20 to p80", "x stock", "seconds", "MFU", kind, "refresh"]
    rows = [
        [loop, *_speed(row), f"{row['seconds'][1]:.3f}", f"{row['mfu']:.1%}", _gib(row["peak_memory"])]
        + [f"{row['refresh_share']:.2%}" if row["refresh_share"] else "-"]
        for loop, row in case["summary"]["iterations"].items()
    ]
    passes = f"{ours['critic_epochs']} critic-only pass" + ("es" if ours["critic_epochs"] > 1 else "")
    by = "its recipe" if work["model"] == "tiny-dit" else "default"
    return [
        f"Full iterations: {work['images']} images in micro-batches of {work['batch']}, {UPDATES} updates, one pass "
        f"over the samples; denoising steps in one training forward of ours: {ours['steps_per_forward']}. "
        f"`{WITH_CRITIC_PASSES}` adds the {passes} over all steps that ours trains with by {by}; the stock loop has no "
        f"counterpart. Weights to sample with: {ours['weights']}.",
        "",
        *_markdown(head, rows),
        "",
    ]


def _phases(case: dict) -> list[str]:
    rows = []
    iterations = case["summary"]["iterations"]
    for phase in (*PHASES, OTHER):
        row = [phase]
        for found in iterations.values():
            main, beside = found["phases"]["main"][phase], found["phases"]["beside"].get(phase, 0.0)
            row.append(f"{main:.3f}" + (f" (+ {beside:.3f} beside)" if beside else ""))
        rows.append(row)
    encode = case["stock"]["encode_seconds"]
    encoded = "is not measured: conditioning is random" if encode is None else f"takes {1e3 * encode:.1f} ms a prompt"
    return [
        "Seconds by phase, means; `beside` runs in other threads or streams meanwhile. `other` is losses, advantages, "
        f"statistics and waiting for pictures. Prompts are encoded once, before these iterations, which {encoded}.",
        "",
        *_markdown(["phase", *iterations], rows),
        "",
    ]


def _critics(case: dict) -> list[str]:
    rows = [
        [name, f"{row['ms'][1]:.3f}", f"{row['ms'][0]:.3f} to {row['ms'][2]:.3f}"]
        + ["-" if name == TRUNK else f"{row['price'][1]:+.1%} ({row['price'][0]:+.1%} to {row['price'][2]:+.1%})"]
        for name, row in case["summary"]["critics"].items()
    ]
    return [
        f"The critic's price, a forward at batch {case['critics']['batch']}:",
        "",
        *_markdown(["forward", "ms", "p20 to p80", "of the trunk's time"], rows),
        "",
    ]


def _graphs(case: dict) -> list[str]:
    return [
        f"- Capturing a step at batch {graph['batch']} takes {graph['seconds']:.2f} s and {_gib(graph['bytes'])}."
        for graph in case["graphs"]
    ]


def _speed(row: dict) -> list[str]:
    low, median, high = row["images_per_s"]
    speedup = f"{row['speedup'][1]:.2f}" if row["speedup"] else "-"
    return [f"{median:.4g}", f"{low:.4g} to {high:.4g}", speedup]


def _count(per_step: dict, name: str) -> str:
    return f"{per_step[name]:,.4g}" if name in per_step else "-"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
