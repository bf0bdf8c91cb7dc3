"""What the fuzzer hands hostile bytes to: every reader of files that come from outside. See fuzz.py.

A target takes bytes and returns, or raises ValueError: that is how a reader refuses its input, in one line that names
the file. Any other error, a broken invariant (AssertionError) and a hang are findings.
"""

import atexit
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

import torch

from vlscale.config import dump, load_plan, validate
from vlscale.data.faults import BadSample
from vlscale.data.importers import karpathy_items, list_items
from vlscale.data.manifest import build_manifest
from vlscale.data.reader import parse_captions, parse_json
from vlscale.data.shard_index import ROW, ShardIndex, load_summary
from vlscale.data.tar import MemberKeys, index_shard
from vlscale.evaluate import benchmarks, relevance
from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.sections import DataConfig

KEYS = MemberKeys(("jpg", "png"), "json:captions")
BLOCK = 512


@dataclass(frozen=True)
class Target:
    """`seeds`: inputs to begin with; `words`: what a format is made of; `repair`: puts a mutated input's checksums
    right, without which nothing behind them is ever reached."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...] = ()
    repair: Callable[[bytearray], bytearray] = lambda data: data
    named: tuple[str, ...] = ("",)  # a refusal tells one of these


@cache
def place() -> Path:
    """A folder for files that are written anew for every input."""
    folder = Path(tempfile.mkdtemp(prefix="vlscale-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def written(name: str, data: bytes) -> Path:
    path = place() / name
    path.write_bytes(data)
    return path


class MemoryShard:
    def __init__(self, data: bytes):
        self.data, self.size = data, len(data)

    def read(self, start: int, size: int) -> bytes:
        assert start >= 0 and size >= 0 and start + size <= self.size, "a read outside the shard"
        return self.data[start : start + size]

    def close(self) -> None:
        pass


def tar(data: bytes) -> None:
    """The walk over headers, the samples' captions, and the index written and read again."""
    shard = MemoryShard(data)
    index = index_shard(shard, "fuzz.tar", KEYS)
    for number, row in enumerate(index.rows.tolist()):
        image, image_size, text, text_size, *_ = row
        index.key(number).encode("utf-8", "surrogateescape")
        shard.read(image, image_size)
        try:
            parse_captions(parse_json(shard.read(text, text_size)), "captions")
        except BadSample:
            continue
    path = place() / "fuzz.idx"
    index.save(path)
    again = ShardIndex.load(path)
    assert again is not None and again.summary() == index.summary(), "the saved index is another one"


def make_tar(members: list[tuple[str, bytes]]) -> bytes:
    """A plain tar; importing tarfile's would fuzz tarfile."""
    out = bytearray()
    for name, content in members:
        header = bytearray(BLOCK)
        header[: len(name)] = name.encode()
        header[100:108], header[124:136] = b"0000644\0", b"%011o\0" % len(content)
        header[156:157], header[257:265] = b"0", b"ustar\x0000"
        out += header + content + b"\0" * (-len(content) % BLOCK)
    return bytes(repair_tar(out + bytes(2 * BLOCK)))


def repair_tar(data: bytearray) -> bytearray:
    """Every block that calls itself ustar gets its checksum."""
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
    return data


def tar_seeds() -> list[bytes]:
    sample = [("a.jpg", b"\xff\xd8"), ("a.json", b'{"captions": ["x"]}')]
    long_name = make_tar([("././@LongLink", b"d/" * 60 + b"b.jpg\0"), ("b.jpg", b"1")])
    long_name = bytearray(long_name)
    long_name[156:157] = b"L"
    extended = bytearray(make_tar([("p", b"18 path=e/f.json\n20 size=0000000000019\n"), *sample]))
    extended[156:157] = b"x"
    return [make_tar(sample), bytes(repair_tar(long_name)), bytes(repair_tar(extended)), make_tar(sample * 2), b""]


def manifest(data: bytes) -> None:
    """First byte 0: an index file. Else the file that keeps the summaries of all shards, beside a shard that is whole:
    whatever it says, the corpus is the same."""
    if data[:1] == b"\0":
        path = written("fuzz.idx", data[1:])
        index = ShardIndex.load(path)
        if index is not None:
            assert index.digest == load_summary(path).digest
            [index.key(row) for row in range(len(index))]
        return
    shards, truth = _small_corpus()
    folder = Path(shards[0]).parent / "indexes"
    (kept,) = folder.glob("manifest-*.json")
    kept.write_bytes(data[1:])
    found = build_manifest(shards, DataConfig(caption_key="json:captions", manifest_dir=str(folder)))
    assert found.hash == truth, "a damaged manifest file changed the corpus"
    assert found.index(0).digest == found.digests[0]


@cache
def _small_corpus() -> tuple[list[str], str]:
    folder = place() / "corpus"
    folder.mkdir()
    for name in ("one", "two"):
        sample = [(f"{name}.jpg", b"\xff\xd8"), (f"{name}.json", b'{"captions": ["x"]}')]
        (folder / f"{name}.tar").write_bytes(make_tar(sample))
    shards = [str(folder / "one.tar"), str(folder / "two.tar")]
    data = DataConfig(caption_key="json:captions", manifest_dir=str(folder / "indexes"))
    return shards, build_manifest(shards, data).hash


def manifest_seeds() -> list[bytes]:
    shards, _ = _small_corpus()
    folder = Path(shards[0]).parent / "indexes"
    indexes = [b"\0" + path.read_bytes() for path in folder.glob("*.idx")]
    (kept,) = folder.glob("manifest-*.json")
    return [*indexes, b"\1" + kept.read_bytes()]


def repair_index(data: bytearray) -> bytearray:
    """An index file's head gets its digest, its rows theirs."""
    magic = b"vlscale-index-3\n"
    start = 1 + len(magic) + 16
    end = data.find(b"\n", start) + 1
    if data[:1] != b"\0" or end <= 0:
        return data
    try:
        head = json.loads(data[start:end])
        content = head["size"].to_bytes(8, "little") + data[end:]
        head["digest"] = blake2b(content, digest_size=16).hexdigest()
        data[start:end] = json.dumps(head).encode() + b"\n"
        end = data.find(b"\n", start) + 1
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass
    data[1:start] = magic + blake2b(data[start:end], digest_size=16).digest()
    return data


def config(data: bytes) -> None:
    """A config file, then overrides, with NUL between them. What loads is written down and loads again, the same."""
    text, *overrides = data.split(b"\0")
    path = written("fuzz.yaml", text)
    for run in load_plan(path, [override.decode("utf-8", "surrogateescape") for override in overrides]):
        kept = written("fuzz-kept.yaml", dump(run.config).encode())
        (again,) = load_plan(kept)
        assert repr(again.config) == repr(run.config), "the resolved config is another one when it is read"


def config_seeds() -> list[bytes]:
    whole = dump(validate({"data": {"train": "a.tar"}}, "seed"))
    return [
        *(f"{section.strip()}\n".encode() for section in re.split(r"\n(?=\w)", whole)),
        b"train: {max_steps: 3}\nstages:\n  a: {optim: {lr: 1e-3}}\nvariants:\n  b: {model: {init_from: 'stage:a'}}\n",
        b"model: &m {embed_dim: 8}\n\0train.seed=3\0optim.unlock_after={vision: 2}\0data.train=a.tar::b.tar",
        b"base: fuzz-kept.yaml\n",
    ]


def karpathy(data: bytes) -> None:
    for items in karpathy_items(written("fuzz.json", data)).values():
        json.dumps([(item.image, item.captions, item.meta) for item in items])


def lists(data: bytes) -> None:
    for item in list_items(written("fuzz.json", data)):
        json.dumps((item.image, item.captions, item.meta))


def karpathy_seeds() -> list[bytes]:
    entry = {"filename": "a.jpg", "filepath": "val2014", "split": "test", "imgid": 3, "cocoid": 7, "sentids": [1, 2],
             "sentences": [{"raw": "a dog", "tokens": ["a", "dog"]}, {"raw": "x"}]}  # fmt: skip
    return [json.dumps({"images": [entry, entry | {"split": "restval"}]}).encode(), b'{"images": []}']


def list_seeds() -> list[bytes]:
    tables = {"images": [{"id": 1, "file_name": "a.jpg"}],
              "annotations": [{"image_id": 1, "caption": "x", "is_rejected": False}]}  # fmt: skip
    return [
        json.dumps(
            [{"image": "a.jpg", "caption": ["x", "y"], "image_id": "i"}, {"image": "b", "caption": "z"}]
        ).encode(),
        json.dumps(tables).encode(),
    ]


def captions(data: bytes) -> None:
    for caption in parse_captions(parse_json(data), "captions"):
        assert isinstance(caption, str)
        caption.strip().encode("utf-8")


def cxc(data: bytes) -> None:
    path = written("sits_fuzz.csv", data)
    for first, second, score in benchmarks.read_ratings(path):
        assert isinstance(first, int) and isinstance(second, int) and score == score and abs(score) < float("inf")


def relevances(data: bytes) -> None:
    """A list of samples' json, as evaluation takes it: by scenes, by a label, by COCO's numbers."""
    value = json.loads(data)
    meta = [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    count = len(meta)
    if not 0 < count < 20:
        return
    rows, unit = torch.arange(count), torch.ones(count, 1)
    corpus = EmbeddedCorpus([f"k{n}" for n in range(count)], unit, unit, rows, ["x"] * count, meta)
    makers: list[Callable[[], object]] = [
        lambda: relevance.labels(meta, "label", rows).i2i(rows),
        lambda: relevance.scenes(meta, rows).t2t(rows),
        lambda: benchmarks.identify(corpus),
    ]
    for make in makers:
        try:
            make()
        except ValueError as error:
            one_line(error)


def relevance_seeds() -> list[bytes]:
    thing = {"shape": "circle", "colour": "red", "size": "small", "texture": "plain", "place": "top left"}
    sample = {"scene": {"background": "white", "objects": [thing]}, "label": [1], "cocoid": 3, "sentids": [1, 2]}
    return [json.dumps([sample, sample | {"cocoid": 4, "label": "a"}]).encode()]


def one_line(error: ValueError) -> None:
    """A user's error is one line."""
    assert str(error) and "\n" not in str(error), f"a refusal of more than one line: {error!r}"


NAMES = ("raw", "images", "sentences", "split", "restval", "filename", "filepath", "cocoid", "caption", "captions",
         "image", "annotations", "image_id", "file_name", "is_rejected")  # fmt: skip
JSON = (b"null", b"true", b"NaN", b"1e999", b"-0", b"[[", b"{}", b'"\\ud800"', b'"\\u0000"', b"[]", b'""')
TOKENS = (*(f'"{name}"'.encode() for name in NAMES), *JSON)
YAML = (b"base: ", b"stages:\n", b"variants:\n", b"train: ", b"data: ", b"model_type: ", b"&a ", b"*a", b"<<: ",
        b"!!int ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!float .nan", b".inf", b"? ", b"- ", b"\xef\xbb\xbf",
        b"\0", b"2024-99-99", b"1_000", b"0x", b"%YAML 1.1\n---\n", b"...\n", b"null",
        b"!!python/object/apply:os.system ",
        b"max_steps: ", b"global_batch_size: ", b"config: {model_type: vit}", b"optim.lr=", b"train.seed=")  # fmt: skip
SCENE = (
    b'"scene"',
    b'"objects"',
    b'"background"',
    b'"label"',
    b'"sentids"',
    b'"shape"',
    b'"circle"',
    b'"place"',
    *TOKENS,
)
INDEX = (b'"size"', b'"count"', b'"digest"', b'"skipped"', b'"named"', b'"version"', b"@/", b"one.tar", b"\n",
         struct.pack("<Q", 2**63), bytes(ROW.itemsize), *JSON)  # fmt: skip
PAX = (b"ustar\x0000", b"path=", b"size=", b"a.json", b"a.jpg", b"././@LongLink", b"\x80\0\0\0\0\0\0\0\0\0\0\1",
       b"77777777777\0", b"30 path=", b"GNU.sparse.size=")  # fmt: skip

TARGETS = {
    "tar": Target(tar, tar_seeds, PAX, repair_tar, ("fuzz.tar",)),
    "manifest": Target(manifest, manifest_seeds, INDEX, repair_index),
    "config": Target(config, config_seeds, YAML, named=("fuzz.yaml", "fuzz-kept.yaml", "override")),
    "karpathy": Target(karpathy, karpathy_seeds, TOKENS, named=("fuzz.json",)),
    "lists": Target(lists, list_seeds, TOKENS, named=("fuzz.json",)),
    "captions": Target(captions, lambda: [b'{"captions": ["a", "b"]}', b'{"captions": "a"}'], TOKENS),
    "cxc": Target(
        cxc,
        lambda: [b"image1,caption1,agg_score\nCOCO_val2014_000000000042.jpg,COCO_val2014:7,4.5\n"],
        (b"agg_score", b"nan", b"inf", b'"', b"\r", b"\xef\xbb\xbf", b",,", b"1_0", b"\xd9\xa3"),
        named=("sits_fuzz.csv",),
    ),
    "relevance": Target(relevances, relevance_seeds, SCENE),
}


def check(name: str, data: bytes) -> None:
    """Runs a target; a refusal in one line, which names what is wrong, is right."""
    try:
        TARGETS[name].run(data)
    except ValueError as error:
        one_line(error)
        assert any(word in str(error) for word in TARGETS[name].named), f"a refusal that names no file: {error!r}"
