"""Checking and indexing corpora: what is wrong is counted and named, what is there is measured."""

import json
import os

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image
from typer.testing import CliRunner

from vlscale.cli.data import app
from vlscale.data.check import check_corpus, perceptual_hash
from vlscale.data.urls import expand
from vlscale.data.writer import write_shard


def picture(seed, size=(40, 60), quality=90):
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC), quality=quality)


@pytest.fixture
def faulty(tmp_path):
    """Two shards with one fault of each kind, and one that is cut short."""
    samples = [
        {"__key__": "a", "jpg": picture(0), "txt": "two words"},
        {"__key__": "same", "jpg": picture(0, (80, 120), 60), "txt": "ein längerer Satz hier"},
        {"__key__": "cyrillic", "jpg": picture(1), "txt": "привет"},
        {"__key__": "blind", "txt": "x"},
        {"__key__": "broken", "jpg": picture(2)[:300], "txt": "x"},
        {"__key__": "latin1", "jpg": picture(3), "txt": b"caf\xe9"},
        {"__key__": "empty", "jpg": picture(4), "txt": "   "},
    ]
    write_shard(tmp_path / "x-0.tar", samples[:4])
    write_shard(tmp_path / "x-1.tar", samples[4:])
    write_shard(tmp_path / "x-2.tar", samples)
    os.truncate(tmp_path / "x-2.tar", 3000)
    return tmp_path


def test_faults_are_counted_and_named(faulty, make_config):
    data = make_config(faulty, caption_key="txt")
    report = check_corpus(expand(str(faulty / "x-*.tar")), data, duplicates=True, processes=1, progress=False)
    assert report.faults == {"no picture": 1, "broken picture": 1, "caption not UTF-8": 1, "empty caption": 1}
    assert [line.split(":")[0] for line in report.named] == ["blind", "broken", "empty", "latin1"]
    assert f"empty: empty caption: txt holds no text ({faulty / 'x-1.tar'})" in report.named
    assert len(report.bad_shards) == 1 and "x-2.tar ends at byte 3000" in report.bad_shards[0]
    summary = report.summary()
    assert (summary["samples"], summary["shards"], summary["duplicates"]) == (3, 3, 1)
    assert summary["scripts"] == {"LATIN": 2, "CYRILLIC": 1}
    assert summary["width"]["p0"] == 60 and summary["width"]["p100"] == 120
    assert summary["words_per_caption"]["p50"] == 2 and summary["captions_per_sample"]["p100"] == 1


@pytest.fixture
def downloaded(tmp_path):
    """Three whole shards of four samples, one without a caption, as img2dataset leaves them, and one of somebody
    else."""
    for number in range(3):
        samples = [{"__key__": f"{number}{n}", "jpg": picture(4 * number + n), "txt": "a word"} for n in range(4)]
        del samples[3]["txt"]
        write_shard(tmp_path / f"{number:05d}.tar", samples)
        counts = {"count": 6, "successes": 4, "failed_to_download": 2, "failed_to_resize": 0, "duration": 1.5}
        (tmp_path / f"{number:05d}_stats.json").write_text(json.dumps(counts))
    write_shard(tmp_path / "mine.tar", [{"__key__": "x", "jpg": picture(99), "txt": "a word"}])
    return tmp_path


def check(folder, make_config):
    data = make_config(folder, caption_key="txt")
    return check_corpus(expand(str(folder)), data, processes=1, progress=False)


def test_shards_of_img2dataset_are_held_against_its_statistics(downloaded, make_config):
    whole = check(downloaded, make_config)
    assert whole.incomplete == [] and whole.samples == 10 and whole.faults == {"no caption": 3}
    assert whole.downloads == {"asked for": 18, "written": 12, "failed to download": 6}
    (downloaded / "00000_stats.json").write_text('{"count": 9, "successes": 7}')
    (downloaded / "00001_stats.json").write_text('{"count": 9, "succ')
    (downloaded / "00002_stats.json").unlink()
    zero, one, two = check(downloaded, make_config).incomplete
    assert zero == (
        f"shard {downloaded}/00000.tar: it holds 4 samples, img2dataset wrote 7; copy it again, or delete "
        "00000_stats.json and run img2dataset again"
    )
    assert one.endswith("may not have finished it (00001_stats.json is no whole file); run it again")
    assert two.endswith("may not have finished it (00002_stats.json is not there, as others are); run it again")


def test_a_shard_that_is_cut_short_is_one_line_with_what_img2dataset_wrote(downloaded, make_config):
    for number in (1, 2):
        os.truncate(downloaded / f"{number:05d}.tar", 3000)
    (downloaded / "00002_stats.json").unlink()
    report = check(downloaded, make_config)
    one, two = report.bad_shards
    assert "00001.tar ends at byte 3000" in one and one.endswith(
        "; img2dataset wrote 4 samples into it; copy it again, or delete 00001_stats.json and run img2dataset again"
    )
    assert two.endswith("; img2dataset did not finish it (00002_stats.json is not there, as others are); run it again")
    assert report.incomplete == [] and "\n" not in one + two


def test_without_statistics_nothing_is_said_of_them(downloaded, make_config):
    for path in downloaded.glob("*_stats.json"):
        path.unlink()
    report = check(downloaded, make_config)
    assert report.incomplete == [] and report.summary()["downloads"] is None


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"count": 4}', '{"successes": -1}', '{"successes": "4"}', "[" * 9999]
)
def test_statistics_of_another_kind_are_no_whole_file(downloaded, make_config, content):
    (downloaded / "00001_stats.json").write_text(content)
    (line,) = check(downloaded, make_config).incomplete
    assert "00001_stats.json is no whole file" in line


def test_the_check_command_tells_of_them(downloaded, tmp_path):
    (downloaded / "00000_stats.json").write_text('{"count": 9, "successes": 7}')
    result = invoke("check", downloaded, "--processes", 2, "--json", tmp_path / "found.json")
    assert result.exit_code == 0 and "downloads  asked for 21, written 15, failed to download 4" in result.output
    assert "\n  shard " in result.output and "img2dataset wrote 7" in result.output
    assert len(json.loads((tmp_path / "found.json").read_text())["incomplete"]) == 1


def test_processes_find_the_same(faulty, make_config):
    shards, data = expand(str(faulty / "x-*.tar")), make_config(faulty, caption_key="txt")
    one, two = (check_corpus(shards, data, processes=n, progress=False).summary() for n in (1, 2))
    assert one == two


def test_perceptual_hashes_survive_size_and_quality():
    def of(data):
        return perceptual_hash(simplejpeg.decode_jpeg(data))

    assert of(picture(0)) == of(picture(0, (80, 120), 80))
    assert len({of(picture(seed)) for seed in range(20)}) == 20


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_check_command(corpus, tmp_path):
    sheet, found = tmp_path / "sheet.png", tmp_path / "found.json"
    result = invoke("check", corpus / "val-*.tar", "--sheet", sheet, "--json", found, "--processes", 1)
    assert result.exit_code == 0 and "faults  none" in result.output
    assert json.loads(found.read_text())["samples"] == 60
    assert Image.open(sheet).size == (6 * 180, 6 * 244) and np.unique(np.asarray(Image.open(sheet))).size > 100


def test_the_check_command_on_bad_shards_is_an_error(faulty):
    result = invoke("check", faulty / "x-*.tar", "--processes", 1)
    assert isinstance(result.exception, ValueError) and "1 of 3 shards cannot be used" in str(result.exception)
    assert "broken: broken picture" in result.output


def test_a_sheet_shows_faults_too(faulty, tmp_path):
    result = invoke("check", f"{faulty}/x-0.tar::{faulty}/x-1.tar", "--sheet", tmp_path / "sheet.png", "--processes", 1)
    assert result.exit_code == 0
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == (255, 187, 187)).all(axis=2).sum() > 10_000


def test_the_index_command(own_corpus, tmp_path):
    import shutil

    shutil.rmtree(own_corpus / ".vlscale-index", ignore_errors=True)
    first = invoke("index", own_corpus / "train-*.tar", "--processes", 2)
    again = invoke("index", own_corpus / "train-*.tar", "--processes", 1, "--manifest-dir", tmp_path / "elsewhere")
    assert first.exit_code == again.exit_code == 0 and first.output == again.output
    assert "8 shards, 2,000 samples, hash " in first.output
