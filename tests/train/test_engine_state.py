"""What an engine holds, by parameter: dropped gradients leave it bit for bit, and any ZeRO stage takes it over."""

import pytest
import torch
from torch import nn

from vlscale.config import parse_overrides, validate
from vlscale.distributed import Ranks
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


def config_of(stage: int, dtype: str, optimizer: str):
    zero = "zero_optimization: {stage3_param_persistence_threshold: 0}"
    keys = [f"optim={{name: {optimizer}, lr: 0.01}}", "train={global_batch_size: 4, max_steps: 9}"]
    return validate(
        parse_overrides([*keys, f"engine={{threads: 1, zero_stage: {stage}, dtype: {dtype}, deepspeed: {{{zero}}}}}"]),
        "test",
    )


def backward(engine: Engine, step: int, factor: float = 1.0) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) * factor
    engine.set_rates(0.01, step)
    engine.backward(engine(x=x.to(engine.dtype)))


def steps(engine: Engine, *numbers: int) -> None:
    for step in numbers:
        backward(engine, step)
        engine.step()


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
        engine.save_full(tmp_path / f"stage-{stage}")
        steps(engine, 3)
        after[stage] = state(engine)
        engine.close()
    for stage in range(4):
        engine = Engine(Small(), config_of(stage, "fp32", optimizer), ranks)
        for source in range(4):
            engine.load_full(tmp_path / f"stage-{source}")
            assert same(state(engine), saved[source])
            steps(engine, 3)
            for key, value in state(engine).items():
                torch.testing.assert_close(value, after[source][key], rtol=1e-6, atol=1e-8)
        engine.close()


def test_a_model_that_learns_something_else_is_refused(ranks, tmp_path):
    engine = Engine(Small(), config_of(2, "fp32", "sgd"), ranks)
    engine.save_full(tmp_path / "full")
    engine.close()
    other = Small()
    other.first.requires_grad_(False)
    engine = Engine(other, config_of(2, "fp32", "sgd"), ranks)
    with pytest.raises(ValueError, match=r"holds other parameters than this model learns, first first\.bias"):
        engine.load_full(tmp_path / "full")
    engine.close()
