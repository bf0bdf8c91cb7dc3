"""Copies of checkpoints at another place: a store in memory that fails when it is told to."""

import threading
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vlscale.config import load_plan, parse_overrides, validate
from vlscale.distributed import Ranks
from vlscale.sections import TrainConfig
from vlscale.train import checkpoint_remote
from vlscale.train.bad_numbers import BadSteps
from vlscale.train.checkpoint import Checkpoints, Layout
from vlscale.train.checkpoint_folder import fault_of
from vlscale.train.checkpoint_remote import Remote, open_remote
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

LAYOUT = Layout(world_size=1, zero_stage=2, dtype="fp32")


class Store(MemoryFileSystem):
    """`faults`: how often putting a file whose name ends so still fails, with a secret in the message."""

    protocol = "store"
    store, pseudo_dirs, cachable = {}, [""], False
    faults: ClassVar[dict[str, int]] = {}
    held = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("store://", "memory://"))

    def put_file(self, lpath, rpath, **named):
        Store.held.wait(60)
        name = next((name for name in Store.faults if rpath.endswith(name)), None)
        if name is not None and Store.faults[name]:
            Store.faults[name] -= 1
            raise OSError("the store answers 503 at store://bucket/key?signature=SECRET now")
        super().put_file(lpath, rpath, **named)


@pytest.fixture
def store(monkeypatch):
    fsspec.register_implementation("store", Store, clobber=True)
    monkeypatch.setattr(checkpoint_remote, "FIRST_WAIT", 0.001)
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    Store.faults = {}
    Store.held.set()
    return Store


class Weights:
    def save(self, folder, files):
        files.add("engine/weights.bin", b"weights of " + folder.name.encode())


def saving(root: Path, remote: Remote | None) -> Checkpoints:
    train = TrainConfig(keep_checkpoints=2, checkpoint_remote="store://bucket/runs")
    return Checkpoints(root, LAYOUT, Weights(), Ranks(), train, remote)


def there(store) -> list[str]:
    return sorted({path.split("/")[4] for path in store.store if path.startswith("/bucket/runs/first/")})


def remote_of_first() -> Remote:
    return Remote("store://bucket/runs", "first", 2)


def save(into: Checkpoints, *steps: int) -> None:
    for step in steps:
        into.save(step, {"at": step}, BadSteps())
        into.finish()


def test_each_is_copied_and_the_newest_stay(store, tmp_path):
    save(saving(tmp_path, remote_of_first()), 2, 4, 10)
    assert there(store) == ["step-10", "step-4"] and remote_of_first().steps() == [10, 4]
    fetched = remote_of_first().fetch_newest(tmp_path / "elsewhere" / "checkpoints")
    assert fetched.name == "step-10" and fault_of(fetched) is None
    assert [path.name for path in fetched.parent.iterdir()] == ["step-10"]


def test_a_store_that_fails_for_a_while_is_tried_again_and_no_secret_is_told(caplog, store, tmp_path):
    store.faults = {"weights.bin": 2, "manifest.json": 3}
    save(saving(tmp_path, remote_of_first()), 2)
    assert remote_of_first().steps() == [2]
    assert "the store answers 503" in caplog.text and "SECRET" not in caplog.text


@pytest.mark.parametrize("name", ["weights.bin", "manifest.json"])
def test_a_copy_that_fails_is_a_warning_and_is_none(caplog, store, tmp_path, name):
    into = saving(tmp_path, remote_of_first())
    save(into, 2)
    store.faults = {name: 4}
    save(into, 4)
    assert "step-4 is not copied there (OSError: the store answers 503" in caplog.text
    assert remote_of_first().steps() == [2] and fault_of(tmp_path / "step-4") is None
    save(into, 6)
    assert remote_of_first().steps() == [6, 2] and "step-4" not in there(store)


def test_a_slow_store_gets_the_newest_and_keeps_its_source(store, tmp_path):
    store.held.clear()
    into = saving(tmp_path, remote_of_first())
    for step in (2, 4, 6, 8):
        into.save(step, {"at": step}, BadSteps())
        into.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-6", "step-8"}, "step-2 is being sent"
    store.held.set()
    into.finish()
    assert remote_of_first().steps() == [8, 2]


@pytest.mark.parametrize("damage", ["flipped", "cut", "outside", "no manifest"])
def test_a_damaged_copy_is_passed_over(caplog, store, tmp_path, damage):
    save(saving(tmp_path / "run", remote_of_first()), 2, 4)
    files, weights = remote_of_first()._files, "/bucket/runs/first/step-4/engine/weights.bin"
    manifest = "/bucket/runs/first/step-4/manifest.json"
    if damage == "no manifest":
        files.rm(manifest)
    elif damage == "outside":
        files.pipe_file(manifest, files.cat_file(manifest).replace(b"engine/weights.bin", b"../../../escaped"))
    else:
        content = files.cat_file(weights)
        files.pipe_file(weights, content[:-1] if damage == "cut" else b"W" + content[1:])
    fetched = remote_of_first().fetch_newest(tmp_path / "new")
    assert fetched.name == "step-2" and [path.name for path in (tmp_path / "new").iterdir()] == ["step-2"]
    assert ("step-4 is passed over" in caplog.text) == (damage != "no manifest")
    assert not list(tmp_path.rglob("escaped"))


def test_a_place_that_holds_a_run_is_refused_without_resume(store, tmp_path):
    save(saving(tmp_path, remote_of_first()), 2)
    train = TrainConfig(checkpoint_remote="store://bucket/runs")
    with pytest.raises(ValueError, match=r"store://bucket/runs/first already holds checkpoints .* --resume"):
        open_remote(tmp_path / "new", train, "first", Ranks(), resume=False)
    assert open_remote(tmp_path / "new", train, "second", Ranks(), resume=False).steps() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("runs/copies", "an url that can be written to"),
        ("https://example.org/runs", "an url that can be written to"),
        ("s3://key:secret@bucket/runs", "holds a password"),
        ("abfs://runs?token=secret", "holds a password or a query"),
    ],
)
def test_an_url_that_cannot_do_is_refused_without_its_secret(url, message):
    with pytest.raises(ValueError, match=message) as refused:
        validate(parse_overrides([f"train.checkpoint_remote='{url}'"]), "test")
    assert "secret" not in str(refused.value)


def test_an_unknown_scheme_is_one_line(tmp_path):
    train = TrainConfig(checkpoint_remote="nowhere://bucket/runs")
    with pytest.raises(ValueError, match=r"train\.checkpoint_remote=nowhere://bucket/runs: Protocol not known"):
        open_remote(tmp_path, train, "first", Ranks(), resume=True)


def test_an_empty_folder_resumes_from_the_copy_to_the_same_bytes(caplog, store, tiny_config, tmp_path):
    keys = ["log.progress=false", "train.checkpoint_remote='store://bucket/runs'"]
    train_plan(load_plan(tiny_config, keys), tmp_path / "run", resume=False)
    copies = Remote("store://bucket/runs", "run", 2)
    assert copies.steps() == [6, 4]
    copies._files.rm(copies._manifest(6))
    train_plan(load_plan(tiny_config, keys), tmp_path / "other" / "run", resume=True)
    assert "checkpoint step-4 is fetched from store://bucket/runs/run" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path / "other" / "run" / "metrics.jsonl")] == [5, 6]
    final = Path("final") / "model.safetensors"
    assert (tmp_path / "other" / "run" / final).read_bytes() == (tmp_path / "run" / final).read_bytes()
    assert copies.steps() == [6, 4]
