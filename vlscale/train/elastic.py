"""The state of an engine by parameter, whatever ranks and ZeRO stage it was made at: `train.elastic`.

    full/part-R.safetensors    of the learned parameters that rank R wrote: NAME, and NAME:exp_avg and so on, float32
    full/buffers.safetensors   the model's buffers
    full/steps.json            the optimizer's own step count of every parameter group

It is written beside DeepSpeed's files and read only where the world size or the stage has changed: those files restore
bit for bit, this form to the rounding of another order of sums. DeepSpeed's universal checkpoints are such a form too,
but know no stage 0. Written once, a float32 parameter takes 12 bytes with AdamW, 4 with SGD. Each rank reads all of it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vlscale.distributed import Ranks
from vlscale.train.checkpoint_files import Files, Tensors

FULL = "full"  # folder in a checkpoint
_STEPS, _BUFFERS = "steps.json", "buffers.safetensors"


class State(Protocol):
    """What an engine tells of itself here, see `engine.Engine`."""

    ranks: Ranks
    learned_names: list[str]
    sizes: list[int]

    def buffers(self) -> dict[str, torch.Tensor]: ...

    def moments(self) -> list[str]: ...

    def full(self, index: int, key: str | None) -> torch.Tensor: ...

    def set_full(self, index: int, key: str | None, value: torch.Tensor) -> None: ...

    def optimizer_steps(self) -> list[float]: ...

    def start_moments(self, moments: list[str], steps: list[float]) -> None: ...


def save_full(engine: State, files: Files) -> None:
    """On all ranks together: each gathers every tensor once and keeps its own share, about 1 / world size."""
    ranks = engine.ranks
    names, moments = engine.learned_names, engine.moments()
    total, before, own = sum(engine.sizes), 0, {}
    for index, name in enumerate(names):
        mine = before * ranks.size // total == ranks.rank
        before += engine.sizes[index]
        for key in (None, *moments):
            value = engine.full(index, key)
            if mine:
                own[_label(name, key)] = files.copy(value)
    files.add(f"{FULL}/part-{ranks.rank}.safetensors", Tensors(own))
    steps = engine.optimizer_steps()
    if ranks.first:
        files.add(f"{FULL}/{_BUFFERS}", Tensors({name: files.copy(value) for name, value in engine.buffers().items()}))
        files.add(f"{FULL}/{_STEPS}", json.dumps({"moments": moments, "steps": steps}).encode())


def load_full(engine: State, folder: Path) -> None:
    """Into an engine of any world size and stage, of the same model and optimizer."""
    told = json.loads((folder / _STEPS).read_text())
    parts = dict(_tensors(folder))
    expected = {_label(name, key) for name in engine.learned_names for key in (None, *told["moments"])}
    if odd := sorted(expected ^ parts.keys()):
        raise ValueError(
            f"{folder}: holds other parameters than this model learns, first {odd[0]}; continue with the model, locks "
            "and optimizer that it was made with"
        )
    if told["steps"]:
        engine.start_moments(told["moments"], told["steps"])
    for index, name in enumerate(engine.learned_names):
        for key in (None, *told["moments"]):
            file, label = parts[_label(name, key)], _label(name, key)
            with safe_open(file, framework="pt") as opened:
                engine.set_full(index, key, opened.get_tensor(label))
    for name, value in load_file(folder / _BUFFERS).items():
        engine.buffers()[name].copy_(value)


def _label(name: str, key: str | None) -> str:
    return name if key is None else f"{name}:{key}"


def _tensors(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.glob("part-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for label in opened.keys():  # noqa: SIM118 - it is no dictionary
                yield label, file
