"""How what is asked of a run differs from what its folder says it was made with, in one line."""

import os
from pathlib import Path
from typing import Any

import yaml

from vlscale.config import dump, known_keys, read_tree
from vlscale.logging import get_logger
from vlscale.models.towers import one_line
from vlscale.sections import Config
from vlscale.train.setup import corpus_of

NAMED, WIDTH = 4, 60  # keys that one line names, characters of a value
SHAPING = ("model.", "optim.", "objective.", "engine.")
_ABSENT = object()


def is_complete(folder: Path) -> bool:
    return (folder / "final").is_dir()


def changed_settings(folder: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """By key, what the run in `folder` was made with and what `config` asks for. Keys that the run's own file lacks are
    not compared: an older version wrote it."""
    made = folder / "config.yaml"
    if not made.is_file():
        return {}
    then, now, keys = read_tree(made), yaml.safe_load(dump(config)), known_keys()
    sections = {key.rpartition(".")[0] for key in keys}
    values = {key: (_value(then, key), _value(now, key)) for key in keys if key not in sections}
    return {key: both for key, both in values.items() if both[0] is not _ABSENT and not _same(*both)}


def listed(changed: dict[str, tuple[Any, Any]], was: str = "was", known: str | None = None) -> str:
    """As overrides, the first few; what `known` was is not told."""
    told = [
        f"{key}={_shown(asked)}" + (f" ({was} {_shown(before)})" if key != known else "")
        for key, (before, asked) in changed.items()
    ]
    more = [f"{len(told) - NAMED} more"] if len(told) > NAMED else []
    return ", ".join(told[:NAMED] + more)


def asked_otherwise(folder: Path, config: Config) -> str:
    """What other settings for the complete run in `folder` take: it is never trained on. Empty where there are none."""
    changed = changed_settings(folder, config)
    if not changed:
        return ""
    steps = _steps(folder)
    ended = f"it ended after {steps} steps" if steps else "it has ended"
    takes = "takes" if len(changed) == 1 else "take"
    return (
        f": {ended}, and {listed(changed, 'it has', known='train.max_steps')} {takes} another run, with --out "
        f"elsewhere and model.init_from={folder}"
    )


def tell_changes(name: str, folder: Path, config: Config) -> None:
    """Of a run that goes on, before its folder says otherwise."""
    changed = changed_settings(folder, config)
    if changed:
        get_logger().info("%s: other settings from here on: %s", name, listed(changed))


def misfit(folder: Path, config: Config, error: Exception) -> Exception:
    """Of a checkpoint that could not be loaded: a ValueError that names the settings which shape it and have changed
    since, or the `error` itself where none has."""
    changed = {key: both for key, both in changed_settings(folder, config).items() if key.startswith(SHAPING)}
    if not changed:
        return error
    return ValueError(
        f"cannot resume: the newest checkpoint does not fit {listed(changed)}; put back what is another model or "
        f"optimizer, or start another run with --out elsewhere and model.init_from ({one_line(error)[:100]})"
    )


def _steps(folder: Path) -> int | None:
    train = read_tree(folder / "config.yaml").get("train") or {}
    return (corpus_of(folder) or {}).get("steps") if train.get("epochs") else train.get("max_steps")


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
