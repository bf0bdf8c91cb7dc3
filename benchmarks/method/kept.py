"""Whether what an earlier command left behind is of the study that is asked for now: finished cells, cells that were
cut off, and pre-trained towers.

A cell keeps its job, but for paths. Cells from before that rule hold less of it, and are compared by what they hold.
"""

import json
from pathlib import Path

import yaml

PARTS = (  # of a job: what its numbers depend on
    "level_name", "level", "seed", "split", "pairs", "held_out", "recipe", "runs", "outside", "theta_prime", "shards",
)  # fmt: skip
ELSEWHERE = {"data": ("train", "manifest_dir")}  # of a plan: paths
IDLE = ("engine", "log", "eval")  # of a plan: what changes no weight


class Refused(ValueError):
    """What stands in the way of a study, in one line for whoever asked for it."""


def settings(job: dict) -> dict:
    """What a cell is made of, wherever it is made."""
    own = {part: job[part] for part in PARTS if part in job}
    if "level" in own:  # whose trials it takes is seen in `runs`
        own["level"] = {key: value for key, value in own["level"].items() if key != "tuned_on"}
    return json.loads(json.dumps(own))


def shards_of(folder: str | Path) -> dict[str, int]:
    """Name and bytes of each shard: two folders of other shards are told apart, a folder that was moved is not."""
    return {path.name: path.stat().st_size for path in sorted(Path(folder).glob("*.tar"))}


def kept_cell(job: dict, given: dict[str, dict], source: str) -> dict | None:
    """The finished cell of a job, of those that were `given` or else in its place; None if there is none. Refused where
    it, or what is left of one that was cut off, was made with other settings than `source` (the study's file) asks."""
    result, folder = Path(job["result"]), Path(job["folder"])
    if (cell := given.get(job["name"])) is not None:
        _refuse_other(settings(job), settings(cell), f"cell {job['name']} of --cells", source, "give other --cells")
        return cell
    if result.exists():
        cell = _read(result)
        _refuse_other(settings(job), settings(cell), str(result), source, "choose another --out, or delete this cell")
        return cell
    begun = job_file(job)
    if folder.exists() and begun.exists():
        way_out = f"choose another --out, or delete {folder}"
        _refuse_other(settings(job), settings(_read(begun)), f"{folder}, which was cut off", source, way_out)
    return None


def job_file(job: dict) -> Path:
    """Where a cell's job is left for its process, and for whoever continues it."""
    return Path(job["result"]).with_name(f".{job['name']}.job.json")


def refuse_other_towers(folder: Path, plan: dict, corpus: dict, source: str) -> None:
    """Where `folder` holds towers, or the beginnings of them, of another plan or corpus. Older folders do not tell
    their corpus."""
    told = (folder / "plan.yaml", folder / "corpus.json")
    for path, wanted in zip(told, (plan, corpus), strict=True):
        if path.exists():
            kept = yaml.safe_load(path.read_text())
            way_out = f"choose another --out, or delete {folder}"
            _refuse_other(_weights_of(wanted), _weights_of(kept), str(path), source, way_out)


def _weights_of(plan: dict) -> dict:
    """What of a plan decides on the weights that it ends with."""
    own = {
        section: {key: value for key, value in values.items() if key not in ELSEWHERE.get(section, ())}
        if isinstance(values, dict)
        else values
        for section, values in plan.items()
        if section not in IDLE
    }
    return json.loads(json.dumps(own))


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path}: expected what a cell measured, got no JSON ({error}); delete this file") from None


def _refuse_other(wanted: dict, kept: dict, what: str, source: str, way_out: str) -> None:
    """A part that only one of the two has is not compared: older cells have fewer."""
    for part in (part for part in wanted if part in kept):
        if found := _difference(wanted[part], kept[part], part):
            place, expected, got = found
            raise Refused(f"{what}: {place}: expected {expected} as {source} has it, got {got}; {way_out}")


def _difference(wanted, kept, place: str) -> tuple[str, str, str] | None:
    """The first setting that differs: its place, and both values."""
    if isinstance(wanted, dict) and isinstance(kept, dict):
        for key in {**wanted, **kept}:
            if key not in kept or key not in wanted:
                return f"{place}.{key}", *(_shown(own[key]) if key in own else "nothing" for own in (wanted, kept))
            if found := _difference(wanted[key], kept[key], f"{place}.{key}"):
                return found
        return None
    return None if wanted == kept else (place, _shown(wanted), _shown(kept))


def _shown(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
