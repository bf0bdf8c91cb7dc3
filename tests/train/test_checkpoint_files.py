"""The copy that a checkpoint is written from, and the write beside training: what is saved is the state of the save,
one copy is on its way at most, and every ZeRO stage comes back from it."""

import hashlib
import threading
from pathlib import Path

import pytest
import torch

from tests.train.test_engine_state import Small, backward, config_of, same, state
from vlscale.distributed import Ranks
from vlscale.sections import TrainConfig
from vlscale.train.bad_numbers import BadSteps
from vlscale.train.checkpoint import Checkpoints, Layout
from vlscale.train.checkpoint_files import Files, HostBuffers, Tensors, write_file
from vlscale.train.checkpoint_folder import fault_of
from vlscale.train.elastic import FULL
from vlscale.train.engine import Engine, start_ranks

LAYOUT = Layout(world_size=1, zero_stage=2, dtype="fp32")


def test_a_copy_is_the_state_of_then_however_deep(tmp_path):
    weight, settings = torch.arange(6.0).reshape(2, 3), {"rate": [0.5]}
    given = {"layers": [{"weight": weight, "tied": weight, "column": weight[:, 1]}], "settings": settings}
    files = Files(HostBuffers())
    files.add("state.pt", given)
    files.settle()
    weight.zero_()
    settings["rate"][0] = 9.0
    files.write(tmp_path)
    found = torch.load(tmp_path / "state.pt")
    (layer,) = found["layers"]
    assert layer["weight"].equal(torch.arange(6.0).reshape(2, 3)) and layer["column"].tolist() == [1.0, 4.0]
    assert layer["weight"] is layer["tied"] and found["settings"] == {"rate": [0.5]}


def test_the_next_copy_takes_the_same_memory(tmp_path):
    buffers, places = HostBuffers(), []
    for value in (1.0, 2.0):
        files = Files(buffers)
        own = files.copy(torch.full((7, 5), value))
        files.add("full/part-0.safetensors", Tensors({"weight": own}))
        places.append(own.data_ptr())
        assert files.write(tmp_path).keys() == {"full/part-0.safetensors"}
    assert places[0] == places[1]


@pytest.mark.parametrize("content", [b"plain", {"weight": torch.ones(2_000_000)}, Tensors({"w": torch.ones(3)})])
def test_size_and_sum_are_those_of_the_file(tmp_path, content):
    size, digest = write_file(tmp_path / "inside" / "file", content)
    found = (tmp_path / "inside" / "file").read_bytes()
    assert size == len(found) and digest == hashlib.sha256(found).hexdigest()


class Held:
    """An engine whose file is written when `let` is set."""

    def __init__(self):
        self.let = threading.Event()

    def save(self, folder: Path, files: Files) -> None:
        files.add("weights", Waiting(self.let))


class Waiting:
    """Content that waits while it is written."""

    def __init__(self, let: threading.Event):
        self.let = let

    def __reduce__(self):
        assert self.let.wait(60)
        return bytes, (b"weights",)


def test_a_save_returns_at_once_and_the_next_one_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr("vlscale.train.checkpoint_files._on_host", lambda content, copy: content)
    engine = Held()
    into = Checkpoints(tmp_path, LAYOUT, engine, Ranks(), TrainConfig(keep_checkpoints=5))
    into.save(2, None, BadSteps())
    assert into.busy and [path.name for path in tmp_path.iterdir()] == [".step-2.partial"]
    into.poll(busy_anywhere=True)
    assert [path.name for path in tmp_path.iterdir()] == [".step-2.partial"]
    threading.Timer(0.3, engine.let.set).start()
    into.save(4, None, BadSteps())
    assert fault_of(tmp_path / "step-2") is None and not (tmp_path / "step-4").exists()
    into.wait()
    assert not into.busy and sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4"]


def test_polls_alone_complete_it(tmp_path):
    engine = Held()
    engine.let.set()
    into = Checkpoints(tmp_path, LAYOUT, engine, Ranks(), TrainConfig())
    into.save(2, None, BadSteps())
    for _ in range(600):
        into.poll(busy_anywhere=into.busy)
        if (tmp_path / "step-2").exists() and not into.busy:
            break
        threading.Event().wait(0.01)
    assert fault_of(tmp_path / "step-2") is None


def test_a_fault_of_ours_in_the_thread_comes_out_as_one_line(tmp_path, monkeypatch):
    def broken(path, content):
        raise KeyError("weights")

    monkeypatch.setattr("vlscale.train.checkpoint_files.write_file", broken)
    engine = Held()
    engine.let.set()
    into = Checkpoints(tmp_path, LAYOUT, engine, Ranks(), TrainConfig())
    into.save(2, None, BadSteps())
    with pytest.raises(RuntimeError, match=r"^rank 0 could not write the checkpoint of step 2: KeyError: 'weights'$"):
        into.wait()
    assert not (tmp_path / "step-2").exists()


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(config_of(0, "fp32", "adamw").engine)


def steps(engine: Engine, *numbers: int) -> None:
    for number in numbers:
        backward(engine, number)
        engine.step()


WAYS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "dtype"), WAYS)
def test_training_goes_on_and_the_checkpoint_is_of_the_step_before(ranks, tmp_path, monkeypatch, stage, dtype):
    """The write is held back until two more steps have changed everything; then another engine loads it, bit for bit,
    and makes the same steps."""
    let, real = threading.Event(), Files.write
    monkeypatch.setattr(Files, "write", lambda self, folder: (let.wait(60), real(self, folder))[1])
    engine = Engine(Small(), config_of(stage, dtype, "adamw"), ranks)
    into = Checkpoints(tmp_path, LAYOUT, engine, ranks, TrainConfig(elastic=True))
    steps(engine, 1, 2)
    saved = state(engine)
    into.save(2, {"at": 2}, BadSteps())
    steps(engine, 3, 4)
    after = state(engine)
    let.set()
    into.wait()
    engine.close()
    again = Engine(Small(), config_of(stage, dtype, "adamw"), ranks)
    restored = Checkpoints(tmp_path, LAYOUT, again, ranks, TrainConfig()).load()
    assert restored.stream_state == {"at": 2} and same(state(again), saved)
    steps(again, 3, 4)
    assert same(state(again), after) and not same(after, saved)
    again.close()


OFFLOAD = "engine.offload_optimizer=cpu"
GROUPS = {
    "bf16": [("bf16", stage, ()) for stage in (1, 2, 3)],
    "offload": [("fp32", 2, ()), ("fp32", 1, (OFFLOAD,)), ("fp32", 2, (OFFLOAD,)), ("fp32", 3, (OFFLOAD,))],
}


@pytest.mark.parametrize("group", GROUPS)
def test_in_bf16_or_offloaded_every_stage_takes_over_from_every_other(ranks, tmp_path, group):
    """Master weights and moments bit for bit, and what a forward sees is the master, rounded."""
    saved = []
    for place, (dtype, stage, places) in enumerate(GROUPS[group]):
        engine = Engine(Small(), config_of(stage, dtype, "adamw", *places), ranks)
        steps(engine, 1, 2)
        saved.append(state(engine))
        files = Files(HostBuffers())
        engine.save_full(files)
        files.settle()
        (tmp_path / str(place)).mkdir()
        files.write(tmp_path / str(place))
        engine.close()
    for dtype, stage, places in GROUPS[group]:
        engine = Engine(Small(), config_of(stage, dtype, "adamw", *places), ranks)
        for source, expected in enumerate(saved):
            engine.load_full(tmp_path / str(source) / FULL)
            assert same(state(engine), expected)
            for index, weight in enumerate(engine.learned):
                held = weight.detach() if stage < 3 else weight.ds_tensor.detach()[: weight.ds_numel]
                assert held.reshape(-1).equal(engine.full(index, None).to(engine.dtype).reshape(-1))
        steps(engine, 3)
        engine.close()
