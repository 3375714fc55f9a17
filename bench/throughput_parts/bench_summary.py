"""From what was measured to the numbers that are reported. Quantiles are 20 %, 50 % and 80 %, in this order."""

from typing import Any

import numpy as np
from bench_work import STOCK, TRUNK

PHASES = ("encode", "rollout", "decode", "reward", "forward", "backward", "optimizer", "refresh")
OTHER = "other"  # losses, advantages, statistics, waiting for pictures


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Of one work, as `comparison.compare` returned it."""
    return {
        "rollouts": [_rollout(results, rollout) for rollout in results["rollouts"]],
        "iterations": {loop: _iteration(results, loop) for loop in results["iterations"]},
        "critics": _critics(results["critics"]["seconds"]),
    }


def quantiles(values) -> list[float]:
    return np.quantile(np.asarray(values, dtype=float), [0.2, 0.5, 0.8]).tolist()


def _rollout(results: dict, rollout: dict) -> dict[str, Any]:
    work, images = results["work"], rollout["images"]
    flops = images * work["steps"] * results["stock"]["flops_per_image"]["forward"]
    peak = results["peak"]["flops_per_s"]
    loops = {}
    for loop, seconds in rollout["seconds"].items():
        per_step = {name: count / work["steps"] for name, count in rollout["counts"][loop].items()}
        loops[loop] = {
            "images_per_s": quantiles(images / np.array(seconds)),
            "speedup": _speedup(rollout["seconds"], loop),
            "mfu": flops / np.median(seconds) / peak,
            "per_step": per_step,
        }
    return {"batch": rollout["batch"], "loops": loops}


def _iteration(results: dict, loop: str) -> dict[str, Any]:
    work, rows = results["work"], results["iterations"][loop]
    flops = results["stock"]["flops_per_image"]
    forwards = work["steps"] + work["trained_steps"]  # critic-only passes make none: they read kept features
    total = work["images"] * (forwards * flops["forward"] + work["trained_steps"] * flops["backward"])
    all_seconds = {name: [row["seconds"] for row in found] for name, found in results["iterations"].items()}
    seconds = np.array(all_seconds[loop])
    phases = _phases(rows)
    return {
        "images_per_s": quantiles(work["images"] / seconds),
        "seconds": quantiles(seconds),
        "speedup": _speedup(all_seconds, loop),
        "mfu": total / np.median(seconds) / results["peak"]["flops_per_s"],
        "peak_memory": max(row["peak_memory"] for row in rows),
        "refresh_share": phases["main"]["refresh"] / seconds.mean(),
        "phases": phases,
    }


def _phases(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Mean seconds by phase on the main thread, whose rest is "other", and of what runs beside it."""
    means = {
        place: {phase: float(np.mean([row["phases"][place].get(phase, 0.0) for row in rows])) for phase in PHASES}
        for place in ("main", "beside")
    }
    total = float(np.mean([row["seconds"] for row in rows]))
    means["main"][OTHER] = max(0.0, total - sum(means["main"].values()))
    return means


def _speedup(seconds: dict[str, list[float]], loop: str) -> list[float] | None:
    """Times as fast as the stock loop, by rounds: what slows a whole round slows both. None without a stock loop."""
    if STOCK not in seconds:
        return None
    return quantiles(np.array(seconds[STOCK]) / np.array(seconds[loop]))


def _critics(seconds: dict[str, list[float]]) -> dict[str, dict]:
    trunk = np.array(seconds[TRUNK])
    return {
        name: {"ms": quantiles(1e3 * np.array(taken)), "price": quantiles(np.array(taken) / trunk - 1.0)}
        for name, taken in seconds.items()
    }
