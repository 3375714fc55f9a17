"""Where and by what a run was made."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "triton", "diffusers")


def about() -> dict[str, Any]:
    """Command, commit, versions and processor of this process."""
    return {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "processor": _processor(),
        "load_average": os.getloadavg()[0],
    }


def usable_cores() -> int:
    """Those that this process may use, which containers and `taskset` make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"

    def git(*command: str) -> str:
        # Without the lock: runs may start while somebody commits.
        command = ("git", "--no-optional-locks", *command)
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # triton exists for Linux alone


def _processor() -> str:
    """The model name that Linux gives, which platform.processor() leaves out."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    return names[0].strip() if names else platform.processor() or platform.machine()
