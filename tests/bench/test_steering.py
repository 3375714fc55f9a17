"""`python bench/steering.py`: its cells on a small run, going on where it stopped, and its page."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_critic.engine.checkpoint import export
from latent_critic.engine.config import save_config
from latent_critic.engine.errors import UserError
from latent_critic.engine.steering import SMC, BestOfN, Guidance

BENCH = Path(__file__).parents[2] / "bench"
sys.path += [str(BENCH / "steering_parts"), str(BENCH / "reproduce_parts")]  # as the script itself does

import steer_cells  # noqa: E402
import steer_report  # noqa: E402


@pytest.fixture
def run(tiny_config, tiny_model, tmp_path, monkeypatch):
    """Folder of a run on the tiny pipeline, and scales that are quickly chosen."""
    guidance = [(scale, steer_cells.Way("", 1, Guidance(scale))) for scale in (0.1, 0.2)]
    smc = {kind: [(3.0, steer_cells.smc(kind, 4, 3.0))] for kind in steer_cells.SMC_KINDS}
    for name, value in (("CHOOSING", 2), ("TUNED", {"guidance": guidance} | smc), ("BATCH", 8)):
        monkeypatch.setattr(steer_cells, name, value)
    config = tiny_config(rewards=[{"name": "composition"}], critic={"dim": 32, "num_heads": 2})
    folder = tmp_path / "run"
    folder.mkdir()
    export(folder, tiny_model(config), config, folder)
    save_config(config, folder / "config.json")
    return folder


def test_cells_and_page(run, tmp_path, monkeypatch):
    bench, path = steer_cells.Bench(run, 3, 2, 2), tmp_path / "results" / "trained.json"
    drawn = []
    draw = bench.draw
    monkeypatch.setattr(bench, "draw", lambda way, *rest: (drawn.append(way.name), draw(way, *rest))[1])
    bench.run(path)
    found = json.loads(path.read_text())
    cells = found["cells"]
    assert found["scales"]["by reward"] == 3.0 and found["scales"]["guidance"] in (0.1, 0.2)
    assert drawn.count("") == 2 and len(drawn) == 5 + 2 * len(cells)  # what is chosen from; two seeds of each cell
    assert np.array(cells["unsteered"]["scores"]["composition"]).shape == (2, 3)
    steps = bench.run_config.rollout.num_inference_steps
    assert [steer_report.passes(cells[name]) for name in ("unsteered", "guidance", "best of 2 by V")] == [
        steps,
        2 * steps,
        2 * steps,
    ]
    # Of two particles the better is kept, the first being the unsteered one.
    kept, plain = (np.array(cells[name]["scores"]["composition"]) for name in ("best of 2 by reward", "unsteered"))
    assert (kept >= plain - 1e-6).all() and cells["best of 2 by reward"]["cost"]["scored"] == 2
    drawn.clear()
    del cells["guidance"]
    path.write_text(json.dumps(found))
    bench.run(path)
    assert drawn == ["guidance", "guidance"]  # the one that was missing
    with pytest.raises(UserError, match="trained.json has cells of prompts 3, not 4; give another --output-dir"):
        steer_cells.Bench(run, 4, 2, 2).run(path)

    page = steer_report.write(path.parent).read_text()
    mean = kept.mean(0)
    row = next(line for line in page.splitlines() if line.startswith("| best of 2 by reward |"))
    assert f"{mean.mean():.4f} +- {mean.std(ddof=1) / 3**0.5:.4f}" in row
    difference = (kept - plain).mean(0)
    assert f"{difference.mean():+.4f} +- {difference.std(ddof=1) / 3**0.5:.4f}" in row
    compared = next(line for line in page.splitlines() if line.startswith("| guidance / unsteered |"))
    again = json.loads(path.read_text())["cells"]["guidance"]
    guided = (np.array(again["scores"]["composition"]) - plain).mean(0)
    assert f"{guided.mean():+.4f} +- {1.96 * guided.std(ddof=1) / 3**0.5:.4f} | {2 * steps} / {steps} |" in compared
    with Image.open(path.parent / "pareto.png") as picture:
        assert np.asarray(picture).std() > 0


def test_every_way_is_there(run):
    bench = steer_cells.Bench(run, 3, 2, 16)
    scales = {"guidance": 2.0, "by V": 10.0, "by V, kept by reward": 3.0, "by reward": 1.0}
    ways = {way.name: way for way in bench.ways(scales)}
    assert len(ways) == 7 + 4 * 9
    assert ways["guidance, scale -1x"].guidance.scale == -2.0 and ways["ODE"].transition == "ode"
    pruned = ways["best of 16 by V, half given up midway"].particles()
    assert isinstance(pruned, BestOfN) and pruned.survivors(0) == 16 and pruned.survivors(1) == 8
    both = ways["guidance + SMC of 4 by V"]
    assert both.guidance.scale == 2.0 and isinstance(both.particles(), SMC) and both.particles().scale == 10.0
    judged = {kind: ways[f"SMC of 4 {kind}"].particles() for kind in steer_cells.SMC_KINDS}
    assert [(each.by, each.keep, each.scale) for each in judged.values()] == [
        ("value", "value", 10.0),
        ("value", "reward", 3.0),
        ("reward", "reward", 1.0),
    ]


@pytest.mark.parametrize("flags", [["--seeds", "1"], ["--prompts", "1"], ["--most", "0"]])
def test_what_cannot_be_is_said(flags):
    done = subprocess.run([sys.executable, str(BENCH / "steering.py"), *flags], capture_output=True, text=True)
    assert done.returncode == 2 and "take 2 or more" in done.stderr
