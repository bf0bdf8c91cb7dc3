"""Typed configuration: YAML over defaults, `base:` files, dotted overrides, stages.

A file is a mapping of the sections of `Config`, and may also hold three keys that never reach the resolved config:
`base` (a file whose values it starts from), `stages` (runs to make first) and `variants` (runs to make side by side).
`load_plan` turns a file and overrides into the list of runs, each with its own complete `Config`.
"""

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vlscale.logging import HIDDEN, names_secret, without_secrets
from vlscale.sections import Config

STAGE_PREFIX = "stage:"
BESIDE = ("base", "stages", "variants")  # keys of a file beside the sections
DEEPEST, LARGEST = 50, 100_000  # levels and values of a config file
# The last ones come from PyYAML's conversions of what a tag or a form promises, such as 2024-99-99 and !!int x.
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan: `name` is its folder below the run's folder, empty for that folder itself."""

    name: str
    config: Config


def load_plan(path: str | Path, overrides: list[str] = ()) -> list[PlannedRun]:
    """The runs that a config file asks for, in order.

    `stages` come first, each in its own folder, then the `variants`, or the file's own body when there are none. Stages
    and variants start from the body with the overrides applied, so `data.train=...` reaches all of them; what they set
    themselves wins.
    """
    tree = read_tree(Path(path))
    stages, variants = (_named(tree.pop(key, {}), key, path) for key in ("stages", "variants"))
    body = merge(tree, parse_overrides(overrides))
    named = [(name, merge(body, own)) for name, own in [*stages.items(), *variants.items()]]
    runs = named if variants else [*named, ("", body)]
    return [
        PlannedRun(name, validate(values, where=f"{path} ({name})" if name else str(path))) for name, values in runs
    ]


def read_tree(path: Path) -> dict[str, Any]:
    """The file as a nested dict, with its `base` files (relative to it) merged below it."""
    seen: list[Path] = []
    layers: list[dict[str, Any]] = []
    while True:
        if path.resolve() in seen:
            raise ValueError(f"config {path}: its base files form a circle; remove one `base:`")
        seen.append(path.resolve())
        layers.append(_read_yaml(path))
        base = layers[-1].pop("base", None)
        if base is None:
            break
        if not isinstance(base, str) or "\0" in base:
            raise ValueError(f"config {path}: `base` is the name of another file, got {base!r}")
        path = path.parent / base
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = merge(merged, layer)
    return merged


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values of `above` over those of `below`, section by section. A Hugging Face `config` is replaced as a whole."""
    out = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        whole = nested and "model_type" in value
        out[key] = merge(out[key], value) if nested and not whole else value
    return out


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`["train.seed=3"]` to `{"train": {"seed": 3}}`; values are YAML."""
    tree: dict[str, Any] = {}
    for item in overrides:
        dotted, sign, text = item.partition("=")
        if not sign or not dotted:
            raise ValueError(f"override {item!r}: expected key=value, for example train.max_steps=100")
        try:
            value = yaml.safe_load(text)
        except NOT_YAML:
            value = text
        _check_plain(value, f"override {item!r}", dotted)
        for key in reversed(dotted.split(".")):
            value = {key: value}
        tree = merge(tree, value)
    return tree


def validate(values: dict[str, Any], where: str) -> Config:
    """A Config from nested values; the first problem becomes one line that says what to change."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"config {where}: {_first_problem(error)}") from None


def dump(config: Config) -> str:
    """As text; secrets in urls and commands are left out, since runs are kept and shown."""
    return yaml.safe_dump(_hidden(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(part, str) and names_secret(key) else _hidden(part) for key, part in value.items()
        }
    if isinstance(value, list):
        return [_hidden(part) for part in value]
    return without_secrets(value) if isinstance(value, str) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not _is_file(path):
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"config {path} does not exist" + _closest(path.name, beside))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        raise ValueError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"config {path}: expected sections such as `train:`, got a {type(tree).__name__}")
    _check_plain(tree, f"config {path}")
    return tree


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _check_plain(tree: Any, where: str, name: str = "") -> None:
    """Only what `dump` writes and reads back the same: no dates, bytes and sets, and no aliases that grow for ever."""
    seen = 0

    def walk(value: Any, dotted: str, depth: int) -> None:
        nonlocal seen
        seen += 1
        if depth > DEEPEST or seen > LARGEST:
            raise ValueError(
                f"{where}: more than {DEEPEST} levels or {LARGEST:,} values; is there an alias that holds itself?"
            )
        if isinstance(value, dict | list):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in parts:
                walk(part, f"{dotted}.{key}".lstrip("."), depth + 1)
        elif isinstance(value, str):
            if not value.isascii() and value != value.encode(errors="replace").decode():
                raise ValueError(f"{where}: {_shown(dotted)} holds characters that are no Unicode text, got {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {_shown(dotted)} is {value}; expected a finite number, or null for none")
        elif not (value is None or isinstance(value, int | float)):
            raise ValueError(
                f"{where}: {_shown(dotted)} is a {type(value).__name__}, got {str(value)!r}; expected text, a number, "
                "true or false, so put text that looks like something else in quotes"
            )

    walk(tree, name, 0)


def _shown(dotted: str) -> str:
    """On one line."""
    return dotted if dotted.isprintable() else repr(dotted)


def _named(value: Any, key: str, path: str | Path) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"config {path}: `{key}` maps names to sections, got {value!r}")
    for name, own in value.items():
        if not (isinstance(name, str) and name.replace("-", "").replace("_", "").isalnum()):
            raise ValueError(f"config {path}: names in `{key}` are of letters, digits, - and _, got {name!r}")
        if not isinstance(own, dict | None):
            raise ValueError(f"config {path}: `{key}` maps names to sections, got {own!r} for {name!r}")
    return {name: own or {} for name, own in value.items()}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}" + _closest(dotted, [*known_keys(), *BESIDE])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "list_type" and isinstance(problem["input"], str):
        message += f", {dotted}=[{problem['input']}]"
    told = dotted and problem["type"] != "value_error"
    return f"{_shown(dotted)}: {message}, got {problem['input']!r}" if told else message


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _closest(got: str, known: list[str]) -> str:
    """`; did you mean X?` or the choices. A key's last part counts too: `lr` is close to `optim.lr`."""
    by_last = [key for key in known if key.split(".")[-1] == got.split(".")[-1]]
    close = difflib.get_close_matches(got, known, n=1, cutoff=0.5) if not by_last else by_last[:1]
    return f"; did you mean {close[0]!r}?" if close else f"; choose from: {', '.join(known[:12])}" if known else ""
