"""What a run measures: `metrics.jsonl` with its mirrors (TensorBoard, Weights & Biases) and the progress bar.

A row is one flat dict an iteration with slash-named keys, for example

    {"iteration": 17, "phase": "ppo", "reward/composition": 0.61, "explained_variance_per_step": [0.05, 0.31, ...]}

Names of PPO's quantities (`approx_kl`, `old_approx_kl`, `clipfrac`, `explained_variance`) are those of CleanRL.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from .errors import TrainingError, UserError

METRICS_FILE = "metrics.jsonl"
PRETRAINING = "value_pretraining"
PHASES = {PRETRAINING: "value pretraining", "ppo": "PPO", "grpo": "GRPO", "ddpo": "DDPO"}

_WANDB_ID_FILE = "wandb_run_id"
_SECONDS_BETWEEN_LINES = 10.0  # where the progress bar goes to a file


def _plain(value: Any) -> Any:
    """The JSON value of a number, tensor, array or list of them; JSON has no NaN, so not finite becomes None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row under the names the mirrors show; entry i of a list becomes `key/i`."""
    for key, value in row.items():
        if key == "iteration":
            continue
        named = [(f"{key}/{i}", item) for i, item in enumerate(value)] if isinstance(value, list) else [(key, value)]
        yield from ((name, item) for name, item in named if isinstance(item, int | float))


def _complete_lines(path: Path) -> list[bytes]:
    """The lines of `path` that were written to their end: one torn by a kill has no newline."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        row["iteration"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}, line {number}: not a row of metrics; repair or delete that line") from None
    return row


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run, in the order they were logged; none where nothing was logged. A torn last line is left out.

    Raises UserError, with file and line, where a complete line is not a row.
    """
    path = Path(run_dir) / METRICS_FILE
    return [_parse(line, path, number) for number, line in enumerate(_complete_lines(path), start=1)]


class MetricsLogger:
    """Appends rows to `run_dir/metrics.jsonl` and mirrors their numbers. For rank 0 only.

    A run folder is one TensorBoard run and one W&B run, across resumes. Log an iteration's row *before* its checkpoint
    is written: then every checkpoint finds all rows up to its own iteration.

    Args:
        run_dir: existing folder of the run.
        tensorboard: write events to `run_dir/tensorboard`.
        wandb_project: W&B project, None for no W&B. Nothing of W&B is imported then.
        config: the resolved configuration, shown by W&B.

    Raises UserError where W&B is asked for and is not installed or cannot start, TrainingError where the disk is full.
    """

    def __init__(
        self, run_dir: str | os.PathLike, tensorboard: bool, wandb_project: str | None, config: dict[str, Any]
    ) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / METRICS_FILE
        self._tensorboard = tensorboard
        self._purge_step: int | None = None
        self._writer = None
        self._wandb = None if wandb_project is None else self._start_wandb(wandb_project, config)

    def _start_wandb(self, project: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logging.wandb_project is set but wandb is not installed: "
                "`pip install latent-critic[wandb]`, or set logging.wandb_project to null"
            ) from None
        id_file = self.run_dir / _WANDB_ID_FILE
        run_id = id_file.read_text().strip() if id_file.exists() else None
        try:
            run = wandb.init(project=project, config=config, dir=str(self.run_dir), id=run_id, resume="allow")
        except wandb.errors.Error as error:
            raise UserError(
                f"W&B could not start: {str(error).rstrip('.')}; run `wandb login`, set WANDB_MODE=offline, "
                "or set logging.wandb_project to null"
            ) from error
        id_file.write_text(run.id)
        return run

    def _summary_writer(self):
        # On the first row, not before: only then is it known whether truncate() asked to purge what is already there.
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._purge_step)
        return self._writer

    def log(self, iteration: int, row: dict[str, Any]) -> None:
        """Append one row. Values: numbers, strings, None, lists of numbers, tensors and arrays of them."""
        row = {"iteration": iteration} | {key: _plain(value) for key, value in row.items() if key != "iteration"}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(line) != len(line):
                    raise OSError("the disk took only part of the row")
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path}: {error.strerror or error}; make room and continue with --resume auto"
            ) from error
        if self._tensorboard:
            for name, value in _scalars(row):
                self._summary_writer().add_scalar(name, value, iteration)
            self._summary_writer().flush()
        if self._wandb is not None:
            self._wandb.log(dict(_scalars(row)), step=iteration)

    def truncate(self, iteration: int) -> None:
        """Drop what was logged after `iteration` and a torn last line: called on resume, before the first row.

        The file is replaced as a whole, so a kill leaves either the old rows or the new ones.
        """
        lines = _complete_lines(self.path)
        rows = (_parse(line, self.path, number) for number, line in enumerate(lines, start=1))
        kept = b"".join(line for line, row in zip(lines, rows, strict=True) if row["iteration"] <= iteration)
        temporary = self.path.with_name(METRICS_FILE + ".tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise TrainingError(f"cannot write {temporary}: {error.strerror}; make room and start again") from error
        self._purge_step = iteration + 1

    def close(self) -> None:
        """Flush and end the mirrors."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def describe(row: dict[str, Any]) -> str:
    """A row in a few words: raw mean rewards, ratio, clip fraction, explained variance; what is missing is left out."""
    rewards = [
        f"{key.removeprefix('reward/')} {value:.4g}"
        for key, value in row.items()
        if key.startswith("reward/") and key.count("/") == 1 and not key.endswith("_std") and value is not None
    ]
    words = ["reward " + " ".join(rewards)] if rewards else []
    for key, label, form in (
        ("ratio_mean", "ratio", ".6f"),
        ("clipfrac", "clipfrac", ".3f"),
        ("explained_variance", "explained variance", ".2f"),
    ):
        if row.get(key) is not None:
            words.append(f"{label} {row[key]:{form}}")
    return ", ".join(words)


class ProgressBar:
    """Progress over iterations: phase, reward, ratio, clip fraction, explained variance and time left.

    On a terminal a bar in place; in a file plain lines, at most one every ten seconds (and always the last).

    Args:
        total: iterations of the whole run, value pretraining included.
        initial: iterations done before, when resuming.
        file: where to write, standard error by default.
    """

    def __init__(self, total: int, initial: int = 0, file: TextIO | None = None) -> None:
        self.total = total
        self.done = self._initial = initial
        self._file = sys.stderr if file is None else file
        self._start = time.monotonic()
        self._last_line = -math.inf
        self._first_update_explained = False
        self._bar = None
        if self._file.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                file=self._file,
                dynamic_ncols=True,
                mininterval=0,
                miniters=1,
                desc="starting",
                bar_format="{desc} |{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def update(self, row: dict[str, Any]) -> None:
        """One iteration is done; `row` is its row of metrics (raw Python numbers)."""
        self.done += 1
        phase = PHASES.get(row.get("phase", ""), "")
        if self._bar is not None:
            self._bar.set_description_str(phase, refresh=False)
            self._bar.set_postfix_str(describe(row), refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and self.done < self.total:
            return
        self._last_line = now
        elapsed = now - self._start
        left = elapsed / (self.done - self._initial) * (self.total - self.done)
        clock = f"[{tqdm.format_interval(elapsed)}<{tqdm.format_interval(left)}]"
        self.write(f"{phase} {self.done}/{self.total} {clock} {describe(row)}")

    def write(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            tqdm.write(message, file=self._file)
        else:
            print(message, file=self._file, flush=True)

    def explain_first_update(self, ratio: float, max_ratio_deviation: float, clipfrac: float) -> None:
        """Say, once, what the first policy update on a fresh batch showed and what that means.

        Args:
            ratio: mean importance ratio of that update.
            max_ratio_deviation: largest |ratio - 1| in it.
            clipfrac: share of elements outside the clip range.
        """
        if self._first_update_explained:
            return
        self._first_update_explained = True
        seen = f"first update of a fresh batch: ratio {ratio:.6f}, clip fraction {clipfrac:.3g}"
        if clipfrac == 0:
            self.write(
                f"{seen} - as it must be; learning shows in reward and approx_kl from the second update on"
                + (f" (largest |ratio - 1|: {max_ratio_deviation:.1e})" if max_ratio_deviation > 0 else "")
            )
        else:
            self.write(
                f"warning: {seen}, largest |ratio - 1| {max_ratio_deviation:.1e}; they must be 1 and 0. Rollout and "
                "update do not compute the same log-probabilities: widen algorithm.clip_range or raise model.dtype"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
