"""Damaged shards: no crash, no hang, no growth of memory, every loss counted and named, the same outcome each time.

    python benchmarks/data_fuzz.py [--shards 2000] [--write]

`--write` keeps the table of outcomes, dated, in benchmarks/results/.
"""

import argparse
import hashlib
import io
import json
import logging
import random
import struct
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL import Image

from vlscale.data.faults import BadSample, BadShard
from vlscale.data.images import ImageSpec, decode_eval
from vlscale.data.manifest import Manifest, build_manifest
from vlscale.data.reader import SampleReader
from vlscale.sections import DataConfig

SAMPLES = 6  # of a shard
SPEC = ImageSpec(24, (0.5,) * 3, (0.5,) * 3)
DATA = DataConfig(caption_key="json:captions", max_pixels=4_000_000)
Members = list[tuple[str, bytes]]


@dataclass
class Outcome:
    """What reading one shard came to."""

    refused: str | None = None  # why the whole shard is bad
    good: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # "key: fault"


def examine(path: Path, indexes: Path) -> Outcome:
    """Indexes the shard, reads every sample and decodes every picture, as evaluation does."""
    outcome = Outcome()
    data = DATA.model_copy(update={"manifest_dir": str(indexes)})
    try:
        manifest = build_manifest([str(path)], data)
        outcome.lost += manifest.index(0).named
        _read_all(manifest, data, outcome)
    except BadShard as error:
        outcome.refused = str(error)
    except ValueError as error:
        if "hold no sample" not in str(error):
            raise
        outcome.refused = str(error)
    return outcome


def _read_all(manifest: Manifest, data: DataConfig, outcome: Outcome) -> None:
    reader = SampleReader(manifest, data)
    for row in range(manifest.num_samples):
        try:
            sample = reader.read(0, row, with_json=True)
            picture = decode_eval(sample.image, SPEC, data.max_pixels)
            outcome.good.append(f"{sample.key} {hashlib.sha256(picture.tobytes()).hexdigest()[:8]} {sample.captions}")
        except BadSample as fault:
            outcome.lost.append(f"{reader.key(0, row)}: {fault}")
    reader.close()


def whole_members(dice: random.Random) -> Members:
    """Samples of all picture formats."""
    members: Members = []
    for number in range(SAMPLES):
        out = io.BytesIO()
        colour = tuple(dice.randrange(256) for _ in range(3))
        Image.linear_gradient("L").resize((40, 30)).convert("RGB").point(lambda v, c=colour: v ^ c[0]).save(
            out, ("JPEG", "PNG", "WEBP")[number % 3]
        )
        members.append((f"s{number}.{('jpg', 'png', 'webp')[number % 3]}", out.getvalue()))
        members.append((f"s{number}.json", json.dumps({"captions": [f"picture {number}", "ein Käfer"]}).encode()))
    return members


def to_tar(members: Members) -> bytearray:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return bytearray(out.getvalue())


def flip_bits(dice: random.Random, members: Members) -> bytes:
    tar = to_tar(members)
    for _ in range(dice.choice([1, 5, 50])):
        tar[dice.randrange(len(tar))] ^= 1 << dice.randrange(8)
    return tar


def cut_end(dice: random.Random, members: Members) -> bytes:
    tar = to_tar(members)
    return tar[: dice.randrange(len(tar.rstrip(b"\0")))]


def cut_start(dice: random.Random, members: Members) -> bytes:
    return to_tar(members)[dice.randrange(1, 3000) :]


def wrong_header(dice: random.Random, members: Members) -> bytes:
    """Any bytes in a header, with a checksum that is right."""
    tar = to_tar(members)
    headers = [at for at in range(0, len(tar), 512) if tar[at + 257 : at + 262] == b"ustar"]
    at = dice.choice(headers)
    for _ in range(dice.choice([1, 4, 12])):
        place = dice.choice([*range(100, 148), 156, *range(157, 265), *range(124, 136), *range(124, 136)])
        tar[at + place] = dice.choice([0, 32, 48, 55, 57, 120, 128, 255, dice.randrange(256)])
    return _check_header(tar, at)


def absurd_size(dice: random.Random, members: Members) -> bytes:
    tar = to_tar(members)
    at = dice.choice([at for at in range(0, len(tar), 512) if tar[at + 257 : at + 262] == b"ustar"])
    binary = b"\x80" + dice.randbytes(3) + struct.pack(">Q", dice.getrandbits(63))
    tar[at + 124 : at + 136] = dice.choice(
        [b"77777777777\0", binary, b"-0000000001\0", b"zzzzzzzzzzz\0", b"\xff" * 12, b"00000000000\0"]
    )
    return _check_header(tar, at)


def path_tricks(dice: random.Random, members: Members) -> bytes:
    names = [
        "../../etc/s9",
        "/abs/s9",
        "a/../s9",
        "s9\udcff\udcfe",
        "s\n9",
        "s9" * 400,
        "c:\\s9",
        "\u202es9",
        "..",
        "a//s9",
        "%s9%n",
    ]
    name = dice.choice(names)
    return to_tar([*members[:4], (f"{name}.jpg", members[0][1]), (f"{name}.json", members[1][1]), *members[4:]])


def pickles(dice: random.Random, members: Members) -> bytes:
    evil = b"cos\nsystem\n(S'exit 3'\ntR."
    return to_tar([*members[:2], (f"s0.{dice.choice(['pyd', 'pickle', 'pth', 'x.pkl', 'PT'])}", evil), *members[2:]])


def bombs(dice: random.Random, members: Members) -> bytes:
    """Pictures that are small as files and huge, or endless, when unpacked."""
    side = dice.choice([5_000, 60_000, 2**31 - 1])
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0" * 2_000_000))
        + _chunk(b"IEND", b"")
    )
    jpeg = bytearray(members[0][1])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", min(side, 65_535), min(side, 65_535))
    text = png[:33] + _chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 60_000_000)) + png[33:]
    gif = (
        b"GIF89a"
        + struct.pack("<HH", 65_535, 65_535)
        + b"\xf0\0\0"
        + b"\0" * 6
        + b",\0\0\0\0"
        + struct.pack("<HH", 65_535, 65_535)
        + b"\0\2\1\0;"
    )
    tiff = (
        b"II*\0\x08\0\0\0\2\0\0\1\4\0\1\0\0\0"
        + struct.pack("<I", side)
        + b"\1\1\4\0\1\0\0\0"
        + struct.pack("<I", side)
        + b"\0" * 4
    )
    return to_tar([("s0.jpg", dice.choice([png, bytes(jpeg), text, gif, tiff])), *members[1:]])


def broken_json(dice: random.Random, members: Members) -> bytes:
    captions = [b"3", b"[3]", b"[]", b'[""]', b'["\\ud800"]', b'"\xff"', b'{"a": 1}', b'["x"], "captions": 1', b"null"]
    texts = [b'{"captions": ' + caption + b"}" for caption in captions]
    texts += [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"NaN",
        b"9" * 10_000,
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"\xff\xfe{\0}\0",
    ]
    texts.append(b'{"captions": ["' + b"a" * 3_000_000 + b'"]}')
    return to_tar([members[0], ("s0.json", dice.choice(texts)), *members[2:]])


def broken_picture(dice: random.Random, members: Members) -> bytes:
    number = dice.randrange(SAMPLES)
    content = bytearray(members[2 * number][1])
    how = dice.randrange(4)
    if how == 0:
        content = content[: dice.randrange(len(content))]
    elif how == 1:
        content = bytearray(dice.randbytes(dice.randrange(2000)))
    elif how == 2:
        content = content[:2] + dice.randbytes(dice.randrange(200)) + content[2:]
    else:
        for _ in range(20):
            content[dice.randrange(len(content))] = dice.randrange(256)
    return to_tar([*members[: 2 * number], (members[2 * number][0], bytes(content)), *members[2 * number + 1 :]])


def lost_and_doubled(dice: random.Random, members: Members) -> bytes:
    changed = list(members)
    for _ in range(dice.choice([1, 3])):
        changed.pop(dice.randrange(len(changed)))
    changed.insert(dice.randrange(len(changed)), dice.choice(changed))
    return to_tar(changed)


DAMAGES: list[Callable[[random.Random, Members], bytes]] = [
    flip_bits, cut_end, cut_start, wrong_header, absurd_size, path_tricks, pickles, bombs, broken_json, broken_picture,
    lost_and_doubled,
]  # fmt: skip


def run(shards: int, folder: Path, seed: int = 0) -> dict:
    """Makes and examines damaged shards, each twice (with a fresh index, and with the saved one)."""
    process, counts, slowest = psutil.Process(), Counter(), 0.0
    memory = 0
    for number in range(shards):
        dice = random.Random(f"{seed} {number}")
        damage = DAMAGES[number % len(DAMAGES)]
        path = folder / f"{number}.tar"
        path.write_bytes(damage(dice, whole_members(dice)))
        start = time.perf_counter()
        first, again = (examine(path, folder / "indexes") for _ in range(2))
        slowest = max(slowest, time.perf_counter() - start)
        if first != again:
            raise AssertionError(f"shard {number} ({damage.__name__}) was read in two ways: {first} and {again}")
        may_vanish = {cut_start: SAMPLES, lost_and_doubled: 2}.get(damage, 0)
        if first.refused is None and len(first.good) + len(first.lost) < SAMPLES - may_vanish:
            raise AssertionError(f"shard {number} ({damage.__name__}): samples are gone that nothing names: {first}")
        counts[f"{damage.__name__}: {'refused' if first.refused else 'lost' if first.lost else 'whole'}"] += 1
        path.unlink()
        if number == shards // 4:
            memory = process.memory_info().rss
    return {
        "shards": shards,
        "outcomes": dict(sorted(counts.items())),
        "slowest_seconds": round(slowest, 2),
        "memory_growth_mb": round((process.memory_info().rss - memory) / 1e6, 1),
    }


def as_page(found: dict, about: str) -> str:
    outcomes = "".join(f"| {' | '.join(name.split(': '))} | {count} |\n" for name, count in found["outcomes"].items())
    return (
        f"# Damaged shards\n\n{about}\n\nEach of {found['shards']} shards was read twice, with a new index and with "
        f"the saved one, with the same outcome, in {found['seconds']} seconds; the slowest took "
        f"{found['slowest_seconds']} s, and the process grew by {found['memory_growth_mb']} MB after "
        "the first quarter. Refused: the whole shard, by name. Lost: some of its samples, each by name and reason.\n\n"
        f"| damage | outcome | shards |\n| --- | --- | ---: |\n{outcomes}"
    )


def _check_header(tar: bytearray, at: int) -> bytearray:
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return tar


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


if __name__ == "__main__":
    from common import RESULTS, provenance, today

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/")
    given = parser.parse_args()
    logging.getLogger("vlscale").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = run(given.shards, Path(folder)) | {"seconds": round(time.perf_counter() - start)}
    command = f"python benchmarks/data_fuzz.py --shards {given.shards}" + " --write" * given.write
    page = as_page(found, provenance(command))
    print(page)
    if given.write:
        (RESULTS / f"{today()}-data-fuzz.md").write_text(page)
