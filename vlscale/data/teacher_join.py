"""The join of a stream's samples with a teacher cache: by shard and sample key, never by place."""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlscale.data.faults import BadSample
from vlscale.data.manifest import Manifest
from vlscale.data.shard_index import ShardIndex
from vlscale.data.teacher_cache import BadTeacherCache, CacheHeader, ShardFile, ShardHead, caption_check, read_header
from vlscale.data.teacher_files import Place
from vlscale.sections import DataConfig

_OPEN_FILES = 128
_NAMED = 3


class TeacherJoin:
    """Finds rows of one corpus. Keeps the files used last mapped. One a thread or process."""

    def __init__(self, folder: Place, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.header = read_header(self.folder)
        self._open: OrderedDict[int, ShardFile] = OrderedDict()

    def rows(self, shard: int, key: str, captions: list[str], chosen: int) -> tuple[np.ndarray, np.ndarray]:
        """Image row (D,) and row (D_text,) of caption `chosen` of a sample, float32.

        Raises BadSample for a sample that the teachers could not be shown, BadTeacherCache for one they never saw.
        """
        file = self._file(shard)
        row = file.find(key)
        if row is None:
            if file.is_left_out(key):
                raise BadSample("no teacher embedding", "the teachers could not read it")
            raise BadTeacherCache(
                f"teacher cache {self.folder} has no embedding of sample {key!r} of {self.manifest.urls[shard]}; "
                "run the same `vlscale data teach` again"
            )
        checks = file.checks(row)
        expected = len(captions) if self.header.captions == "all" else 1
        if len(checks) != expected or checks[chosen] != caption_check(captions[chosen]):
            raise BadTeacherCache(
                f"teacher cache {self.folder}: sample {key!r} of {self.manifest.urls[shard]} has other captions than "
                f"the teacher was shown ({len(captions)} now, {len(checks)} then); make the cache anew"
            )
        return file.image(row), file.text(row, chosen)

    def _file(self, shard: int) -> ShardFile:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _OPEN_FILES:
            self._open.popitem(last=False)
        try:
            file = ShardFile(self.folder, self.header, self.manifest.digests[shard])
        except FileNotFoundError:
            raise BadTeacherCache(
                f"teacher cache {self.folder} has no file for shard {self.manifest.urls[shard]}; "
                "run the same `vlscale data teach` again"
            ) from None
        self._open[shard] = file
        return file


@dataclass
class Lacking:
    """What a cache lacks of a corpus."""

    shards: list[str] = field(default_factory=list)  # urls of those without a file
    keys: int = 0  # in shards that have a file
    first_keys: list[str] = field(default_factory=list)  # some of them by name
    damaged: list[str] = field(default_factory=list)  # why each file cannot be used

    @classmethod
    def join(cls, parts: list["Lacking"]) -> "Lacking":
        total = cls()
        for part in parts:
            for name, value in vars(part).items():
                setattr(total, name, getattr(total, name) + value)
        return total


def find_lacking(folder: Place, manifest: Manifest, *, part: tuple[int, int] = (0, 1)) -> Lacking:
    """What the cache lacks of shards `part[0]`, `part[0] + part[1]`, ...: each file's head is read, not its rows."""
    header, lacking = read_header(folder), Lacking()
    look = ShardFile if isinstance(folder, Path) else ShardHead  # below an url, no more than heads is fetched
    for shard in range(part[0], len(manifest.urls), part[1]):
        count = int(manifest.counts[shard])
        if count == 0:
            continue
        try:
            file = look(folder, header, manifest.digests[shard])
            if len(file) + file.left_out < count:
                whole = ShardFile(folder, header, manifest.digests[shard])
                missing = _missing_keys(whole, manifest.index(shard))
                lacking.keys += len(missing)
                lacking.first_keys += missing[:_NAMED]
        except FileNotFoundError:
            lacking.shards.append(manifest.urls[shard])
        except BadTeacherCache as error:
            lacking.damaged.append(str(error))
    return lacking


def check_cache(header: CacheHeader, folder: Place, data: DataConfig, manifest: Manifest, lacking: Lacking) -> None:
    """Raises BadTeacherCache for what can be known to be wrong before the first batch."""
    for name, ours, theirs in (
        ("caption_key", data.caption_key, header.caption_key),
        ("image_keys", data.image_keys, header.image_keys),
    ):
        if ours != theirs:
            raise BadTeacherCache(
                f"teacher.cache={folder} was made with {name} {theirs!r}, got data.{name}={ours!r}; "
                "set it alike or make the cache anew"
            )
    if header.captions == "first" and data.captions != "first":
        raise BadTeacherCache(
            f"teacher.cache={folder} holds the first caption of each sample only, got data.captions={data.captions}; "
            "set data.captions=first or make the cache with --captions all"
        )
    if lacking.damaged:
        raise BadTeacherCache(f"{len(lacking.damaged)} bad files in teacher.cache={folder}; {lacking.damaged[0]}")
    if lacking.shards:
        why = (
            "`vlscale data teach` has not finished; run the same command again"
            if header.corpus == manifest.hash
            else f"it was made of another corpus (manifest {header.corpus}, this is {manifest.hash}); teach this one"
        )
        raise BadTeacherCache(
            f"teacher.cache={folder} has no embeddings of {len(lacking.shards)} of {len(manifest.urls)} shards "
            f"({_first(lacking.shards, len(lacking.shards))}): {why}"
        )
    if lacking.keys:
        raise BadTeacherCache(
            f"teacher.cache={folder} lacks {lacking.keys} keys of {manifest.num_samples} samples "
            f"({_first(lacking.first_keys, lacking.keys)}); delete the files of their shards and run the same "
            "`vlscale data teach` again"
        )


def _missing_keys(file: ShardFile, index: ShardIndex) -> list[str]:
    known = set(file.keys())
    keys = (index.key(row) for row in range(len(index)))
    return [key for key in keys if key not in known and not file.is_left_out(key)]


def _first(names: list[str], count: int) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if count > _NAMED else "")
