"""Teacher rows on disk and their join: by key whatever the order of the rows, at any number of ranks and workers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vlscale.data.faults import BadSample
from vlscale.data.keyed import hash64, uniforms
from vlscale.data.samples import open_corpus, read_manifest
from vlscale.data.shard_index import ShardIndex
from vlscale.data.teacher_cache import (
    BadTeacherCache,
    CacheHeader,
    ShardFile,
    TeacherFacts,
    TeacherRows,
    read_header,
    shard_file,
    write_shard_file,
)
from vlscale.data.teacher_join import Lacking, TeacherJoin, check_cache, find_lacking
from vlscale.sections import DataConfig

IMAGE, TEXT = 6, 4  # widths


def facts(width: int) -> TeacherFacts:
    return TeacherFacts("teachers/t", "weights", "preprocessing", width)


def header(corpus: str = "", **changes) -> CacheHeader:
    given = {
        "image": facts(IMAGE), "text": facts(TEXT), "dtype": "fp16", "compute": "fp32", "captions": "all",
        "caption_key": "json:captions", "image_keys": ["jpg", "jpeg", "png", "webp"], "corpus": corpus,
    }  # fmt: skip
    return CacheHeader(**{**given, **changes})


def row(name: str, width: int) -> np.ndarray:
    """What the teacher says of `name`, a key or a caption."""
    values = uniforms(hash64(name), width).astype(np.float32) - 0.5
    return values / np.linalg.norm(values)


def rows_of(samples, left_out: tuple[str, ...] = (), lost: tuple[str, ...] = ()) -> TeacherRows:
    kept = [s for s in samples if s.key not in (*left_out, *lost)]
    text = [row(caption, TEXT) for s in kept for caption in s.captions]
    image = np.array([row(s.key, IMAGE) for s in kept]).reshape(-1, IMAGE)
    return TeacherRows(
        [s.key for s in kept], [s.captions for s in kept], image, np.array(text).reshape(-1, TEXT), list(left_out)
    )


def write_cache(folder: Path, data, dtype: str = "fp16", **changes) -> None:
    manifest = open_corpus(data.train, data)
    told = header(manifest.hash, dtype=dtype)
    told.save(folder)
    samples = list(read_manifest(manifest, data))
    for shard, count in enumerate(manifest.counts.tolist()):
        own, samples = samples[:count], samples[count:]
        options = {name: tuple(key for key in keys if key in {s.key for s in own}) for name, keys in changes.items()}
        write_shard_file(folder, told, manifest.digests[shard], manifest.urls[shard], rows_of(own, **options))


@pytest.fixture(scope="module")
def cache(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    write_cache(folder, DataConfig(train=[str(corpus / "train-*.tar")], caption_key="json:captions"))
    return folder


@pytest.fixture
def manifest(corpus, make_config):
    data = make_config(corpus)
    return open_corpus(data.train, data)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2)])
def test_batches_carry_the_rows_of_their_own_samples(run_stream, corpus, cache, make_config, world_size, workers):
    data = make_config(corpus, workers=workers)
    for ranks in run_stream(3, world_size, data=data, teacher_cache=str(cache))[0]:
        for batch in ranks:
            image = np.array([row(key, IMAGE) for key in batch.keys])
            text = np.array([row(caption, TEXT) for caption in batch.captions])
            assert batch.teacher_image.dtype == batch.teacher_text.dtype == torch.float32
            np.testing.assert_allclose(batch.teacher_image, image, atol=3e-4)
            np.testing.assert_allclose(batch.teacher_text, text, atol=3e-4)


def test_without_a_cache_there_are_no_rows(run_stream, keys_of, cache):
    plain, joined = (run_stream(2, teacher_cache=place)[0] for place in (None, str(cache)))
    assert plain[0][0].teacher_image is None and plain[0][0].teacher_text is None
    assert keys_of(plain) == keys_of(joined)


def test_a_cache_serves_its_shards_in_any_order_and_place(run_stream, own_corpus, cache, make_config):
    chosen = [str(own_corpus / f"train-{number:06d}.tar") for number in (5, 2)]
    moved = shutil.move(chosen[0], own_corpus / "moved.tar")
    data = make_config(own_corpus, train=[str(moved), chosen[1]])
    (batch,) = run_stream(1, data=data, teacher_cache=str(cache))[0][0]
    np.testing.assert_allclose(batch.teacher_image, np.array([row(key, IMAGE) for key in batch.keys]), atol=3e-4)
    assert find_lacking(cache, open_corpus(data.train, data)) == Lacking()


def test_bfloat16_is_what_torch_rounds_to(tmp_path):
    from safetensors import safe_open

    told, rows = header(dtype="bf16"), np.array([row(str(i), IMAGE) for i in range(40)])
    text = np.array([row(str(i), TEXT) for i in range(40)])
    keys = [f"key-{i}" for i in range(40)]
    write_shard_file(tmp_path, told, "d1", "a.tar", TeacherRows(keys, [[key] for key in keys], rows, text, []))
    file = ShardFile(tmp_path, told, "d1")
    expected = torch.from_numpy(rows).bfloat16().float().numpy()
    for i, key in enumerate(keys):
        assert np.array_equal(file.image(file.find(key)), expected[i])
    with safe_open(tmp_path / "d1.safetensors", "pt") as theirs:
        assert theirs.get_tensor("image").dtype == torch.bfloat16
    assert sorted(file.keys()) == sorted(keys) and file.find("key-40") is None


def test_samples_that_the_teachers_could_not_be_shown_are_skipped_as_bad(run_stream, corpus, make_config, tmp_path):
    data = make_config(corpus)
    keys = run_stream(1, data=data)[0][0][0].keys
    write_cache(tmp_path, data, left_out=tuple(keys[:2]))
    (batch,) = run_stream(1, data=data, teacher_cache=str(tmp_path))[0][0]
    assert batch.skipped == 2 and not set(keys[:2]) & set(batch.keys)
    manifest = open_corpus(data.train, data)
    assert find_lacking(tmp_path, manifest) == Lacking()
    shard = next(s for s in range(8) if keys[0] in index_keys(manifest.index(s)))
    with pytest.raises(BadSample, match="no teacher embedding: the teachers could not read it"):
        TeacherJoin(tmp_path, manifest).rows(shard, keys[0], ["a"], 0)


def index_keys(index: ShardIndex) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def test_missing_keys_are_counted_and_named_before_training_and_end_it(run_stream, corpus, make_config, tmp_path):
    data = make_config(corpus)
    lost = run_stream(1, data=data)[0][0][0].keys[:5]
    write_cache(tmp_path, data, lost=tuple(lost))
    manifest = open_corpus(data.train, data)
    lacking = Lacking.join([find_lacking(tmp_path, manifest, part=(rank, 3)) for rank in range(3)])
    assert lacking.keys == 5 and len(lacking.shards) == 0
    with pytest.raises(BadTeacherCache, match=r"lacks 5 keys of 2000 samples \((\S+), (\S+), (\S+), \.\.\.\)") as error:
        check_cache(read_header(tmp_path), tmp_path, data, manifest, lacking)
    assert sum(key in str(error.value) for key in lost) == 3
    for workers in (0, 1):
        with pytest.raises(BadTeacherCache, match="has no embedding of sample"):
            run_stream(2, data=make_config(corpus, workers=workers), teacher_cache=str(tmp_path))


def test_a_sample_with_other_captions_than_the_teacher_read_ends_the_run(cache, manifest, corpus, make_config):
    data = make_config(corpus)
    sample, join = next(read_manifest(manifest, data)), TeacherJoin(cache, manifest)
    join.rows(0, sample.key, sample.captions, 1)
    for captions in (sample.captions[::-1], sample.captions[:-1]):
        with pytest.raises(BadTeacherCache, match="has other captions than the teacher was shown"):
            join.rows(0, sample.key, captions, 0)


def test_a_first_caption_cache_needs_first_captions(corpus, manifest, make_config, tmp_path):
    told, data = header(captions="first"), make_config(corpus)
    told.save(tmp_path)
    with pytest.raises(BadTeacherCache, match=r"set data\.captions=first or make the cache with --captions all"):
        check_cache(told, tmp_path, data, manifest, Lacking())
    check_cache(told, tmp_path, make_config(corpus, captions="first"), manifest, Lacking())


def test_files_of_another_teacher_and_damaged_ones_are_named(cache, manifest, tmp_path):
    folder = Path(shutil.copytree(cache, tmp_path / "own"))
    path = shard_file(folder, manifest.digests[3])
    whole = path.read_bytes()
    told = read_header(folder)
    for name in ("image", "text"):
        other = header(**{name: TeacherFacts("elsewhere", "other weights", "preprocessing", IMAGE)})
        with pytest.raises(BadTeacherCache, match=r"was made by another teacher or preprocessing than header\.json"):
            ShardFile(folder, other, manifest.digests[3])
    size = int.from_bytes(whole[:8], "little")
    no_object = whole[:8] + json.dumps(json.loads(whole[8 : 8 + size]) | {"__metadata__": 3}).encode().ljust(size)
    square = whole[: 8 + size].replace(b'"shape": [270]', b'"shape": [[]] ', 1) + whole[8 + size :]
    damages = (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * 9 + whole[9:], whole.replace(b"I64", b"I32"))
    for damage in (*damages, no_object + whole[8 + size :], square):
        path.write_bytes(damage)
        with pytest.raises(BadTeacherCache, match=r"is damaged \(.*delete it and run the same"):
            ShardFile(folder, told, manifest.digests[3])
        assert len(find_lacking(folder, manifest).damaged) == 1
    shutil.copy(shard_file(folder, manifest.digests[2]), path)
    with pytest.raises(BadTeacherCache, match="do not fit together"):
        ShardFile(folder, told, manifest.digests[3])
    path.unlink()
    assert find_lacking(folder, manifest).shards == [manifest.urls[3]]


def test_rows_that_are_not_of_length_one_are_damage(tmp_path):
    for digest, value in (("zero", 0.0), ("nan", np.nan)):
        rows = TeacherRows(["a"], [["b"]], np.full((1, IMAGE), value, np.float32), np.ones((1, TEXT), np.float32), [])
        write_shard_file(tmp_path, header(), digest, "a.tar", rows)
        with pytest.raises(BadTeacherCache, match=r"image row 0 has length (0|nan), expected 1"):
            ShardFile(tmp_path, header(), digest).image(0)


def test_two_samples_of_one_key_in_a_shard_are_refused(tmp_path):
    rows = TeacherRows(["a", "b", "a"], [["x"]] * 3, np.ones((3, IMAGE)), np.ones((3, TEXT)), [])
    with pytest.raises(ValueError, match=r"shard a.tar has two samples with the key 'a'"):
        write_shard_file(tmp_path, header(), "d", "a.tar", rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no teacher cache"),
        ("{", "damaged or of another version"),
        ("[]", "damaged or of another version"),
        ('{"format": "vlscale teacher cache 1"}', "damaged or of another version"),
    ],
)
def test_a_header_that_is_none_is_told(tmp_path, content, said):
    if content is not None:
        (tmp_path / "header.json").write_text(content)
    with pytest.raises(BadTeacherCache, match=said):
        read_header(tmp_path)


def test_widths_of_zero_are_refused(tmp_path):
    header(image=facts(0)).save(tmp_path)
    with pytest.raises(BadTeacherCache, match=r"says widths 0 \(image\) and 4 \(text\): expected above 0"):
        read_header(tmp_path)


def test_a_shard_of_many_rows_is_mapped_and_not_read(tmp_path):
    """A file of 40 MB, of which one row is asked for, costs a small part of it."""
    import tracemalloc

    told, n = header(image=facts(1024)), 20_000
    image = np.zeros((n, 1024), np.float32)
    image[:, 0] = 1
    keys = [f"{i:05d}" for i in range(n)]
    text = np.tile(row("t", TEXT), (n, 1))
    write_shard_file(tmp_path, told, "big", "a.tar", TeacherRows(keys, [[key] for key in keys], image, text, []))
    tracemalloc.start()
    file = ShardFile(tmp_path, told, "big")
    assert file.image(file.find("19999"))[0] == 1
    assert tracemalloc.get_traced_memory()[1] < 100_000 < shard_file(tmp_path, "big").stat().st_size / 100
    tracemalloc.stop()
