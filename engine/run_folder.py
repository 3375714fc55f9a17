"""Where a run writes: a fresh folder each time, or the one to resume."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError

LOCK = ".lock"  # held by the process that writes there, and freed by the system however that ends


def choose(output_dir: str, resume: str | None) -> Path:
    """The run's folder, not created yet.

    Without `resume` an existing run is never touched: `runs/x` becomes `runs/x-2`, `runs/x-3`, ... With "auto" it is
    the newest of these (a new one where there is none); with a path, that folder. Raises UserError where it holds no
    run.
    """
    base = Path(output_dir)
    if resume not in (None, "auto"):
        if not (Path(resume) / "config.json").is_file():
            raise UserError(f"--resume {resume}: no run there (no config.json); give a run folder, or auto")
        return Path(resume)
    existing = _numbered(base)
    if not existing:
        return base
    newest = max(existing)
    if resume == "auto":
        return existing[newest]
    return base.with_name(f"{base.name}-{newest + 1}")


@contextmanager
def taken(output_dir: str, resume: str | None) -> Iterator[Path]:
    """What `choose` says, created, and this process's own within: new runs that start at the same time get a number
    each. A folder that no run was written to is gone afterwards.

    Raises UserError where it cannot be created, or another process has the run that is to be resumed.
    """
    folder = choose(output_dir, resume)
    config = folder / "config.json"
    resumes = config.is_file()
    while (lock := _lock(folder)) is None or (config.is_file() and not resumes):
        if resumes:
            raise UserError(f"--resume {resume}: another process is writing to {folder}; wait for it or stop it")
        if lock is not None:
            lock.release()
        folder = _next(folder, Path(output_dir))
        config = folder / "config.json"
    try:
        yield folder
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty
            folder.rmdir()


def _lock(folder: Path) -> FileLock | None:
    """None where another process has it."""
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        raise UserError(
            f"output_dir: {folder} cannot be created ({error.strerror}); give a folder that can be written"
        ) from error
    return lock


def _next(folder: Path, base: Path) -> Path:
    number = int(folder.name.removeprefix(base.name).removeprefix("-") or 1)
    return base.with_name(f"{base.name}-{number + 1}")


def _numbered(base: Path) -> dict[int, Path]:
    """Runs of this name by number: `x` is 1, `x-2` is 2."""
    found = {}
    for path in base.parent.iterdir() if base.parent.is_dir() else ():
        match = re.fullmatch(re.escape(base.name) + r"(?:-(\d+))?", path.name)
        if match and (path / "config.json").is_file():
            found[int(match[1] or 1)] = path
    return found
