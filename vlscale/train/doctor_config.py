"""Whether a config can be run here: its sizes, shards, folders and types, looked at without starting anything."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from vlscale.config import PlannedRun
from vlscale.data.faults import BadShard
from vlscale.data.lanes import choose_lanes
from vlscale.data.storage import open_shard
from vlscale.data.urls import expand
from vlscale.models.dual_encoder import final_folder
from vlscale.models.hub_names import check_source
from vlscale.models.towers import check_weights
from vlscale.sections import Config
from vlscale.train.deepspeed_json import json_for_deepspeed
from vlscale.train.doctor import Finding
from vlscale.train.setup import check_length
from vlscale.train.sources import named_models

LOOKED_INTO = 3  # shards that are opened: the first, the middle, the last
BLOCK = 512  # bytes of a tar's block
OFFLOADED = {"offload_optimizer": "optimizer states", "offload_param": "weights"}  # DeepSpeed's keys


def examine_config(plan: list[PlannedRun], world_size: int) -> list[Finding]:
    """Of all runs; what is the same in several is said once."""
    found: dict[tuple[str, str], Finding] = {}
    for run in plan:
        for finding in _examine_run(run, world_size):
            found.setdefault((finding.name, finding.value), finding)
    return list(found.values())


def _examine_run(run: PlannedRun, world_size: int) -> list[Finding]:
    config, own = run.config, f" of {run.name}" if run.name else ""
    checks: dict[str, Callable[[], str]] = {
        f"batch{own}": lambda: _batch(config, world_size),
        f"length{own}": lambda: _length(config),
        f"DeepSpeed{own}": lambda: _deepspeed(config, world_size),
        "data.train": lambda: _shards("data.train", config.data.train, config),
    }
    if config.data.val is not None:
        checks["data.val"] = lambda: _shards("data.val", config.data.val, config)
    for name, source in named_models(config).items():
        checks[name] = lambda name=name, source=source: _model(name, source)
    checks[f"engine.dtype{own}"] = lambda: _dtype(config)
    checks[f"objective.impl{own}"] = lambda: _impl(config)
    return [_said(name, check) for name, check in checks.items()]


def _said(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, check())
    except (ValueError, BadShard, OSError) as error:
        return Finding(name, str(error), "fail")  # its own line says what to change


def _batch(config: Config, world_size: int) -> str:
    batch, chunk = config.train.global_batch_size, config.train.chunk_size
    lanes = choose_lanes(batch, world_size, config.data.lanes)
    local = batch // world_size
    if chunk is not None and local % chunk:
        raise ValueError(f"train.chunk_size={chunk} does not divide a rank's {local} pairs")
    return f"{batch} pairs, {local} a rank of {world_size}, {lanes} lanes"


def _length(config: Config) -> str:
    check_length(config.train)
    epochs = config.train.epochs
    return f"{config.train.max_steps} steps" if epochs is None else f"{epochs:g} epochs of data.train"


def _deepspeed(config: Config, world_size: int) -> str:
    made = json_for_deepspeed(config, world_size)
    zero, losses = made["zero_optimization"], config.train.accumulate_losses
    words = [f"ZeRO-{zero['stage']}", config.engine.dtype]
    words += [f"{losses} losses an update"] if losses > 1 else []
    words += [f"{what} on the host" for key, what in OFFLOADED.items() if key in zero]
    return ", ".join(words)


def _shards(what: str, urls: list[str] | None, config: Config) -> str:
    shards = expand(urls, what)
    for shard in {shards[0], shards[len(shards) // 2], shards[-1]}:
        opened = open_shard(shard, config.data)
        try:
            if len(opened.read(0, min(BLOCK, opened.size))) < BLOCK:
                raise ValueError(f"{what}: shard {shard} has {opened.size} bytes, expected a tar file")
        finally:
            opened.close()
    return f"{len(shards)} shards, {min(LOOKED_INTO, len(shards))} opened"


def _model(name: str, source: str) -> str:
    folder = final_folder(source)
    check_source(name, folder)
    if name != "model.text.tokenizer":
        check_weights(folder)
    return folder if Path(folder).is_dir() else f"{folder}, from the hub when the run starts"


def _dtype(config: Config) -> str:
    cuda = torch.cuda.is_available()
    if config.engine.dtype == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("engine.dtype=bf16: this GPU does not compute it; set engine.dtype=fp32")
    return config.engine.dtype


def _impl(config: Config) -> str:
    if config.objective.impl == "triton" and not torch.cuda.is_available():
        raise ValueError("objective.impl=triton: there is no GPU here; set objective.impl=auto")
    if config.objective.impl == "triton" and shutil.which("gcc") is None:
        raise ValueError("objective.impl=triton: Triton needs a C compiler to start its kernels; install gcc")
    return config.objective.impl
