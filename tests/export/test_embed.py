"""Indexes on disk: what they hold, going on after kill -9, sharing among ranks, refusals."""

import importlib.util
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vlscale.cli import app, main
from vlscale.distributed import Ranks
from vlscale.evaluate.embed import embed_corpus
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.export.embed import EmbedRequest, open_job
from vlscale.export.index_file import Header, Rows, read_index

PART = 20  # of about 64 held-out samples: four parts


def request(run: Path, val: str, out: Path, **changes) -> EmbedRequest:
    return EmbedRequest(str(run), [val], out, part=PART, batch_size=8, **changes)


@pytest.fixture(scope="module")
def whole(run, val, held_out, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("index") / "val.npz"
    heard = []
    job = open_job(request(run, val, out, dtype="float32"))
    job.run(heard.append)
    assert (job.total, sum(heard), job.parts) == (held_out, held_out, 4)
    assert [path.name for path in out.parent.iterdir()] == ["val.npz"], "something half-written is left"
    return out


def test_an_index_holds_what_evaluation_embeds_in_plain_numpy(run, val, whole):
    corpus, _ = evaluate_model(EvalRequest(str(run), [val]))
    arrays = np.load(whole, allow_pickle=False)
    np.testing.assert_allclose(arrays["image_emb"], corpus.image_emb, rtol=0, atol=1e-6)
    np.testing.assert_allclose(arrays["text_emb"], corpus.text_emb, rtol=0, atol=1e-6)
    assert arrays["keys"].tolist() == corpus.keys and arrays["captions"].tolist() == corpus.captions
    assert np.array_equal(arrays["text_image"], corpus.text_image)
    header = Header.from_json(str(arrays["header"]))
    assert (header.model, header.data, header.dtype, header.embed_dim) == (str(run), [val], "float32", 16)


def test_float16_is_half_the_bytes_and_near(run, val, whole, tmp_path):
    out = tmp_path / "half.npz"
    done = CliRunner().invoke(app, ["embed", str(run), "--data", val, "--out", str(out)])
    assert done.exit_code == 0 and "index: " in done.output
    half, full = read_index(out), read_index(whole)
    assert half.image_emb.dtype == np.float16
    np.testing.assert_allclose(half.image_emb, full.image_emb, atol=1e-3)


VICTIM = """
import os, signal, sys
from pathlib import Path
from vlscale.export.embed import EmbedRequest, open_job
from vlscale.export.index_file import Rows
save, saved = Rows.save, []
def dies(self, path):
    saved.append(path)
    if len(saved) == 3:
        Path(path).write_bytes(b"half a part")
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path)
Rows.save = dies
run, val, out = sys.argv[1:]
open_job(EmbedRequest(run, [val], Path(out), part=20, batch_size=8, dtype="float32")).run()
"""


def test_after_kill_9_the_same_command_goes_on_to_the_same_bytes(run, val, held_out, whole, tmp_path):
    out = tmp_path / "val.npz"
    killed = subprocess.run([sys.executable, "-c", VICTIM, str(run), val, str(out)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    heard = []
    job = open_job(request(run, val, out, dtype="float32"))
    left = held_out - held_out // 2
    assert job.done == held_out // 2
    job.run(heard.append)
    assert sum(heard) == left and out.read_bytes() == whole.read_bytes()
    again = open_job(request(run, val, out, dtype="float32"))
    again.run(heard.append)
    assert again.complete and again.done == held_out and sum(heard) == left


def test_ranks_share_the_parts(run, val, whole, tmp_path):
    out = tmp_path / "val.npz"
    second = open_job(request(run, val, out, dtype="float32", rank=1, ranks=2))
    second.run()
    assert 0 < second.total < len(read_index(whole).keys) and not out.exists()
    open_job(request(run, val, out, dtype="float32", rank=0, ranks=2)).run()
    assert out.read_bytes() == whole.read_bytes()


def test_parts_and_files_of_another_request_are_left_alone(run, val, clip_towers, whole, tmp_path):
    with pytest.raises(ValueError, match="exists and is of another model or data"):
        open_job(request(run, val, whole, dtype="float16"))
    out = tmp_path / "val.npz"
    open_job(request(run, val, out, rank=1, ranks=2)).run()
    other = request(clip_towers, val, out, caption_key="json:captions")
    with pytest.raises(ValueError, match=r"holds parts of another request \(model .*tiny-run"):
        open_job(other).run()


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("val.pt", {}, r"ends in .npz or .parquet, got '.pt'"),
        ("val.npz", {"dtype": "int8"}, "--dtype int8: expected float16 or float32"),
        ("val.npz", {"caption_key": "json:no"}, "no sample of .* could be read"),
    ],
)
def test_bad_requests_are_one_line(run, val, tmp_path, name, changes, said):
    with pytest.raises(ValueError, match=said) as error:
        open_job(request(run, val, tmp_path / name, **changes)).run()
    assert "\n" not in str(error.value)


def test_shards_that_do_not_exist_are_named(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["embed", str(run), "--data", str(tmp_path / "no-*.tar"), "--out", str(tmp_path / "x.npz")])
    assert ended.value.code == 2 and "--data: no shard matches" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_do(run, val, tmp_path):
    with pytest.raises(ValueError, match="parquet needs pyarrow, which is not installed"):
        open_job(request(run, val, tmp_path / "val.parquet"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_parquet_holds_the_same(run, val, whole, tmp_path, dtype):
    pytest.importorskip("pyarrow")
    open_job(request(run, val, tmp_path / "val.parquet", dtype=dtype)).run()
    found, expected = read_index(tmp_path / "val.parquet"), read_index(whole)
    for name in ("keys", "captions", "text_image"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    for name in ("image_emb", "text_emb"):
        assert np.array_equal(getattr(found, name), getattr(expected, name).astype(dtype))


def test_pictures_beyond_max_pixels_are_left_out_as_in_training(run, val, held_out, tmp_path):
    job = open_job(request(run, val, tmp_path / "val.npz"))
    assert job.data.max_pixels == job.model.config.data.max_pixels  # the run's own
    largest = job.data.model_copy(update={"max_pixels": 32 * 32})
    smaller = job.data.model_copy(update={"max_pixels": 32 * 32 - 1})
    embed = partial(embed_corpus, job.model.encoder, [val], preprocess=job.model.preprocess, batch_size=32)
    assert len(embed(largest, ranks=Ranks()).keys) == held_out
    with pytest.raises(ValueError, match=r"no sample of .* could be read"):
        embed(smaller, ranks=Ranks())
    job.data = smaller
    with pytest.raises(ValueError, match=r"no sample of .* could be read"):
        job.run()


def test_a_part_without_a_readable_sample_is_empty_and_counts(tmp_path, run, val, held_out):
    job = open_job(request(run, val, tmp_path / "val.npz"))
    job._claim()
    empty = Rows(*(np.zeros(0, kind) for kind in ("U1", "U1", "int64")), *(np.zeros((0, 16), "float16"),) * 2)
    empty.save(job._part(1))
    job.run()
    index = read_index(tmp_path / "val.npz")
    rest = held_out - job._samples([1])
    assert len(index.keys) == rest and int(index.text_image.max()) == rest - 1
