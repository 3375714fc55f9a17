"""The results in pictures."""

from pathlib import Path
from typing import Any

from bench_summary import OTHER, PHASES
from bench_work import COMPILED, NO_GRAPHS, OURS, STOCK, WITH_CRITIC_PASSES
from matplotlib.figure import Figure

INK, GREY = "#222222", "#8a8a8a"
COLOURS = ("#bdbdbd", "#4477aa", "#66ccee", "#aa3377", "#44aa99", "#ccbb44", "#ee6677", "#8866aa", "#dddddd")
LOOP_COLOURS = {
    STOCK: "#9a9a9a",
    COMPILED: "#c8c8c8",
    NO_GRAPHS: "#66b877",
    OURS: "#228833",
    WITH_CRITIC_PASSES: "#aaddaa",
}


def plot(cases: list[dict], machine: dict[str, Any], path: Path) -> None:
    """A row a work: images a second of rollouts and iterations, and where an iteration's time goes."""
    heights = [max(8, sum(len(loops) + 1 for _, loops in _speeds(case))) for case in cases]
    figure = Figure((15, 1.0 + 0.35 * sum(heights)), dpi=110, layout="constrained")
    axes = figure.subplots(len(cases), 2, height_ratios=heights, squeeze=False)
    for case, (speed, split) in zip(cases, axes, strict=True):
        _plot_speed(speed, case)
        _plot_phases(split, case)
    figure.suptitle(f"{machine['command']}, torch {machine['torch']}, commit {machine['commit']}", fontsize=10)
    figure.savefig(path)


def _speeds(case: dict) -> list[tuple[str, dict]]:
    """Titles and rows by loop of all that has images a second."""
    groups = [(f"rollouts, batch {rollout['batch']}", rollout["loops"]) for rollout in case["summary"]["rollouts"]]
    if case["summary"]["iterations"]:
        groups.append((f"full iteration, batch {case['work']['batch']}", case["summary"]["iterations"]))
    return groups


def _plot_speed(axis, case: dict) -> None:
    place, ticks = 0.0, []
    for title, loops in _speeds(case):
        for loop, row in loops.items():
            low, median, high = row["images_per_s"]
            axis.barh(place, median, 0.8, color=LOOP_COLOURS[loop], xerr=[[median - low], [high - median]], ecolor=INK)
            times = f", {row['speedup'][1]:.2f} x" if row["speedup"] else ""
            axis.text(high, place, f"  {median:.3g}{times}", va="center", fontsize=8, color=INK)
            ticks.append((place, loop))
            place -= 1.0
        axis.text(0.99, place + len(loops) + 0.55, title, transform=axis.get_yaxis_transform(), ha="right", fontsize=8)
        place -= 0.8
    axis.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    axis.set_ylim(place + 1.2, 0.9)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.18)
    work = case["work"]
    axis.set_xlabel("images a second, median with 20th and 80th percentile; x stock loop", fontsize=8)
    sizes = f"{work['resolution']} px, {work['steps']} steps"
    axis.set_title(f"{work['model']}, {sizes}, {case['stock']['device']}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _plot_phases(axis, case: dict) -> None:
    iterations = case["summary"]["iterations"]
    axis.spines[["top", "right"]].set_visible(False)
    if not iterations:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "rollouts only", ha="center", color=GREY, transform=axis.transAxes)
        return
    colours = dict(zip((*PHASES, OTHER), COLOURS, strict=True))
    labelled = set()
    for place, row in enumerate(iterations.values()):
        for where, height, offset in (("main", 0.5, 0.0), ("beside", 0.18, 0.38)):
            left = 0.0
            for phase, seconds in row["phases"][where].items():
                if seconds <= 0:
                    continue
                label = phase if phase not in labelled else None
                labelled.add(phase)
                hatch = "////" if where == "beside" else None
                axis.barh(
                    place + offset,
                    seconds,
                    height,
                    left=left,
                    color=colours[phase],
                    label=label,
                    hatch=hatch,
                    edgecolor="white",
                )
                left += seconds
    axis.set_yticks(range(len(iterations)), list(iterations), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("seconds of an iteration by phase; the thin, hatched bars run beside the others", fontsize=8)
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
