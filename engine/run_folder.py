"""Where a run writes: a fresh folder each time, or the one to resume."""

import re
from pathlib import Path

from .errors import UserError


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


def _numbered(base: Path) -> dict[int, Path]:
    """Runs of this name by number: `x` is 1, `x-2` is 2."""
    found = {}
    for path in base.parent.iterdir() if base.parent.is_dir() else ():
        match = re.fullmatch(re.escape(base.name) + r"(?:-(\d+))?", path.name)
        if match and (path / "config.json").is_file():
            found[int(match[1] or 1)] = path
    return found
