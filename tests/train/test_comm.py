"""What `engine.comm=auto` takes: by memory, once a run, the same in the plan and in the log."""

from types import SimpleNamespace

import pytest

from vlscale.config import PlannedRun, validate
from vlscale.distributed import Ranks
from vlscale.train import memory_plan, setup
from vlscale.train.bad_numbers import BadSteps
from vlscale.train.comm import Comm
from vlscale.train.loss_terms import Widths, gathered_bytes
from vlscale.train.memory_plan_text import Rates, render
from vlscale.train.trainer import Trainer

GIB = 1 << 30
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODEL = {
    "vision": {"config": TINY | {"model_type": "vit", "image_size": 16, "patch_size": 8}},
    "text": {"config": TINY | {"model_type": "bert"}, "vocab_size": 50, "max_length": 8},
    "embed_dim": 256,
}


def config_of(**sections):
    given = {"model": MODEL, "train": {"global_batch_size": 1 << 20, "chunk_size": 4}, **sections}
    return validate(given, "test")


def decide(config, memory: int, monkeypatch, teachers=None) -> str:
    monkeypatch.setattr(setup, "agreed_memory", lambda ranks: memory)
    return setup.decide_comm(config, SimpleNamespace(fusion=None), teachers, Ranks(0, 64))


@pytest.mark.parametrize(("memory", "way"), [(8, "half_ring"), (19, "half_ring"), (20, "gather"), (80, "gather")])
def test_auto_is_by_the_memory_of_a_rank(memory, way, monkeypatch):
    """2^20 pairs x 256 numbers x (4 + 4) bytes are 2 GiB: a tenth of 20."""
    assert decide(config_of(), memory * GIB, monkeypatch) == way


@pytest.mark.parametrize("way", ["gather", "ring", "half_ring"])
def test_what_is_asked_for_is_taken_whatever_the_memory(way, monkeypatch):
    for memory in (1, 1000):
        assert decide(config_of(engine={"comm": way}), memory * GIB, monkeypatch) == way


def test_one_rank_has_nothing_to_decide():
    assert setup.decide_comm(config_of(), None, None, Ranks()) == "gather"


def test_all_terms_count_together():
    """D = 8, teachers of 3 and 5: two contrasts of 8, KL of 8 + 3 and 8 + 5; of RVLR's distances mae moves rows, mse
    and wasserstein have one way whatever is asked for."""
    widths, each = Widths(8, 3, 5), 10 * (2 + 4)
    objective = lambda **own: config_of(objective=own, teacher={"source": "frozen_copy"}).objective  # noqa: E731
    assert gathered_bytes(objective(), widths, 10, 2) == each * 8
    assert gathered_bytes(objective(name="covlr", view_weight=1), widths, 10, 2) == each * (2 * 8 + 11 + 13)
    rvlr = {"name": "rvlr", "kd_image_weight": 1, "kd_text_weight": 0}
    assert gathered_bytes(objective(**rvlr), widths, 10, 2) == each * (3 * 8 + 2 * (8 + 8) + (3 + 8))
    for distance in ("mse", "wasserstein"):
        assert gathered_bytes(objective(**rvlr, relation_distance=distance), widths, 10, 2) == each * 3 * 8
    fused = Widths(8, 3, 5, fused=16)
    assert gathered_bytes(objective(**rvlr), fused, 10, 2) == each * (3 * 8 + (16 + 8) + (3 + 8))


def test_the_log_says_what_auto_took_and_why(monkeypatch):
    said = []
    monkeypatch.setattr(
        setup, "get_logger", lambda: SimpleNamespace(info=lambda text, *values: said.append(text % values))
    )
    decide(config_of(), 80 * GIB, monkeypatch)
    assert said == ["engine.comm=auto: gather: 2.0 GiB to gather, of at most 8.0 GiB on a rank with 80.0 GiB"]
    said.clear()
    decide(config_of(engine={"comm": "gather"}), 80 * GIB, monkeypatch)
    assert said == []
    heads = config_of(
        meta={"mode": "heads"}, objective={"name": "covlr"}, teacher={"source": "frozen_copy"}, engine={"dtype": "bf16"}
    )
    teachers = SimpleNamespace(image=SimpleNamespace(width=64), text=SimpleNamespace(width=64))
    assert decide(heads, 16 * GIB, monkeypatch, teachers) == "half_ring"
    assert said[0].startswith("engine.comm=auto: half_ring (ring for contrasts): 5.2 GiB to gather, of at most 1.6 GiB")
    assert "meta.mode=heads differentiates the contrastive loss twice" in said[1] and len(said) == 2


def test_the_plan_says_what_the_run_will(monkeypatch):
    config = config_of(objective={"name": "covlr"}, teacher={"source": "frozen_copy"})
    monkeypatch.setattr(memory_plan, "_memory_here", lambda world: 40 * GIB)
    (plan,) = memory_plan.plan_runs([PlannedRun("", config)], 64)
    comms = []
    monkeypatch.setattr(setup, "Comm", lambda *given: comms.append(Comm(*given)) or comms[0])
    teachers = SimpleNamespace(image=SimpleNamespace(width=16), text=SimpleNamespace(width=16))
    way = decide(config, 40 * GIB, monkeypatch, teachers)
    assert plan.comm == str(comms[0]) and way == "half_ring"
    assert f"losses meet other ranks by     {plan.comm}" in render([plan], Rates())
    monkeypatch.setattr(memory_plan, "_memory_here", lambda world: 800 * GIB)
    (larger,) = memory_plan.plan_runs([PlannedRun("", config)], 64)
    assert larger.comm.startswith("gather: ") and larger.memory["loss"] > plan.memory["loss"]
    assert larger.traffic["losses"] < plan.traffic["losses"]
    (alone,) = memory_plan.plan_runs([PlannedRun("", config)], 1)
    assert alone.comm == "" and "other ranks" not in render([alone], Rates())


def test_steps_take_what_was_decided(tmp_path):
    config, parts = config_of(), SimpleNamespace(inputs=None, comm="half_ring")
    engine = SimpleNamespace(drop_gradients=None)
    assert Trainer(config, tmp_path, parts, engine, None, Ranks(), BadSteps()).step_parts.comm == "half_ring"
