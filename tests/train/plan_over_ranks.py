"""What the ranks of a test run: peaks of memory and bytes received of real steps, at every stage. No tests here."""

import json
import os
from pathlib import Path

import torch

from tests.forked import begin
from tests.train.test_plan import (
    BERT,
    COVLR,
    FUSION,
    RVLR_ALONE,
    SIDE,
    TOWER,
    backward,
    build_model,
    config_of,
    measured_peak,
)
from vlscale.distributed import count_traffic
from vlscale.train.engine import Engine, start_ranks

_WIDE = json.dumps(TOWER | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536})[1:-1]
WIDE = [  # where weights and gradients, not activations, are most of it
    f"model.vision.config={{model_type: vit, image_size: {SIDE}, patch_size: 8, {_WIDE}}}",
    f"model.text.config={{{json.dumps(BERT)[1:-1]}, {_WIDE}}}",
]
RUNS = {
    "zero1": ["engine.zero_stage=1"],
    "zero2": ["engine.zero_stage=2"],
    "zero3": ["engine.zero_stage=3"],
    "ring": ["engine.zero_stage=2", "engine.comm=ring"],
    "bf16": ["engine.zero_stage=2", "engine.dtype=bf16"],
    "fusion": ["engine.zero_stage=2", FUSION],
    "fusion by chunks": ["engine.zero_stage=2", FUSION, "objective.mlm_weight=1", "train.chunk_size=16"],
    "covlr": ["engine.zero_stage=2", *COVLR],
    "covlr, half ring": ["engine.zero_stage=2", *COVLR, "engine.comm=half_ring"],
    "rvlr": ["engine.zero_stage=2", *RVLR_ALONE],
    "rvlr, half ring": ["engine.zero_stage=2", *RVLR_ALONE, "engine.comm=half_ring"],
    "rvlr, kl": ["engine.zero_stage=2", *RVLR_ALONE, "objective.relation_distance=kl"],
    "rvlr, kl, ring": ["engine.zero_stage=2", *RVLR_ALONE, "objective.relation_distance=kl", "engine.comm=ring"],
    "rvlr, kl, half ring": [
        *("engine.zero_stage=2", "objective.relation_distance=kl", "engine.comm=half_ring", *RVLR_ALONE)
    ],
    "rvlr, mse": ["engine.zero_stage=2", *RVLR_ALONE, "objective.relation_distance=mse"],
    "rvlr, wasserstein": ["engine.zero_stage=2", *RVLR_ALONE, "objective.relation_distance=wasserstein"],
    "wide, zero2 by chunks": ["engine.zero_stage=2", "train.chunk_size=8", *WIDE],
    "wide, zero3": ["engine.zero_stage=3", *WIDE],
    "wide, zero3 by chunks": ["engine.zero_stage=3", "train.chunk_size=8", *WIDE],
    "losses": ["engine.zero_stage=2", "train.accumulate_losses=2"],
}


def on_rank(rank: int, size: int, port: int, folder: str, environment: dict[str, str]) -> None:
    begin(environment)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = start_ranks(config_of().engine)
    found = {}
    for name, overrides in RUNS.items():
        config = config_of(*overrides)
        peak = measured_peak(config, ranks, Path(folder) / f"trace-{rank}.json")
        engine = Engine(build_model(config), config, ranks)
        with count_traffic() as traffic:
            for _ in range(config.train.accumulate_losses):
                backward(engine, config, ranks)
                engine.step()
        engine.close()
        found[name] = {"peak": peak, "losses": sum(traffic.values())}
    torch.save(found, f"{folder}/{rank}.pt")
