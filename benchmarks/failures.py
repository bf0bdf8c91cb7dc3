"""Trainings that are disturbed, and whether anything is lost: kill -9, signals, full disks, damaged files, clocks, NaN.

    vlscale bench failures [--trials 100] [--faults kill sigterm ...] [--out failures-work] [--write]

Real processes on a small corpus: a start, a fault, the same command again until the run is complete, and the comparison
with the undisturbed run (samples of every batch and, at one world size, the weights byte for byte), plus a look for
processes, shared memory and partial files that are left. `--trials` counts those of `kill`; the other faults get their
share of it, at least one. Trials are kept in OUT/trials.jsonl: the same command goes on after the last one, and
`--minutes` ends it in between. `--write` keeps the table, dated, in benchmarks/results/. Exit code 1 where something is
lost.
"""

import argparse
import json
import logging
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from hashlib import blake2b
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))
sys.path.append(str(Path(__file__).resolve().parent))

from common import RESULTS, provenance, today  # noqa: E402
from failures_faults import FAULTS  # noqa: E402
from failures_job import Place  # noqa: E402

from vlscale.resources import PACKAGE  # noqa: E402

SHARES = {"kill": 1.0, "sigterm": 0.2, "ranks": 0.02, "asleep-for-ever": 0.03}  # of --trials; else 0.05
END = "end of the training"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--out", type=Path, default=Path("failures-work"))
    parser.add_argument("--minutes", type=float, help="start no trial after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    place = Place(given.out.resolve())
    place.root.mkdir(parents=True, exist_ok=True)
    logging.getLogger("vlscale").setLevel(logging.WARNING)
    _same_trials(place.root, given)
    deadline = time.monotonic() + (float("inf") if given.minutes is None else given.minutes * 60)
    for name in given.faults:
        if not disturb(place, name, given.trials, given.seed, deadline):
            print("time is up; the same command goes on", file=sys.stderr)
            break
    rows = read_trials(place.root)
    page = table(rows, given.trials)
    print(page)
    if given.write:
        (RESULTS / f"{today()}-failures.md").write_text(page)
    return 1 if any(row["lost"] for row in rows) else 0


def _same_trials(root: Path, given: argparse.Namespace) -> None:
    """Chains are as long as --trials says, and weights are those of one code: a folder belongs to one of each."""
    kept, code = root / "trials.txt", blake2b(digest_size=8)
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(path.read_bytes())
    own = f"--trials {given.trials} --seed {given.seed}, code {code.hexdigest()}"
    if kept.is_file() and kept.read_text() != own:
        raise SystemExit(f"error: {root} holds trials of {kept.read_text()}, now it is {own}; choose another --out")
    kept.write_text(own)


def disturb(place: Place, name: str, trials: int, seed: int, deadline: float) -> bool:
    """The fault's trials that are not in the log yet; False when time is up before the last."""
    fault, wanted = FAULTS[name], max(1, round(trials * SHARES.get(name, 0.05)))
    while (done := _count(place.root, name)) < wanted:
        if time.monotonic() > deadline:
            return False
        started, dice = time.monotonic(), random.Random(f"{seed} {name} {done}")
        _remove(place.root, f"{name}-{done}")  # of a trial that was itself cut off
        outcome = fault.run(place, done, dice, wanted)
        _keep(place.root, name, outcome.moment, outcome.lost, outcome.trials, time.monotonic() - started)
        if not outcome.lost:
            _remove(place.root, f"{name}-{done}")
    if fault.finish is not None and not any(r["fault"] == name and r["moment"] == END for r in read_trials(place.root)):
        started = time.monotonic()
        _keep(place.root, name, END, fault.finish(place, wanted), 0, time.monotonic() - started)
    return True


def _remove(root: Path, name: str) -> None:
    for path in [root / name, *root.glob(f"{name}[-.]*")]:
        if path.is_mount():
            subprocess.run(["umount", "-l", str(path)], check=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _keep(root: Path, name: str, moment: str, lost: list[str], trials: int, seconds: float) -> None:
    row = {"fault": name, "moment": moment, "lost": lost, "trials": trials, "seconds": round(seconds, 1)}
    with (root / "trials.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name}: {moment}, {seconds:.0f} s{', LOST: ' + '; '.join(lost) if lost else ''}", file=sys.stderr)


def _count(root: Path, name: str) -> int:
    return sum(row["trials"] for row in read_trials(root) if row["fault"] == name)


def read_trials(root: Path) -> list[dict]:
    path = root / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(rows: list[dict], trials: int) -> str:
    head = f"# Disturbed trainings, {today()}\n\n{provenance(f'vlscale bench failures --trials {trials} --write')}\n\n"
    head += "Lost: a sample, a bit of the weights (over world sizes: 1e-5 of a loss), a process, a file, or a hang.\n\n"
    lines = ["| fault | trials | hit in | lost | minutes |", "| --- | ---: | --- | ---: | ---: |"]
    losses = []
    for name, fault in FAULTS.items():
        own = [row for row in rows if row["fault"] == name]
        if not own:
            continue
        hit = Counter(row["moment"] for row in own if row["trials"])
        lost = [row for row in own if row["lost"]]
        losses += [f"- {name}, {row['moment']}: {'; '.join(row['lost'])}" for row in lost]
        moments = ", ".join(f"{moment} {count}" if count > 1 else moment for moment, count in hit.most_common())
        lines.append(
            f"| {fault.what} | {sum(row['trials'] for row in own)} | {moments} | {len(lost)} | "
            f"{sum(row['seconds'] for row in own) / 60:.1f} |"
        )
    return head + "\n".join([*lines, "", *losses]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
