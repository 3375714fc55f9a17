"""Each kernel against plain PyTorch and torch.compile: python bench/kernels.py

Forward, backward and both, in milliseconds: the formula in eager PyTorch, the same under torch.compile, ours, and each
of them in a CUDA graph, launched while the device still waits, so that its work alone counts. Variants take turns, so
that ratios hold on a shared machine. A pass is set beside a device copy that moves as many bytes, counted as each input
read once and each output written once; at batch 16 both find most of them in the cache, at 1 GB neither does. The
formula of critic_pool is the usual one, with every token projected. On a CPU, where there are no kernels, it times what
the public functions run there.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch._functorch.config
import triton
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from latent_critic import kernels
from latent_critic.kernels import adaln, ppo, transition
from latent_critic.kernels.critic_pool import LAYER_NORM_EPS

matplotlib.use("Agg")

HERE = Path(__file__).resolve().parent
PASSES = ("forward", "backward", "full")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32  # products of bfloat16 take a CPU a hundred times as long
CALLS = 5 if ON_GPU else 1  # in a row, within one measurement
LAUNCH_CYCLES = 2_000_000  # a millisecond of a GPU: longer than it takes to launch a graph


@dataclass
class Case:
    """One kernel at one size. `inputs` are the arguments of all variants; gradients are taken of those in `wrt`."""

    kernel: str
    size: str
    variants: dict[str, Callable]  # "eager" and "ours"; what compiles is the first
    inputs: tuple
    wrt: tuple[int, ...]
    bytes: dict[str, int]  # of a forward and a backward


# ------------------------------------------------------------------------------------------------------------- cases


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def transition_cases(size: str, batch: int, shape: tuple[int, int, int]) -> list[Case]:
    n = batch * shape[0] * shape[1] * shape[2]
    table = torch.tensor([[0.9, -0.1, 0.3]] * 10, device=DEVICE)
    step = torch.tensor(3, device=DEVICE)
    v, z, noise = randn(batch, *shape), randn(batch, *shape), randn(batch, *shape)  # the engine widens v
    v_bytes = v.itemsize
    key = kernels.NoiseKey(torch.tensor(0, device=DEVICE), torch.arange(batch, device=DEVICE))

    def eager_drawn(v, z, table, step):
        return transition.transition_step_reference(v, z, torch.randn_like(z), table, step)

    def ours_drawn(v, z, table, step):
        return kernels.transition_step(v, z, key, table, step)

    steps = {"eager": transition.transition_step_reference, "ours": kernels.transition_step}
    drawn = {"eager": eager_drawn, "ours": ours_drawn}
    log_probs = {"eager": transition.transition_log_prob_reference, "ours": kernels.transition_log_prob}
    return [
        Case("transition_step", size, steps, (v, z, noise, table, step), (), {"forward": n * (v_bytes + 12)}),
        Case("transition_step, noise drawn", size, drawn, (v, z, table, step), (), {"forward": n * (v_bytes + 8)}),
        Case(
            "transition_log_prob",
            size,
            log_probs,
            (v, z, noise, table, step),
            (0,),
            {"forward": n * (v_bytes + 8), "backward": n * (2 * v_bytes + 8)},
        ),
    ]


def sdpa_pool(h, query, key_weight, value_weight, scale, shift):
    """Critic pooling as it is usually written: projections of every token, then fused attention."""
    heads, dim = query.shape
    x = functional.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
    x = x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    keys, values = ((x @ w.T).unflatten(-1, (heads, dim)).transpose(1, 2) for w in (key_weight, value_weight))
    queries = query.unsqueeze(1).expand(len(h), heads, 1, dim)
    return functional.scaled_dot_product_attention(queries, keys, values).flatten(1)


def token_cases(size: str, batch: int, tokens: int, dim: int, heads: int = 8, head_dim: int = 64) -> list[Case]:
    h, y = randn(batch, tokens, dim, dtype=HALF), randn(batch, tokens, dim, dtype=HALF)
    scale, shift = (0.1 * randn(batch, 6 * dim, dtype=HALF)).chunk(6, dim=1)[1:3]
    query = randn(heads, head_dim, dtype=HALF)
    key_weight, value_weight = (randn(heads * head_dim, dim, dtype=HALF) / dim**0.5 for _ in range(2))
    pool = (h, query, key_weight, value_weight, scale, shift)
    weights = sum(x.nbytes for x in (query, key_weight, value_weight))
    pools = {"eager": sdpa_pool, "ours": kernels.critic_pool}
    modulates = {"eager": adaln.adaln_modulate_reference, "ours": kernels.adaln_modulate}
    gates = {"eager": adaln.gate_residual_reference, "ours": kernels.gate_residual}
    once = {"forward": h.nbytes + weights, "backward": h.nbytes + 2 * weights}
    return [
        Case("critic_pool", size, pools, pool, (1, 2, 3, 4, 5), once),
        Case(
            "critic_pool, tokens too",
            size,
            pools,
            pool,
            (0, 1, 2, 3, 4, 5),
            once | {"backward": 2 * h.nbytes + 2 * weights},
        ),
        Case(
            "adaln_modulate",
            size,
            modulates,
            (h, scale, shift),
            (0, 1, 2),
            {"forward": 2 * h.nbytes, "backward": 3 * h.nbytes},
        ),
        Case(
            "gate_residual", size, gates, (h, scale, y), (0, 1, 2), {"forward": 3 * h.nbytes, "backward": 3 * h.nbytes}
        ),
    ]


def ppo_cases(size: str, n: int, m: int) -> list[Case]:
    policy, values = [0.1 * randn(n) for _ in range(3)], [randn(n, m) for _ in range(3)]
    inputs = (*policy, *values, kernels.PPOClips(1e-3, 0.5, 5.0), 0.5)
    functions = {"eager": ppo.ppo_loss_reference, "ours": kernels.ppo_loss}
    once = {"forward": 4 * (4 * n + 4 * n * m), "backward": 8 * (n + n * m)}
    return [Case("ppo_loss", size, functions, inputs, (0, 3), once)]


def all_cases() -> list[Callable[[], list[Case]]]:
    """Functions that make the cases of a size: one size is in memory at a time."""
    if not ON_GPU:
        return [
            lambda: transition_cases("tiny-dit, batch 64", 64, (8, 8, 8)),
            lambda: token_cases("tiny-dit, batch 64", 64, 16, 128, head_dim=16),
            lambda: ppo_cases("batch 64, 1 reward", 64, 1),
        ]
    sd35, sd15 = (16, 64, 64), (4, 64, 64)
    return [
        lambda: transition_cases("SD3.5-M, batch 16", 16, sd35),
        lambda: transition_cases("SD1.5, batch 16", 16, sd15),
        lambda: transition_cases("SD3.5-M, 1 GB", 1024, sd35),
        lambda: token_cases("SD3.5-M, batch 16", 16, 1024, 1536),
        lambda: token_cases("SD1.5, batch 16", 16, 64, 1280),
        lambda: token_cases("SD3.5-M, 1 GB", 320, 1024, 1536),
        lambda: ppo_cases("batch 16, 1 reward", 16, 1),
        lambda: ppo_cases("batch 64, 3 rewards", 64, 3),
    ]


# ------------------------------------------------------------------------------------------------------- measurement


def runs_of(case: Case, function: Callable) -> dict[str, Callable[[], object]]:
    """The passes of one variant, as functions without arguments."""

    def leaves() -> list:
        """The inputs, for one pass: autograd ties a leaf to the stream of the first forward that keeps it."""
        return [
            x.detach().requires_grad_(i in case.wrt) if isinstance(x, Tensor) else x for i, x in enumerate(case.inputs)
        ]

    def forward() -> Tensor:
        with torch.no_grad():
            return differentiable(function(*case.inputs))

    if not case.wrt:
        return {"forward": forward}
    incoming = torch.randn_like(forward())
    kept, again = leaves(), leaves()
    output: list[Tensor] = []

    def backward() -> None:
        if not output:  # in the stream that backward runs in
            output.append(differentiable(function(*kept)))
        torch.autograd.grad(output[0], [kept[i] for i in case.wrt], incoming, retain_graph=True)

    def full() -> None:
        torch.autograd.grad(differentiable(function(*again)), [again[i] for i in case.wrt], incoming)

    return {"forward": forward, "backward": backward, "full": full}


def differentiable(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def captured(run: Callable) -> Callable[[], None]:
    """The same work as a replayed CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(CALLS):
            run()
    return graph.replay


def repeated(run: Callable) -> Callable[[], None]:
    def all_calls():
        for _ in range(CALLS):
            run()

    return all_calls


def copy_of(num_bytes: int) -> Callable[[], object]:
    """A device copy that reads and writes `num_bytes` in all."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def variants_of(case: Case) -> dict[str, dict[str, Callable]]:
    """{pass: {variant: what is timed}}."""
    functions = {"eager": case.variants["eager"], "ours": case.variants["ours"]}
    if ON_GPU:
        # One graph and no more: each case has one shape.
        functions["compile"] = torch.compile(case.variants["eager"], dynamic=False, fullgraph=True)
    work: dict[str, dict[str, Callable]] = {}
    for name, function in functions.items():
        for label, run in runs_of(case, function).items():
            work.setdefault(label, {})[name] = repeated(run)
        if ON_GPU:
            for label, run in runs_of(case, function).items():
                work[label][f"{name} + graph"] = captured(run)
    for label in ("forward", "backward"):
        if label in work:
            copy = copy_of(case.bytes[label])
            work[label]["copy"] = repeated(copy)
            if ON_GPU:
                work[label]["copy + graph"] = captured(copy)
    return work


def timed(run: Callable[[], None], ahead: bool = False) -> float:
    """Milliseconds a call. ahead: of a GPU alone, without the wait for the host to launch the first."""
    if not ON_GPU:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3 / CALLS
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(LAUNCH_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def peak_memory(run: Callable[[], None]) -> int | None:
    """Bytes that a call needs beyond what it is given."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, rounds: int) -> list[dict]:
    torch.compiler.reset()  # a function is compiled for a few shapes only, and then no more
    rows = []
    for label, variants in variants_of(case).items():
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 3):
            for name, run in variants.items():
                milliseconds = timed(run, ahead="graph" in name)
                if number >= 3:
                    times[name].append(milliseconds)
        for name, run in variants.items():
            p20, p50, p80 = torch.tensor(times[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            moved = case.bytes.get(label)
            row = {"kernel": case.kernel, "size": case.size, "pass": label, "variant": name}
            row |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "bytes": moved}
            row["gb_per_s"] = moved / p50 / 1e6 if moved else None
            row["peak_bytes"] = None if "graph" in name else peak_memory(run)
            rows.append(row)
        medians = {row["variant"]: row["p50_ms"] for row in rows if row["pass"] == label}
        for row in rows:
            if row["pass"] == label:
                copy = "copy + graph" if "graph" in row["variant"] else "copy"
                row["of_copy"] = medians[copy] / row["p50_ms"] if copy in medians else None
                row["x_eager"] = medians["eager"] / row["p50_ms"]
    return rows


# ----------------------------------------------------------------------------------------------------------- results


def about() -> dict:
    def git(*command: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else f"CPU ({platform.processor() or platform.machine()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
    }


def table(rows: list[dict], machine: dict) -> str:
    """A row a pass: medians of all variants, ours with its 20th and 80th percentile. The CSV file has everything."""
    lines = ["`python bench/kernels.py`: " + ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    if not ON_GPU:
        lines += ["On a CPU there are no kernels: `ours` is the PyTorch path that the public functions take there.", ""]
    best = "ours + graph" if ON_GPU else "ours"
    names = list(dict.fromkeys(row["variant"] for row in rows))
    others = [name for name in names if name != best]
    lines += [
        f"Milliseconds, median; `{best}` with its 20th and 80th percentile and its speed: the share of a copy's (in a "
        "graph too, on a GPU), and how many times as fast as the others.",
        "",
        "| "
        + " | ".join(["kernel", "size", "pass", *others, best, "GB/s", "of copy", *(f"x {n}" for n in others)])
        + " |",
        "|---" * (6 + 2 * len(others)) + "|",
    ]
    for key in dict.fromkeys((row["kernel"], row["size"], row["pass"]) for row in rows):
        found = {row["variant"]: row for row in rows if (row["kernel"], row["size"], row["pass"]) == key}
        ours = found[best]
        medians = [f"{found[name]['p50_ms']:.4f}" if name in found else "" for name in others]
        speed = [f"{found[name]['p50_ms'] / ours['p50_ms']:.2f}" if name in found else "" for name in others]
        spread = f"{ours['p50_ms']:.4f} ({ours['p20_ms']:.4f} to {ours['p80_ms']:.4f})"
        bandwidth = [f"{ours['gb_per_s']:.3g}", f"{ours['of_copy']:.0%}"] if ours["gb_per_s"] else ["", ""]
        lines.append("| " + " | ".join([*key, *medians, spread, *bandwidth, *speed]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], machine: dict, path: Path) -> None:
    """Speed-up over eager, a panel a pass, a group of bars a kernel and size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PASSES), 1, figsize=(13, 12), constrained_layout=True)
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if not name.startswith(("copy", "eager"))]
    for axis, label in zip(axes, PASSES, strict=True):
        chosen = [row for row in rows if row["pass"] == label]
        groups = list(dict.fromkeys((row["kernel"], row["size"]) for row in chosen))
        for offset, name in enumerate(names):
            speed = {(row["kernel"], row["size"]): row["x_eager"] for row in chosen if row["variant"] == name}
            places = [i + (offset - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(groups))]
            axis.bar(places, [speed.get(group, 0.0) for group in groups], 0.8 / len(names), label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(groups)), [f"{kernel}\n{size}" for kernel, size in groups], fontsize=6, rotation=20)
        axis.set_ylabel(f"{label}: times as fast as eager")
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"Kernels on {machine['device']}, torch {machine['torch']}, commit {machine['commit']}", fontsize=10
    )
    figure.savefig(path, dpi=120)


def save(rows: list[dict], machine: dict, folder: Path) -> str:
    """Writes JSON, CSV, plot and table, and returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ("kernels_gpu" if ON_GPU else "kernels_cpu")
    stem.with_suffix(".json").write_text(json.dumps({"about": machine, "rows": rows}, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, machine, stem.with_suffix(".png"))
    text = table(rows, machine)
    stem.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--rounds", type=int, default=50, help="measurements of each variant")
    parser.add_argument("--output-dir", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # or a compiled backward could run only once
    machine, rows, names = about(), [], {}
    for make in tqdm(all_cases(), desc="sizes", leave=False):
        for case in make():
            names[case.kernel] = None
            if args.kernel in case.kernel:
                rows += measure(case, args.rounds)
        if rows:
            text = save(rows, machine, args.output_dir)  # after each size: nothing measured is lost
    if not rows:
        parser.error(f"--kernel {args.kernel}: in none of {'; '.join(names)}")
    print(text, end="")


if __name__ == "__main__":
    main()
