"""What is said of a run that is complete: it is never trained on, which who asks for something else has to hear."""

import os
from pathlib import Path
from typing import Any

import yaml

from vlscale.config import dump, known_keys, read_tree
from vlscale.sections import Config
from vlscale.train.setup import corpus_of

NAMED, WIDTH = 4, 60  # keys that one line names, characters of a value
_ABSENT = object()


def is_complete(folder: Path) -> bool:
    return (folder / "final").is_dir()


def asked_otherwise(folder: Path, config: Config) -> str:
    """How `config` differs from what the complete run in `folder` was made with, and what that takes; empty where it
    does not. Keys that the run's own file lacks are not compared: an older version wrote it."""
    made = folder / "config.yaml"
    if not made.is_file():
        return ""
    then, now, keys = read_tree(made), yaml.safe_load(dump(config)), known_keys()
    sections = {key.rpartition(".")[0] for key in keys}
    values = {key: (_value(then, key), _value(now, key)) for key in keys if key not in sections}
    changed = {
        key: (was, asked) for key, (was, asked) in values.items() if was is not _ABSENT and not _same(was, asked)
    }
    if not changed:
        return ""
    steps = _value(then, "train.max_steps") if _value(then, "train.epochs") in (None, _ABSENT) else _counted(folder)
    ended = f"it ended after {steps} steps" if isinstance(steps, int) else "it has ended"
    told = [
        f"{key}={_shown(asked)}" + ("" if key == "train.max_steps" else f" (it has {_shown(was)})")
        for key, (was, asked) in list(changed.items())[:NAMED]
    ]
    more = [f"{len(changed) - NAMED} more"] if len(changed) > NAMED else []
    takes = "takes" if len(changed) == 1 else "take"
    return (
        f": {ended}, and {', '.join(told + more)} {takes} another run, with --out elsewhere and "
        f"model.init_from={folder}"
    )


def _counted(folder: Path) -> int | None:
    return (corpus_of(folder) or {}).get("steps")


def _value(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _ABSENT
        tree = tree[part]
    return tree


def _same(was: Any, asked: Any) -> bool:
    """A path may be written in several ways."""
    if isinstance(was, list) and isinstance(asked, list):
        return len(was) == len(asked) and all(map(_same, was, asked))
    if isinstance(was, str) and isinstance(asked, str):
        return os.path.abspath(was) == os.path.abspath(asked)
    return was == asked


def _shown(value: Any) -> str:
    """As an override would write it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20).splitlines()[0]
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."
