"""What a finished run shows: pictures, curves, its held-out scores before and after, and its report."""

from pathlib import Path

import numpy as np

from . import reports
from .config import load_config
from .early_stop import EarlyStop
from .html_report import write_report
from .metrics import PRETRAINING, read_metrics
from .saved_evaluations import paired_difference, read_evaluations

PAIRS = 16  # in comparison.png


def summarize(run_dir: Path) -> str:
    """Draws the run's pictures from what it wrote, and returns its closing lines.

    The difference of a score comes with the standard error of the paired differences: prompts and seeds are the same.
    """
    evaluations = read_evaluations(run_dir)
    first, last = evaluations[0], evaluations[-1]
    before, after = first.arrays, last.arrays
    shown = len(before["images"])
    marks = [evaluation.marks(shown) for evaluation in (first, last)]
    captions = first.prompts[:shown]
    reports.save_grid(before["images"], captions, run_dir / "samples_before.png", marks=marks[0])
    reports.save_grid(after["images"], captions, run_dir / "samples_after.png", marks=marks[1])
    pairs = slice(PAIRS)
    reports.comparison(
        before["images"][pairs],
        after["images"][pairs],
        captions[pairs],
        *(None if m is None else m[pairs] for m in marks),
        run_dir / "comparison.png",
        f"The first {min(PAIRS, shown)} held-out prompts: same prompt, same noise",
    )
    rows = read_metrics(run_dir)
    reports.plot_curves(rows, run_dir / "curves.png")
    has_critic = "values" in after
    if has_critic:
        scatter = {"values": after["values"], "rewards": after["rewards"]}
        reports.plot_critic(rows, scatter, run_dir / "critic.png")
    write_report(run_dir)

    settings = first.settings
    lines = [
        "",
        f"held-out: {len(first.prompts)} prompts ({settings['prompts']}), {settings['num_inference_steps']} ODE steps, "
        f"guidance {settings['guidance_scale']:g}, seed {settings['seed']}, before -> after",
    ]
    for name, a in first.scores.items():
        b = last.scores[name]
        change, error = paired_difference(a, b)
        lines.append(f"  {name:<24} {a.mean():.4f} -> {b.mean():.4f}   ({change:+.4f} +- {error:.4f})")
    overhead = [row["overhead"] for row in rows if row.get("phase", PRETRAINING) != PRETRAINING]
    if overhead:
        lines.append(
            f"overhead: an iteration takes {np.median(overhead):.3f} x its trunk forwards and backwards (median)"
        )
    options = load_config(run_dir / "config.json").evaluation.early_stop
    if options:
        rule = EarlyStop.over(options, evaluations)
        lines.append(f"early stop: {rule.describe(is_kept=(run_dir / 'best').is_dir())}")
    is_lora = (run_dir / "lora").is_dir()
    exported = "lora (load_lora_weights)" if is_lora else "pipeline (DiffusionPipeline.from_pretrained)"
    critic = [", critic.png", ", critic.safetensors"] if has_critic else ["", ""]
    lines += [
        f"report:     {run_dir}/report.html",
        f"pictures:   {run_dir}/comparison.png, samples_before.png, samples_after.png, curves.png{critic[0]}",
        f"metrics:    {run_dir}/metrics.jsonl, evaluations/, tensorboard/",
        f"model:      {run_dir}/{exported}{critic[1]}",
        f"checkpoint: {run_dir}/checkpoints (--resume auto)",
    ]
    return "\n".join(lines)
