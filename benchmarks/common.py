"""What every result file says of itself: date, command, commit, hardware, versions."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

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


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
