"""The main job's time and memory: `vlscale demo`, whole or quick, as a user starts it.

    python benchmarks/main_job.py [--quick] [--write]

Prints seconds, the largest resident memory of all processes together (sampled ten times a second), and the table of
retrieval measures; `--write` keeps them, dated, in benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import RESULTS, provenance, today

from vlscale.evaluate.result import EvalResult
from vlscale.evaluate.table import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    flags = ["--quick"] if arguments.quick else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        started = time.perf_counter()
        job = subprocess.Popen([sys.executable, "-m", "vlscale", "demo", "--out", str(out), *flags])
        peak = watch(psutil.Process(job.pid))
        if job.wait() != 0:
            sys.exit(job.returncode)
        seconds = time.perf_counter() - started
        results = json.loads((out / "results.json").read_text())
    page = summary(flags, seconds, peak, results)
    print(page)
    if arguments.write:
        stem = f"{today()}-demo{'-quick' if arguments.quick else ''}"
        (RESULTS / f"{stem}.md").write_text(page)
        (RESULTS / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")


def watch(job: psutil.Process) -> int:
    """The largest sum of resident bytes over the job's processes while it runs."""
    peak = 0
    while job.is_running() and job.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for process in [job, *job.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, total)
        time.sleep(0.1)
    return peak


def summary(flags: list[str], seconds: float, peak: int, results: dict) -> str:
    named = {name: EvalResult.from_json(json.dumps(result)) for name, result in results.items()}
    command = " ".join(["python benchmarks/main_job.py", *flags, "--write"])
    return (
        f"# {' '.join(['vlscale demo', *flags])}, {today()}\n\n{provenance(command)}\n\n"
        f"- {seconds:.0f} seconds from start to report, after the install\n"
        f"- {peak / 1e9:.2f} GB resident at most, all processes together\n\n"
        f"{markdown(named)}\n"
    )


if __name__ == "__main__":
    main()
