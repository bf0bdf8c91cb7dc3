"""Coverage-guided fuzzing of the readers of files that come from outside.

    python benchmarks/fuzz.py TARGET --minutes 8
    python benchmarks/fuzz.py all --minutes 8 --out fuzz-work --write

Needs atheris (`pip install atheris`; libFuzzer underneath). The targets and what they may do are in fuzz_targets.py. A
finding is kept as OUT/TARGET/findings/HASH.bin with its traceback, once for each place in the code, and the fuzzer goes
on; the inputs that reach new code stay in OUT/TARGET/corpus, where the next call begins. `--write` keeps the table of
all targets' time, inputs and findings, dated, in benchmarks/results/. Exit code 1 where there is a finding.
"""

import argparse
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))
sys.path.append(str(Path(__file__).resolve().parent))

PER_INPUT = 60  # seconds; more is a hang, also on a busy machine
AFTERWARDS = 240  # seconds that a session's process may take to start and to end
MEMORY = 4096  # megabytes
LONGEST = 8192  # bytes of an input
INSTRUMENTED = ["vlscale.config", "vlscale.sections", "vlscale.data", "vlscale.evaluate", "yaml", "csv", "json"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a name of fuzz_targets.TARGETS, or all")
    parser.add_argument("--minutes", type=float, default=8.0, help="for each target")
    parser.add_argument("--out", type=Path, default=Path("fuzz-work"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process that fuzzes
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("atheris") is None:
        print("error: fuzzing needs atheris, which is not installed: pip install atheris", file=sys.stderr)
        return 2
    if given.inside:
        fuzz(given.target, given.minutes, given.out)
    names = _names(given.target)
    for name in names:
        session(name, given.minutes, given.out)
    page, findings = summary(given.out)
    print(page)
    if given.write:
        from common import RESULTS, today

        (RESULTS / f"{today()}-fuzz.md").write_text(page)
    return 1 if findings else 0


def _names(target: str) -> list[str]:
    from fuzz_targets import TARGETS

    if target != "all" and target not in TARGETS:
        raise SystemExit(f"error: no fuzz target {target!r}; choose from: all, {', '.join(TARGETS)}")
    return list(TARGETS) if target == "all" else [target]


def session(name: str, minutes: float, out: Path) -> None:
    """One process that fuzzes; its account is added to OUT/TARGET/sessions.jsonl."""
    folder = out / name
    (folder / "findings").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    command = [sys.executable, __file__, name, "--minutes", str(minutes), "--out", str(out), "--inside"]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # libFuzzer ends its process without cleaning up
    with (folder / "log.txt").open("w") as log, tempfile.TemporaryDirectory(prefix="vlscale-fuzz-", dir=memory) as own:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": own})
        try:
            code = process.wait(minutes * 60 + AFTERWARDS)
        except subprocess.TimeoutExpired:  # seen after the last input, in the end of the interpreter
            process.kill()
            code = process.wait()
    said = (folder / "log.txt").read_text(errors="replace")
    inputs = re.findall(r"stat::number_of_executed_units:\s+(\d+)", said) or re.findall(r"^#(\d+)", said, re.M) or ["0"]
    edges = re.findall(r"cov: (\d+)", said)
    entry = {"seconds": round(time.monotonic() - started), "inputs": int(inputs[-1]),
             "edges": int(edges[-1]) if edges else 0, "exit": code}  # fmt: skip
    with (folder / "sessions.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    for crash in folder.glob("crash-*"):  # what the wrapper could not catch: a hang, memory, a dead process
        crash.rename(folder / "findings" / f"{crash.name}.bin")


def summary(out: Path) -> tuple[str, int]:
    from common import provenance, today

    rows, findings = [], 0
    for path in sorted(out.glob("*/sessions.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = sorted(each for each in (path.parent / "findings").glob("*.bin"))
        findings += len(kept)
        rows.append(
            f"| {path.parent.name} | {sum(line['seconds'] for line in lines) / 60:.1f} | "
            f"{sum(line['inputs'] for line in lines):,} | {max(line['edges'] for line in lines):,} | {len(kept)} |"
        )
    head = f"# Fuzzing of the readers, {today()}\n\n{provenance('python benchmarks/fuzz.py all --write')}\n\n"
    head += "Minutes are those of the fuzzing processes by the clock, their start and end included.\n\n"
    table = "| target | minutes | inputs | edges reached | open findings |\n| --- | ---: | ---: | ---: | ---: |\n"
    return head + table + "\n".join(rows) + "\n", findings


def fuzz(name: str, minutes: float, out: Path) -> None:
    """Ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        import fuzz_targets
    logging.getLogger("vlscale").setLevel(logging.CRITICAL)
    target, folder = fuzz_targets.TARGETS[name], out / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / f"seed-{sha256(seed).hexdigest()[:12]}").write_bytes(seed)
    words = folder / "words.txt"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))

    def once(data: bytes) -> None:
        try:
            fuzz_targets.check(name, data)
        except Exception as error:
            keep(folder / "findings", data, error)

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        return bytes(target.repair(bytearray(atheris.Mutate(data, limit))))[:limit]

    flags = [
        str(corpus), f"-max_total_time={int(minutes * 60)}", f"-timeout={PER_INPUT}", f"-rss_limit_mb={MEMORY}",
        f"-max_len={LONGEST}", f"-dict={words}", f"-artifact_prefix={folder}/crash-", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags], once, custom_mutator=mutate)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def keep(folder: Path, data: bytes, error: Exception) -> None:
    """The first input for each kind of error and the lowest place of ours in its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "vlscale" in frame.filename]
    at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
    name = sha256(f"{type(error).__name__} {at}".encode()).hexdigest()[:12]
    path = folder / f"{name}.bin"
    if not path.exists():
        path.write_bytes(data)
        said = "".join(traceback.format_exception(error))[-4000:]
        path.with_suffix(".txt").write_text(f"{type(error).__name__} at {at}\n{said}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
