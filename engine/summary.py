"""What a finished run shows: pictures, curves, and its held-out scores before and after."""

import json
from pathlib import Path

import numpy as np

from . import reports
from .metrics import PRETRAINING, read_metrics

PAIRS = 16  # in comparison.png


def summarize(run_dir: Path) -> str:
    """Draws the run's pictures from what it wrote, and returns its closing lines.

    The difference of a score comes with the standard error of the paired differences: prompts and seeds are the same.
    """
    files = sorted((run_dir / "evaluations").glob("*.json"))
    first, last = (json.loads(files[i].read_text()) for i in (0, -1))
    before, after = (np.load(files[i].with_suffix(".npz")) for i in (0, -1))
    shown = len(before["images"])
    marks = [_marks(content, shown) for content in (first, last)]
    captions = first["prompts"][:shown]
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

    settings, count = first["settings"], len(first["prompts"])
    lines = [
        "",
        f"held-out: {count} prompts ({settings['prompts']}), {settings['num_inference_steps']} ODE steps, "
        f"guidance {settings['guidance_scale']:g}, seed {settings['seed']}, before -> after",
    ]
    for name in first["scores"]:
        a, b = (np.array(content["scores"][name]) for content in (first, last))
        error = (b - a).std(ddof=1) / count**0.5
        lines.append(f"  {name:<24} {a.mean():.4f} -> {b.mean():.4f}   ({(b - a).mean():+.4f} +- {error:.4f})")
    overhead = [row["overhead"] for row in rows if row.get("phase", PRETRAINING) != PRETRAINING]
    if overhead:
        lines.append(
            f"overhead: an iteration takes {np.median(overhead):.3f} x its trunk forwards and backwards (median)"
        )
    is_lora = (run_dir / "lora").is_dir()
    exported = "lora (load_lora_weights)" if is_lora else "pipeline (DiffusionPipeline.from_pretrained)"
    critic = [", critic.png", ", critic.safetensors"] if has_critic else ["", ""]
    lines += [
        f"pictures:   {run_dir}/comparison.png, samples_before.png, samples_after.png, curves.png{critic[0]}",
        f"metrics:    {run_dir}/metrics.jsonl, evaluations/, tensorboard/",
        f"model:      {run_dir}/{exported}{critic[1]}",
        f"checkpoint: {run_dir}/checkpoints (--resume auto)",
    ]
    return "\n".join(lines)


def _marks(content: dict, shown: int) -> list[bool] | None:
    strict = content["scores"].get("composition_strict")
    return None if strict is None else [score == 1.0 for score in strict[:shown]]
