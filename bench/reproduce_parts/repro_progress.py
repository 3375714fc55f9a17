"""Progress of a grid: one bar over all runs, and which of them are where."""

import sys
import time
from collections.abc import Sequence

from repro_grid import Run
from repro_places import Places
from repro_recipe import forwards
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0  # where there is no terminal, a bar would fill the log


class Progress:
    """Counts forwards of the trunk: they foretell the time left better than iterations of different kinds."""

    def __init__(self, runs: Sequence[Run], places: Places):
        self._places = places
        self._work = {run.name: forwards(run.variant.config).total(run.variant.config) for run in runs}
        self._done = {run.name: self._fraction(run) for run in runs}  # some were interrupted
        self._ended = self._failed = 0
        self._start, self._before = time.monotonic(), self._worked()
        self._last_line = self._start
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=sum(self._work.values()) or 1.0,
                initial=self._before,
                bar_format="{percentage:3.0f}% |{bar:16}| [{elapsed}<{remaining}{postfix}]",
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def ended(self, run: Run, failed: bool) -> None:
        self._done[run.name] = 1.0
        self._ended += 1
        self._failed += failed
        if self._bar is None:
            self._line(f"{run.name} {'failed' if failed else 'done'}")

    def show(self, active: Sequence[Run]) -> None:
        for run in active:
            self._done[run.name] = self._fraction(run)
        if self._bar is not None:
            self._bar.set_postfix_str(self._words(active), refresh=False)
            self._bar.update(self._worked() - self._bar.n)
            self._bar.refresh()
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line(self._words(active))

    def write(self, message: str) -> None:
        """A message that the bar does not overwrite."""
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            tqdm.write(message, file=sys.stderr)

    def _line(self, words: str) -> None:
        self._last_line = now = time.monotonic()
        elapsed, worked, total = now - self._start, self._worked(), sum(self._work.values())
        rate = (worked - self._before) / elapsed if elapsed > 0 else 0.0
        left = tqdm.format_interval((total - worked) / rate) if rate > 0 else "?"
        self.write(f"[{tqdm.format_interval(elapsed)}<{left}] {words}")

    def _words(self, active: Sequence[Run]) -> str:
        """Runs done, and the iteration each other run is at."""
        ended = f"{self._ended} of {len(self._work)} runs" + (f", {self._failed} failed" if self._failed else "")
        return ", ".join([ended, *(f"{run.name} {self._iteration(run)}/{_iterations(run)}" for run in active)])

    def _worked(self) -> float:
        return sum(self._done[name] * work for name, work in self._work.items())

    def _fraction(self, run: Run) -> float:
        return min(1.0, self._iteration(run) / max(1, _iterations(run)))

    def _iteration(self, run: Run) -> int:
        """Iterations in the run's metrics, whose first row is the evaluation before them."""
        path = self._places.run_folder(run) / "metrics.jsonl"
        return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def _iterations(run: Run) -> int:
    training = run.variant.config["training"]
    return training["value_pretraining_iterations"] + training["iterations"]
