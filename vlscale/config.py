"""Typed configuration: YAML over defaults, `base:` files, dotted overrides, stages.

A file is a mapping of the sections of `Config`, and may also hold three keys that never reach the resolved config:
`base` (a file whose values it starts from), `stages` (runs to make first) and `variants` (runs to make side by side).
`load_plan` turns a file and overrides into the list of runs, each with its own complete `Config`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vlscale.sections import Config

STAGE_PREFIX = "stage:"


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
        path = path.parent / str(base)
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
        except yaml.YAMLError:
            value = text
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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"config {path} does not exist" + _closest(path.name, beside))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"config {path}: expected sections such as `train:`, got a {type(tree).__name__}")
    return tree


def _named(value: Any, key: str, path: str | Path) -> dict[str, dict[str, Any]]:
    plain = isinstance(value, dict) and all(
        isinstance(name, str) and name.replace("-", "").replace("_", "").isalnum() and isinstance(own, dict | None)
        for name, own in value.items()
    )
    if not plain:
        raise ValueError(f"config {path}: `{key}` maps names (letters, digits, - and _) to sections, got {value!r}")
    return {name: own or {} for name, own in value.items()}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}" + _closest(dotted, known_keys())
    message = problem["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}, got {problem['input']!r}" if dotted and problem["type"] != "value_error" else message


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
