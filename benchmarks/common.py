"""What every result file says of itself: date, command, commit, hardware, versions."""

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "deepspeed", "transformers")


def today() -> str:
    return datetime.date.today().isoformat()


def provenance(command: str) -> str:
    """One sentence for the head of a page."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"`{command}` at commit {commit()}; {os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}."
    )


def commit() -> str:
    """Results that another benchmark has just written make no commit dirty."""
    found = _git("describe", "--always") or "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return f"{found}-dirty" if changed else found


def end_with(main: Callable[..., int | None], *given) -> NoReturn:
    """Ends the process by what `main` returns; input that it refuses (ValueError) is one line and exit 2."""
    try:
        sys.exit(main(*given))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
