"""What an engine holds, by parameter: dropped gradients leave it bit for bit, any ZeRO stage takes it over, and an
update is the mean of its losses wherever the states lie."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from vlscale.config import parse_overrides, validate
from vlscale.distributed import Ranks
from vlscale.train.checkpoint_files import Files
from vlscale.train.elastic import FULL
from vlscale.train.engine import Engine, start_ranks

WAYS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")]


class Small(nn.Module):
    """Odd sizes, so that partitions end in padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(config_of(0, "fp32", "adamw").engine)


def config_of(stage: int, dtype: str, optimizer: str, *overrides: str):
    zero = "zero_optimization: {stage3_param_persistence_threshold: 0}"
    keys = [f"optim={{name: {optimizer}, lr: 0.01}}", "train={global_batch_size: 4, max_steps: 9}"]
    keys += [f"engine={{threads: 1, zero_stage: {stage}, dtype: {dtype}, deepspeed: {{{zero}}}}}", *overrides]
    return validate(parse_overrides(keys), "test")


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def backward(engine: Engine, step: int, factor: float = 1.0) -> None:
    engine.set_rates(0.01, step)
    engine.backward(engine(x=(inputs(step) * factor).to(engine.dtype)))


def steps(engine: Engine, *numbers: int) -> None:
    for step in numbers:
        backward(engine, step)
        engine.step()


def save(engine: Engine, folder: Path) -> None:
    files = Files()
    engine.save(folder, files)
    files.settle()
    files.write(folder)


def save_full(engine: Engine, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    files = Files()
    engine.save_full(files)
    files.write(folder)


def state(engine: Engine) -> dict[tuple[str, str | None], torch.Tensor]:
    return {
        (name, key): engine.full(index, key).detach().clone()
        for index, name in enumerate(engine.learned_names)
        for key in (None, *engine.moments())
    }


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("stage", "dtype"), WAYS)
def test_a_dropped_backward_leaves_no_trace(ranks, stage, dtype):
    engine, undisturbed = (Engine(Small(), config_of(stage, dtype, "adamw"), ranks) for _ in range(2))
    steps(undisturbed, 1, 2, 3)
    expected = state(undisturbed)
    undisturbed.close()
    steps(engine, 1, 2)
    before = state(engine)
    assert engine.local_norm().isfinite() and engine.moments() == ["exp_avg", "exp_avg_sq"]
    backward(engine, 3, float("nan"))
    assert not engine.local_norm().isfinite()
    engine.drop_gradients()
    assert same(state(engine), before) and engine.optimizer_steps() == [2.0] * len(engine.optimizer_steps())
    steps(engine, 3)
    assert same(state(engine), expected) and not same(expected, before)
    engine.close()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_stage_takes_over_from_every_other(ranks, tmp_path, optimizer):
    saved, after = {}, {}
    for stage in range(4):
        engine = Engine(Small(), config_of(stage, "fp32", optimizer), ranks)
        steps(engine, 1, 2)
        saved[stage] = state(engine)
        save_full(engine, tmp_path / f"stage-{stage}")
        steps(engine, 3)
        after[stage] = state(engine)
        engine.close()
    for stage in range(4):
        engine = Engine(Small(), config_of(stage, "fp32", optimizer), ranks)
        for source in range(4):
            engine.load_full(tmp_path / f"stage-{source}" / FULL)
            assert same(state(engine), saved[source])
            steps(engine, 3)
            for key, value in state(engine).items():
                torch.testing.assert_close(value, after[source][key], rtol=1e-6, atol=1e-8)
        engine.close()


def test_a_model_that_learns_something_else_is_refused(ranks, tmp_path):
    engine = Engine(Small(), config_of(2, "fp32", "sgd"), ranks)
    save_full(engine, tmp_path)
    engine.close()
    other = Small()
    other.first.requires_grad_(False)
    engine = Engine(other, config_of(2, "fp32", "sgd"), ranks)
    with pytest.raises(ValueError, match=r"holds other parameters than this model learns, first first\.bias"):
        engine.load_full(tmp_path / FULL)
    engine.close()


OFFLOAD = "engine.offload_optimizer=cpu"
PLACES = [(stage, dtype, ()) for stage, dtype in [*WAYS, (3, "bf16")]]
PLACES += [(stage, "fp32", (OFFLOAD,)) for stage in (1, 2)]
PLACES += [(3, dtype, (OFFLOAD, "engine.offload_parameters=cpu")) for dtype in ("fp32", "bf16")]
LOSSES, CLIP = 3, 0.05


@pytest.mark.parametrize(("stage", "dtype", "places"), PLACES)
def test_an_update_is_the_mean_of_its_losses(ranks, tmp_path, stage, dtype, places):
    """Clipped once, by the norm of the mean. Losses that were begun and dropped leave no trace, and a checkpoint
    between two updates none either."""
    how = f"train.accumulate_losses={LOSSES}", f"optim.clip_norm={CLIP}", "optim.weight_decay=0", *places
    config = config_of(stage, dtype, "sgd", *how)
    engine, plain = Engine(Small(), config, ranks), Small()
    for step in (1, 2, 3):
        norm = _update(engine, step, dropped=2 if step == 2 else 0)
        expected = _plain_update(plain, step)
        assert norm == pytest.approx(expected, rel=1e-5 if dtype == "fp32" else 2e-2) and expected > CLIP
        if step == 2:
            save(engine, tmp_path)
            engine.close()
            engine = Engine(Small(), config, ranks)
            engine.load(tmp_path)
    for (_, found), value in zip(state(engine).items(), plain.parameters(), strict=True):
        within = {"rtol": 1e-6, "atol": 1e-8} if dtype == "fp32" else {"rtol": 1e-2, "atol": 2e-3}
        torch.testing.assert_close(found, value.detach(), **within)
    engine.close()


def _update(engine: Engine, step: int, dropped: int) -> float:
    engine.set_rates(0.01, step)

    def losses(count: int) -> float:
        for k in range(count):
            engine.backward(engine(x=inputs(10 * step + k).to(engine.dtype)))
            norm = engine.step()
        return norm

    if dropped:
        assert math.isnan(losses(dropped))
        engine.drop_gradients()
    return losses(LOSSES)


def _plain_update(model: nn.Module, step: int) -> float:
    model.zero_grad()
    (sum(model(inputs(10 * step + k)) for k in range(LOSSES)) / LOSSES).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    return float(norm)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adam_on_the_host_is_adam(ranks, stage):
    engines = [Engine(Small(), config_of(stage, "fp32", "adamw", *keys), ranks) for keys in ((), (OFFLOAD,))]
    for engine in engines:
        steps(engine, 1, 2, 3)
    assert same(*(state(engine) for engine in engines))
    for engine in engines:
        engine.close()
