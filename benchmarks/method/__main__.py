"""The method study: every method on every level at every seed, tuned alike, compared in pairs.

    vlscale bench method --out DIR [--emoji FOLDER] [--study FILE] [--processes N] [--levels NAME ...] [--write]

Unattended, and the same command again goes on where it stopped: finished cells are files in DIR/cells, and those of an
earlier result may be given with --cells. What other settings made is refused. First every method's trials on the tuning
seed, chosen on validation; then the seeds, measured on test. A study whose methods have no `grid` has nothing to tune
and starts with the seeds (ablations.yaml). `--write` keeps the cells, the table, a CSV and the plot in
benchmarks/results/, dated, by the study's name.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from analyse import write_study  # noqa: E402
from cell import clear, plan_of, pretraining_of  # noqa: E402
from kept import Refused, job_file, kept_cell, refuse_other_towers, shards_of  # noqa: E402
from outside import TERMS  # noqa: E402

from vlscale.config import load_plan  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--emoji", type=Path, help="folder of emoji shards; without it that level is left out")
    parser.add_argument("--levels", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--processes", type=int, default=1, help="cells at a time, each on one thread")
    parser.add_argument("--cells", type=Path, help="a ...-method-cells.json of benchmarks/results/ to start from")
    parser.add_argument("--only-report", action="store_true", help="of the cells that are there; nothing is run")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/")
    given = parser.parse_args(argv)
    study = read_study(given.study)
    every = yaml.safe_load((HERE / "study.yaml").read_text())["levels"] | study["levels"]
    levels = {name: own for name, own in study["levels"].items() if not given.levels or name in given.levels}
    if given.emoji is None:
        levels = {name: own for name, own in levels.items() if own.get("recipe") != "emoji"}
    if not levels:
        parser.error("no level is left to run; emoji needs --emoji FOLDER")
    study |= {"levels": levels, "seeds": given.seeds or study["seeds"], "command": command_of(given)}
    try:
        return run_study(study, every, given)
    except Refused as problem:
        parser.error(str(problem))


def run_study(study: dict, every: dict, given: argparse.Namespace) -> int:
    """`every`: level to what it is, also of those that are tuned on and not measured. The exit status."""
    cells, source = given.out / "cells", str(given.study)
    cells.mkdir(parents=True, exist_ok=True)
    terms = {method: own["outside"] for method, own in study["methods"].items() if "outside" in own}
    unknown = sorted(set(terms.values()) - set(TERMS))
    if unknown:
        raise Refused(f"{source}: outside: unknown term {unknown[0]!r}; there are: {', '.join(TERMS)}")
    common = {
        key: study[key] for key in ("pairs", "held_out") if key in study
    }  # a report needs neither these nor recipes
    common |= {"threads": 1, "emoji": given.emoji and str(given.emoji)}
    shards = shards_of(given.emoji) if given.emoji else {}

    def job(name: str, level_name: str, seed: int, split: str, runs: dict | None) -> dict:
        """Without `runs` where they are not chosen yet: nothing to train, but enough to know a cell by."""
        if level_name not in every:
            raise Refused(f"{source}: tuned_on: unknown level {level_name!r}; there are: {', '.join(every)}")
        level = every[level_name]
        recipe = level.get("recipe", "scenes")
        chosen = {
            "runs": runs,
            "outside": {run: term for run, term in terms.items() if run in runs},
            "theta_prime": [method for method in runs if study["methods"].get(method, {}).get("theta_prime")],
        } if runs is not None else {}  # fmt: skip
        if "recipes" in study:
            chosen["recipe"] = study["recipes"][recipe]
        return common | chosen | {
            "name": name, "level": level, "level_name": level_name, "seed": seed, "split": split,
            "shards": shards if recipe == "emoji" else {},
            "folder": str((given.out / "work" / name).resolve()), "result": str((cells / f"{name}.json").resolve()),
            "pretrained": str((given.out / f"pretrained-seed-{seed}").resolve()),
        }  # fmt: skip

    def measuring(chosen: dict) -> list[dict]:
        return [
            job(f"{level}-seed-{seed}", level, seed, "test", chosen.get(tuned_on(study, level)))
            for seed in study["seeds"]
            for level in study["levels"]
        ]

    tuning = [] if untuned(study) else tuned_levels(study)
    study["known_levels"] = [*read_study(given.study)["levels"], *tuning]
    trials = [job(f"tuning-{level}", level, study["tuning_seed"], "val", trial_runs(study)) for level in tuning]
    earlier = json.loads(given.cells.read_text()) if given.cells else {}
    earlier.pop("study", None)  # its comparisons and endpoints: no cell
    done = {level: kept_cell(trial, earlier, source) for level, trial in zip(tuning, trials, strict=True)}
    chosen = untuned(study) or {level: choose(study, cell) for level, cell in done.items() if cell}
    for each in measuring(chosen):
        kept_cell(each, earlier, source)
    if not given.only_report:
        for level in dict.fromkeys([*study["levels"], *tuning]):
            runs = (untuned(study) or {}).get(tuned_on(study, level)) or trial_runs(study)
            refuse_bad_runs(job("check", level, 0, "val", runs), given.study)
        for each in (*trials, *measuring(chosen)):
            if "pretrained" in each["recipe"]:
                refuse_other_towers(Path(each["pretrained"]), *pretraining_of(each), source)
    for name, known in earlier.items():
        (cells / f"{name}.json").write_text(json.dumps(known, indent=1) + "\n")
    if given.only_report:
        write_study(study, cells, chosen, given.out, keep=given.write)
        return 0
    with ThreadPoolExecutor(given.processes) as pool:
        tuned = pool.map(lambda trial: _finished(trial, job_file(trial)), trials)
        chosen = untuned(study) or {level: choose(study, cell) for level, cell in zip(tuning, tuned, strict=True)}
        (given.out / "chosen.json").write_text(json.dumps(chosen, indent=1))
        wanted = measuring(chosen)
        for each in wanted:  # tuned anew, it may have chosen otherwise
            kept_cell(each, {}, source)
        failed = [found for found in pool.map(lambda each: _finished(each, job_file(each)), wanted) if found is None]
    write_study(study, cells, chosen, given.out, keep=given.write)
    return 1 if failed else 0


def read_study(path: Path) -> dict:
    """The file, over the one beside it that its `base` names."""
    own = yaml.safe_load(path.read_text())
    return (read_study(path.parent / own["base"]) if "base" in own else {}) | own


def command_of(given: argparse.Namespace) -> str:
    """As it was typed, but for folders."""
    words = ["vlscale bench method"]
    words += [] if given.study == HERE / "study.yaml" else [f"--study {given.study}"]
    words += ["--out DIR", *(["--emoji FOLDER"] if given.emoji else [])]
    words += [f"--levels {' '.join(given.levels)}"] if given.levels else []
    words += [f"--cells {given.cells}"] if given.cells else []
    words += ["--only-report"] if given.only_report else [f"--processes {given.processes}"]
    return " ".join([*words, "--write"])


def untuned(study: dict) -> dict[str, dict] | None:
    """Where no method has a grid there is nothing to choose: what each level runs."""
    if any("grid" in own for own in study["methods"].values()):
        return None
    return {
        tuned_on(study, level): {name: own["is"] for name, own in study["methods"].items()} for level in study["levels"]
    }


def tuned_on(study: dict, level: str) -> str:
    """The level whose trials serve a level: those of scenes share one, the middle of the imbalance."""
    return study["levels"].get(level, {}).get("tuned_on", "text-noisy")


def tuned_levels(study: dict) -> list[str]:
    """Those with trials, also of levels that are tuned on and not measured."""
    return list(dict.fromkeys(tuned_on(study, level) for level in study["levels"]))


def trial_runs(study: dict) -> dict[str, dict]:
    return {
        f"{method}_{place}": merged(own["is"], trial)
        for method, own in study["methods"].items()
        for place, trial in enumerate(own["grid"])
    }


def refuse_bad_runs(job: dict, study: Path) -> None:
    """Names the study's file where a cell's own plan would be refused, perhaps hours later."""
    plan = plan_of(job, ["train.tar"], "begun" if "pretrained" in job["recipe"] else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        path.write_text(yaml.safe_dump(plan, sort_keys=False))
        try:
            load_plan(path)
        except ValueError as problem:
            raise Refused(str(problem).replace(str(path), str(study))) from None


def choose(study: dict, trial: dict | None) -> dict[str, dict]:
    """Each method with the trial of its grid that did best on validation."""
    if trial is None:
        raise SystemExit("a tuning cell failed: its log is in DIR/work")

    def score(name: str) -> float:
        return sum(weight * trial["measured"][name][endpoint] for endpoint, weight in study["selection"].items())

    best = {
        method: max((f"{method}_{place}" for place in range(len(own["grid"]))), key=score)
        for method, own in study["methods"].items()
    }
    return {method: trial["runs"][name] for method, name in best.items()}


def merged(below: dict, above: dict) -> dict:
    return {key: {**below.get(key, {}), **above.get(key, {})} for key in {**below, **above}}


def _finished(job: dict, path: Path) -> dict | None:
    """The cell's result, made now if it is not there; None if it failed, which is said and goes into the log."""
    result = Path(job["result"])
    if not result.exists():
        started = time.perf_counter()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(job))
        partial.replace(path)
        log = path.parent.parent / f"{job['name']}.log"
        with log.open("w") as out:
            done = subprocess.run([sys.executable, str(HERE / "cell.py"), str(path)], stdout=out, stderr=out)
        if done.returncode:
            print(f"{job['name']}: failed, see {log}", file=sys.stderr, flush=True)
            return None
        print(f"{job['name']}: {time.perf_counter() - started:.0f} s", flush=True)
    clear(Path(job["folder"]))  # where it was killed once it had its numbers
    return json.loads(result.read_text())


if __name__ == "__main__":
    sys.exit(main())
