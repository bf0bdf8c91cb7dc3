"""Updates that are the mean of several losses, states and weights on the host, blocks computed again: on two ranks and
on one, against plain PyTorch on one process."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.train.meta_reference import reference_loss
from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.models.dual_encoder import load_dual_encoder, weights_of
from vlscale.train.key_hash import key_hash
from vlscale.train.metrics_file import read_metrics
from vlscale.train.optimizer import build_optimizer
from vlscale.train.plan import train_plan
from vlscale.train.schedule import learning_rate
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts

LOSSES, STEPS = 3, 3
MANY = f"accumulate_losses: {LOSSES}"
RUNS = {
    **{f"zero{stage}": f"engine: {{zero_stage: {stage}}}, train: {{{MANY}}}" for stage in range(4)},
    "bf16": f"engine: {{zero_stage: 1, dtype: bf16}}, train: {{{MANY}}}",
    "heads": f"meta: {{mode: heads}}, engine: {{zero_stage: 2}}, train: {{{MANY}}}",
    "first_order-next": f"meta: {{mode: first_order, test_batch: next, inner_lr: 0.02}}, engine: {{zero_stage: 3}}, "
    f"train: {{{MANY}}}",
    "finite_difference": "meta: {mode: finite_difference, inner_lr: 0.02}, engine: {zero_stage: 0}, "
    f"train: {{{MANY}}}",
    "offload-zero2": f"engine: {{zero_stage: 2, offload_optimizer: cpu}}, train: {{{MANY}}}",
    "offload-zero3": "engine: {zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}",
    "offload-parameters": "engine: {zero_stage: 3, offload_parameters: cpu}",
    "bf16-zero2": "engine: {zero_stage: 2, dtype: bf16}",
    "bf16-zero2-offload": "engine: {zero_stage: 2, dtype: bf16, offload_optimizer: cpu}",
    "checkpointing": "engine: {zero_stage: 3, activation_checkpointing: true}, train: {chunk_size: 4}",
    "sigmoid-heads": "objective: {loss: sigmoid}, meta: {mode: heads}, engine: {zero_stage: 2}",
}


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "losses.yaml"
    variants = "".join(f"  {name}: {{{own}}}\n" for name, own in RUNS.items())
    path.write_text(
        f"base: {tiny_config}\n"
        "teacher: {source: frozen_copy}\n"
        "objective: {name: covlr, relation_weight: 0.5}\n"
        "optim: {warmup_steps: 1, clip_norm: 0.5}\n"
        f"train: {{global_batch_size: 16, max_steps: {STEPS}, checkpoint_every: 2}}\n"
        f"variants:\n{variants}"
    )
    return path


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    """(losses, gradient norms, hashes of keys, final weights) of the run in plain PyTorch; the same for all stages."""
    known, folder = {}, tmp_path_factory.mktemp("plain")

    def train(name: str) -> tuple:
        (config,) = [run.config for run in load_plan(recipe) if run.name == name]
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": "fp32"})})
        sections = config.objective, config.meta, config.train.accumulate_losses
        key = json.dumps([part if isinstance(part, int) else part.model_dump() for part in sections])
        if key not in known:
            known[key] = _train(config, folder)
        return known[key]

    return train


def _train(config, folder: Path) -> tuple[list[float], list[float], list[str], dict[str, torch.Tensor]]:
    ranks, losses, norms, hashes = Ranks(), [], [], []
    parts = build_parts(config, folder / "none", ranks)
    step_parts = StepParts(None, parts.inputs, config.objective, config.meta, ranks, None)
    optimizer, count = build_optimizer(parts.model, config.optim), config.train.accumulate_losses
    with closing(iter(build_stream(config, parts, ranks, None))) as batches:
        read = [next(batches) for _ in range(STEPS * count + 1)]
    for step in range(STEPS):
        numbers = range(step * count, (step + 1) * count)
        ahead = 1 if config.meta.test_batch == "next" else 0
        found = [
            reference_loss(parts.model, step_parts, read[k], read[k + ahead], config.meta_mode)[0] for k in numbers
        ]
        optimizer.zero_grad()
        mean = sum(found) / count
        mean.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parts.model.parameters(), config.optim.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step + 1, STEPS)
        optimizer.step()
        losses.append(float(mean.detach()))
        keys = [key for k in numbers for key in read[k].keys]
        hashes.append(f"{key_hash(keys, torch.arange(len(keys))) % 2**64:016x}")
    return losses, norms, hashes, parts.model.state_dict()


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_follow_plain_pytorch(launched, plain, name):
    """The losses, the norms of the mean gradients before clipping, the samples; the weights to what AdamW makes of
    rounding."""
    losses, norms, hashes, weights = plain(name)
    lines = read_metrics(launched / name / "metrics.jsonl")
    within = 2e-2 if "bf16" in name else 1e-3 if name == "finite_difference" else 1e-5
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=within)
    of_norm = 0.1 if "bf16" in name else max(within, 1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=of_norm)
    assert [line["keys"] for line in lines] == hashes
    count = LOSSES if "accumulate_losses" in RUNS[name] else 1
    assert [line["samples"] for line in lines] == [16 * count * step for step in range(1, STEPS + 1)]
    if within == 1e-5:
        final = weights_of(load_dual_encoder(str(launched / name)))
        assert final.keys() == weights.keys()
        for key in final:
            torch.testing.assert_close(final[key].reshape(weights[key].shape), weights[key], rtol=1e-3, atol=2e-4)


def test_master_weights_on_the_host_are_those_on_the_device(launched):
    """bf16 at ZeRO-2, where most put them."""
    device, host = (
        weights_of(load_dual_encoder(str(launched / name))) for name in ("bf16-zero2", "bf16-zero2-offload")
    )
    for key in device:
        torch.testing.assert_close(host[key], device[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["first_order-next", "offload-zero3"])
def test_one_rank_continues_bit_for_bit(recipe, plain, tmp_path, name):
    """Stopped after step 2 and continued: the stream goes on behind the last batch of the update."""
    (run,) = [run for run in load_plan(recipe, ["log.progress=false"]) if run.name == name]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_plan([run], whole, resume=False)
    lines = read_metrics(whole / name / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(plain(name)[0], rel=1e-5)
    train_plan([run], halves, resume=False)
    folder = halves / name
    for gone in ("final", f"checkpoints/step-{STEPS}"):
        shutil.rmtree(folder / gone)
    train_plan([run], halves, resume=True)
    first, second = ((out / name / "final" / "model.safetensors").read_bytes() for out in (whole, halves))
    assert first == second
