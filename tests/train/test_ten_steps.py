"""Ten steps of `vlscale train` over 1, 2 and 4 ranks at every ZeRO stage, by chunks and not, against plain PyTorch.

The plain side is one process, the dense loss of the whole global batch, torch's own SGD and AdamW, and a rate, a
clipping and groups that are written here. Only the model and the batches are the project's.
"""

import functools
import math
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tests.train.forked_ranks import Group, run_groups, said
from vlscale.config import load_plan
from vlscale.data.batch import Batch
from vlscale.distributed import Ranks
from vlscale.models.dual_encoder import DualEncoder, load_dual_encoder, weights_of
from vlscale.train.metrics_file import read_metrics
from vlscale.train.setup import build_parts, build_stream

STEPS, BATCH, WARMUP, DECAY = 10, 16, 2, 0.1
CHUNK = {1: 4, 2: 4, 4: 2}  # by world size: 4, 2 and 2 chunks of a rank's pairs
RATE, CLIP = {"sgd": 0.01, "adamw": 1e-3}, 12.0  # some gradients are longer than that, some shorter
BETAS, EPS = (0.9, 0.98), 1e-5  # far above the rounding of a gradient that is zero
WITHIN = 1e-5  # of a loss and, with SGD, of a parameter's norm
OF_THE_WAY = 1e-3  # of the distance that a parameter moved
CASES = {
    f"{optimizer}-zero{stage}-{how}": (optimizer, stage, how)
    for optimizer in RATE
    for stage in range(4)
    for how in ("whole", "chunks")
}
VARIED = "{vision: {config: {initializer_range: 0.2}}}"  # pictures differ to the untrained tower too
# Parameters of any size are split over ranks, and gradients fill many buckets, as a large model's do.
SPLIT = "deepspeed: {zero_optimization: {stage3_param_persistence_threshold: 0, reduce_bucket_size: 8192}}"
WRONG = {  # what a plain training has to be refused for
    "sgd": ("gradient halved", "scale twice", "a chunk left out", "not clipped", "biases decay"),
    "adamw": ("a chunk left out", "not clipped", "biases decay"),
}


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]  # of the gradients, before clipping
    before: dict[str, torch.Tensor]  # weights, by the names that a run's `final/` has for them
    after: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def recipes(tiny_config, tmp_path_factory) -> dict[int, Path]:
    """Of all cases, by world size."""
    place = tmp_path_factory.mktemp("recipes")
    train = f"{{global_batch_size: {BATCH}, max_steps: {STEPS}, checkpoint_every: {STEPS}}}"
    common = f"schedule: cosine, warmup_steps: {WARMUP}, weight_decay: {DECAY}"

    def variant(optimizer: str, stage: int, chunk: int | str) -> str:
        optim = f"{{name: {optimizer}, lr: {RATE[optimizer]}, clip_norm: {CLIP}, eps: {EPS:f}, {common}}}"
        engine = f"{{zero_stage: {stage}{f', {SPLIT}' if stage else ''}}}"
        return f"{{optim: {optim}, engine: {engine}, train: {{chunk_size: {chunk}}}}}"

    def recipe(chunk: int) -> str:
        variants = [
            f"{name}: {variant(*own[:2], chunk if own[2] == 'chunks' else 'null')}" for name, own in CASES.items()
        ]
        return f"base: {tiny_config}\nmodel: {VARIED}\ntrain: {train}\nvariants:\n  " + "\n  ".join(variants) + "\n"

    for size, chunk in CHUNK.items():
        (place / f"{size}.yaml").write_text(recipe(chunk))
    return {size: place / f"{size}.yaml" for size in CHUNK}


@pytest.fixture(scope="module")
def trained(recipes, tmp_path_factory) -> Path:
    """One launch per world size, of all cases; all processes are forked from one."""
    place = tmp_path_factory.mktemp("trained")
    groups = [
        Group([str(recipe), "--out", str(place / str(size)), "log.progress=false"], size)
        for size, recipe in recipes.items()
    ]
    for number, codes in enumerate(run_groups(place, groups)):
        assert not any(codes), said(place, number)[-4000:]
    return place


@pytest.fixture(scope="module")
def plain(recipes, tmp_path_factory):
    """By the optimizer's name and, for a training that is wrong, what is wrong with it."""
    config = load_plan(recipes[1])[0].config
    parts = build_parts(config, tmp_path_factory.mktemp("plain"), Ranks())
    with closing(iter(build_stream(config, parts, Ranks(), None))) as stream:
        batches = [next(stream) for _ in range(STEPS)]
    start = {name: value.clone() for name, value in parts.model.state_dict().items()}

    @functools.cache
    def train(optimizer: str, wrong: str = "") -> Trained:
        parts.model.load_state_dict(start)
        losses, norms = _train(parts.model, batches, optimizer, wrong)
        learned = dict(parts.model.named_parameters())
        after = {name: p.detach().clone() for name, p in learned.items()}
        return Trained(losses, norms, {name: start[name] for name in learned}, after)

    return train


def _train(model: DualEncoder, batches: list[Batch], name: str, wrong: str) -> tuple[list[float], list[float]]:
    decays = {parameter: parameter.ndim > 1 or wrong == "biases decay" for parameter in model.parameters()}
    groups = [
        {"params": [parameter for parameter in decays if decays[parameter] == own], "weight_decay": DECAY * own}
        for own in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS)
    losses, norms = [], []
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = dense_loss(model, batch, learning=BATCH - 4 if wrong == "a chunk left out" else BATCH)
        loss.backward()
        factors = {"gradient halved": dict.fromkeys(decays, 0.5), "scale twice": {model.logit_scale: 2}}
        for parameter, factor in factors.get(wrong, {}).items():
            parameter.grad *= factor
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if wrong == "not clipped" else CLIP)
        done = max(0, step - WARMUP) / (STEPS - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = RATE[name] * min(step / WARMUP, (1 + math.cos(math.pi * done)) / 2)
        optimizer.step()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
    return losses, norms


def dense_loss(model: DualEncoder, batch: Batch, learning: int) -> torch.Tensor:
    """Of all pairs, each its own positive. The towers learn from the first `learning` ones."""
    assert len(batch.images) == len(batch.pair_id.unique()) == BATCH
    rows = model.encode_image(batch.images), model.encode_text(batch.input_ids, batch.attention_mask)
    image, text = (torch.cat([side[:learning], side[learning:].detach()]) for side in rows)
    logits, own = model.logit_scale.exp() * image @ text.T, torch.arange(BATCH)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def result_of(run: Path) -> Trained:
    lines = read_metrics(run / "metrics.jsonl")
    weights = weights_of(load_dual_encoder(str(run)))
    return Trained([line["loss"] for line in lines], [line["grad_norm"] for line in lines], {}, weights)


def misfits(found: Trained, expected: Trained, optimizer: str) -> list[str]:
    """What is not as it is to be. A softmax is blind to key biases: their gradient is rounding, and they are held to
    the norm and the distance of the whole model."""
    off = []
    for what, within in (("losses", WITHIN), ("norms", 10 * WITHIN)):
        pairs = zip(getattr(found, what), getattr(expected, what), strict=True)
        off += [f"{what}: {a:.9g} for {b:.9g}" for a, b in pairs if not math.isclose(a, b, rel_tol=within)]
    ways = {name: value - expected.before[name] for name, value in expected.after.items()}
    for name, value in expected.after.items():
        blind = name.endswith(("key.bias", "k_proj.bias"))
        norm, way = (norm_of(of.values() if blind else [of[name]]) for of in (expected.after, ways))
        error = norm_of([found.after[name] - value])
        if not error <= OF_THE_WAY * way:
            off.append(f"{name}: {error / way:.1e} of its way")
        if optimizer == "sgd" and not error <= WITHIN * norm:
            off.append(f"{name}: {error / norm:.1e} of its norm")
    return off


def norm_of(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.cat([tensor.double().ravel() for tensor in tensors]).norm())


@pytest.mark.parametrize("size", CHUNK)
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_plain_pytorch(trained, plain, name, size):
    optimizer, *_ = CASES[name]
    assert misfits(result_of(trained / str(size) / name), plain(optimizer), optimizer) == []


@pytest.mark.parametrize(("optimizer", "wrong"), [(name, wrong) for name, all_ in WRONG.items() for wrong in all_])
def test_what_is_wrong_is_told(plain, optimizer, wrong):
    """By the weights alone, too."""
    expected = plain(optimizer)
    assert max(expected.norms) > CLIP > min(expected.norms)
    found = plain(optimizer, wrong)._replace(losses=expected.losses, norms=expected.norms)
    assert misfits(found, expected, optimizer)
