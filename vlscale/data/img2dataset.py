"""What img2dataset says of a shard: `NNNNN_stats.json` beside `NNNNN.tar`, written once the tar is closed."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vlscale.data.storage import path_of, scheme_of

SUFFIX = "_stats.json"
COUNTS = {  # of the file -> in words
    "count": "asked for",
    "successes": "written",
    "failed_to_download": "failed to download",
    "failed_to_resize": "failed to resize",
}


def beside(shard: str) -> Path | None:
    """Where the shard's statistics would be; None for what img2dataset does not write here: a number and `.tar`."""
    if scheme_of(shard) not in (None, "file"):
        return None
    path = Path(path_of(shard))
    return path.with_name(path.stem + SUFFIX) if path.suffix == ".tar" and path.stem.isdigit() else None


def folders_with_statistics(shards: Iterable[str]) -> set[Path]:
    """Those of the shards' folders in which any shard has statistics."""
    folders = {path.parent for path in map(beside, shards) if path is not None}
    return {folder for folder in folders if next(folder.glob(f"*{SUFFIX}"), None) is not None}


def read_statistics(path: Path) -> Counter | None:
    """The counts in words; None for a file that is not there, half-written, or of something else."""
    try:
        values = json.loads(path.read_bytes())
        counts = Counter({words: values[name] for name, words in COUNTS.items() if name in values})
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    whole = all(isinstance(number, int) and number >= 0 for number in counts.values())
    return counts if whole and COUNTS["successes"] in counts else None


def remark(statistics: Path, samples: int | None) -> str | None:
    """What is to be said of a shard beside its other faults; None where all is as img2dataset wrote it. `statistics`:
    where they would be, in a folder with some; `samples`: of the tar, None where that is cut short."""
    name, counts = statistics.name, read_statistics(statistics)
    if counts is None:
        lacks = "is no whole file" if statistics.exists() else "is not there, as others are"
        finished = "did not finish it" if samples is None else "may not have finished it"
        return f"img2dataset {finished} ({name} {lacks}); run it again"
    written = counts[COUNTS["successes"]]
    again = f"copy it again, or delete {name} and run img2dataset again"
    if samples is None:
        return f"img2dataset wrote {written:,} samples into it; {again}"
    return None if samples == written else f"it holds {samples:,} samples, img2dataset wrote {written:,}; {again}"
