"""`python bench/kernels.py` as a reader runs it, with few rounds."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "kernels.py"
PASSES = {
    "transition_step": {"forward"},
    "transition_step, noise drawn": {"forward"},
    "transition_log_prob": {"forward", "backward", "full"},
    "critic_pool": {"forward", "backward", "full"},
    "critic_pool, tokens too": {"forward", "backward", "full"},
    "adaln_modulate": {"forward", "backward", "full"},
    "gate_residual": {"forward", "backward", "full"},
    "ppo_loss": {"forward", "backward", "full"},
}


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCH, "--rounds", "1", "--output-dir", folder, *arguments]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # its sizes are larger: make gpu runs them
    return subprocess.run(command, capture_output=True, text=True, env=no_gpu)


def test_every_kernel_is_measured(tmp_path):
    run = _run(tmp_path)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert {"device", "torch", "triton", "commit"} <= results["about"].keys()
    found: dict[str, set] = {}
    for row in results["rows"]:
        found.setdefault(row["kernel"], set()).add(row["pass"])
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert found == PASSES
    with (tmp_path / "kernels_cpu.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"])
    assert run.stdout == (tmp_path / "kernels_cpu.md").read_text() and "On a CPU there are no kernels" in run.stdout
    assert (tmp_path / "kernels_cpu.png").stat().st_size > 10_000


def test_an_unknown_kernel_is_one_clear_error(tmp_path):
    run = _run(tmp_path, "--kernel", "nothing")
    assert run.returncode == 2 and "--kernel nothing" in run.stderr and not list(tmp_path.iterdir())
