"""Runs a grid: several trainings at a time, each in a process of its own. Whatever ends it, it can go on from there."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repro_grid import Run
from repro_places import Mistake, Places, recipe_of, result_of, write_json
from repro_progress import Progress
from repro_result import collect, save_strips

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0  # seconds that a process has to end when it is asked to
TAIL = 15  # lines of a failed run's log
KEPT = ("ours-long", 0)  # whose run folder stays, for --credit


def training_command(recipe: Path) -> list[str]:
    return [sys.executable, str(ROOT / "engine" / "train.py"), "--config", str(recipe), "--resume", "auto"]


@dataclass
class _Active:
    run: Run
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)


class Runner:
    """command: of a training, given its recipe. cores: of all runs together. poll: seconds between looks at them."""

    def __init__(
        self,
        places: Places,
        about: dict[str, Any],
        jobs: int,
        cores: int,
        command: Callable[[Path], list[str]] = training_command,
        poll: float = 1.0,
    ):
        self.places, self.jobs, self.threads = places, jobs, max(1, cores // jobs)
        self.about = about | {"threads": self.threads, "jobs": jobs}
        self.command, self.poll = command, poll
        self._lock: int | None = None

    def __call__(self, runs: Sequence[Run]) -> list[Run]:
        """Runs what is not finished yet, in this order; returns the runs that failed."""
        waiting = deque(run for run in runs if result_of(run, self.places) is None)
        active: list[_Active] = []
        failed: list[Run] = []
        with _exclusive(self.places.runs) as self._lock, Progress(list(waiting), self.places) as progress:
            try:
                while waiting or active:
                    while waiting and len(active) < self.jobs:
                        active.append(self._start(waiting.popleft()))
                    time.sleep(self.poll)
                    for one in [one for one in active if one.process.poll() is not None]:
                        active.remove(one)
                        if words := self._finish(one):
                            failed.append(one.run)
                            progress.write(words)
                        progress.ended(one.run, bool(words))
                    progress.show([one.run for one in active])
            finally:
                _stop(active)
        return failed

    def _start(self, run: Run) -> _Active:
        places = self.places
        places.folder(run).mkdir(parents=True, exist_ok=True)
        write_json(places.recipe(run), recipe_of(run, places))
        with open(places.log(run), "ab") as log:
            process = subprocess.Popen(
                self.command(places.recipe(run)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                start_new_session=True,  # Ctrl-C is for this process, which then ends the others one by one
                pass_fds=[self._lock],  # a training that outlives this process holds its lock
            )
        return _Active(run, process)

    def _finish(self, one: _Active) -> str:
        """Keeps the result of a process that has ended; or says why there is none."""
        code, run, places = one.process.returncode, one.run, self.places
        if code == 0:
            try:
                result = collect(run, places, self.about | {"process_seconds": round(time.monotonic() - one.began, 1)})
                if run.seed == 0:
                    save_strips(run, places)
                write_json(places.result(run), result)
                self._tidy(run)
                return ""
            except (ValueError, KeyError, OSError) as error:
                reason = f"has ended, but its folder is not what was expected: {error!r}"
        else:
            reason = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
        log = places.log(run)
        tail = "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL:])
        return f"{run.name} {reason}; {log} ends:\n{tail}"

    def _tidy(self, run: Run) -> None:
        """Deletes the run's folder; of the one that is kept, what only resuming needs."""
        if (run.variant.name, run.seed) != KEPT:
            shutil.rmtree(self.places.folder(run))
            return
        shutil.rmtree(self.places.run_folder(run) / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[int]:
    """Two runners over one folder would train into each other's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(
                f"{folder}: another reproduce.py works there, or a training that one left behind; wait for it, or give "
                "another --runs-dir"
            ) from None
        yield lock
    finally:
        os.close(lock)


def _stop(active: Sequence[_Active]) -> None:
    """Trainings may end at any time: their checkpoints are whole or not there."""
    for one in active:
        one.process.terminate()
    deadline = time.monotonic() + PATIENCE
    for one in active:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
