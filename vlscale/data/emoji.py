"""An emoji corpus from its public sources: pictures of Noto Emoji, names and keywords of Unicode CLDR.

A sample is one emoji: its picture on white, its English name and keywords as captions, its names in other languages,
its group and subgroup, and as `concept` its code points without skin tones, which variants share.
"""

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlscale.data.folders import new_folder
from vlscale.data.keyed import hash64
from vlscale.data.writer import write_shard
from vlscale.progress import Progress

LANGUAGES = ("de", "fr", "es")
_PICTURES = "emoji_u*.png"
_PRESENTATION = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_HELD_OUT = 5  # one of so many is in the val part
_QUALITY = 92
_SHARD_SIZE = 250

Points = tuple[int, ...]  # code points, without the presentation selector


@dataclass(frozen=True)
class EmojiCount:
    train: int
    val: int
    unknown: int  # pictures that the texts do not name


def import_emoji(png_dir: str | Path, cldr_dir: str | Path, out: str | Path, *, progress: bool = True) -> EmojiCount:
    """Writes `out/emoji-train-*.tar` and `out/emoji-val-*.tar`; which part an emoji is in depends on itself alone."""
    pictures = find_pictures(Path(png_dir))
    groups = read_groups(_one_file(Path(cldr_dir), "emoji-test.txt", "emoji data (emoji-test.txt)"))
    english = read_annotations(Path(cldr_dir), "en")
    if not english:
        raise ValueError(f"{cldr_dir} holds no annotations/en.xml; expected a checkout of Unicode CLDR")
    others = {language: read_annotations(Path(cldr_dir), language) for language in LANGUAGES}
    known = [points for points in pictures if points in groups and points in english and english[points][0]]
    if not known:
        raise ValueError(
            f"none of the {len(pictures)} pictures in {png_dir} has a name in {cldr_dir} and a group in emoji-test.txt"
        )
    order = sorted(known, key=lambda points: hash64("emoji", key_of(points)))
    parts = {"train": [p for p in order if not held_out(p)], "val": [p for p in order if held_out(p)]}
    with new_folder(out) as folder, Progress("importing emoji", len(known), "pictures", shown=progress) as bar:
        for split, part in parts.items():
            for number, first in enumerate(range(0, len(part), _SHARD_SIZE)):
                some = part[first : first + _SHARD_SIZE]
                samples = (
                    _sample(points, pictures[points], groups[points], english[points], others) for points in some
                )
                bar.advance(write_shard(folder / f"emoji-{split}-{number:06d}.tar", samples))
    return EmojiCount(len(parts["train"]), len(parts["val"]), len(pictures) - len(known))


def key_of(points: Iterable[int]) -> str:
    return "_".join(f"{point:x}" for point in points)


def concept_of(points: Points) -> str:
    """The key without skin tones."""
    return key_of(point for point in points if point not in _SKIN_TONES)


def held_out(points: Points) -> bool:
    return hash64("emoji split", key_of(points)) % _HELD_OUT == 0


def find_pictures(folder: Path) -> dict[Points, Path]:
    """Pictures of a folder, or of `png/128` below a checkout's root, by code points."""
    for place in (folder, folder / "png" / "128", folder / "128"):
        found = sorted(place.glob(_PICTURES)) if place.is_dir() else []
        if found:
            names = ((path.stem.removeprefix("emoji_u").split("_"), path) for path in found)
            return {_points(int(part, 16) for part in parts): path for parts, path in names if _is_hex(parts)}
    raise ValueError(f"{folder} holds no {_PICTURES}; expected a checkout of Noto Emoji, or its folder png/128")


def read_groups(path: Path) -> dict[Points, tuple[str, str]]:
    """(group, subgroup) of every fully qualified emoji in emoji-test.txt."""
    groups: dict[Points, tuple[str, str]] = {}
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif "; fully-qualified" in line:
            groups[_points(int(part, 16) for part in line.split(";")[0].split())] = group, subgroup
    return groups


def read_annotations(folder: Path, language: str) -> dict[Points, tuple[str, str]]:
    """(name, keywords) by code points, from `annotations` and `annotationsDerived`, below `folder` or its `common`."""
    names: dict[Points, list[str]] = {}
    for part in ("annotations", "annotationsDerived"):
        for root in (folder, folder / "common"):
            path = root / part / f"{language}.xml"
            if path.is_file():
                _read_annotation_file(path, names)
    return {points: tuple(texts) for points, texts in names.items()}


def _read_annotation_file(path: Path, names: dict[Points, list[str]]) -> None:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not valid XML: {error}; expected a file of Unicode CLDR") from None
    for element in root.iter("annotation"):
        texts = names.setdefault(_points(map(ord, element.get("cp", ""))), ["", ""])
        if element.get("type") == "tts":
            texts[0] = (element.text or "").strip()
        else:
            texts[1] = ", ".join(word.strip() for word in (element.text or "").split("|") if word.strip())


def _sample(points: Points, path: Path, group: tuple[str, str], english: tuple[str, str], others: dict) -> dict:
    name, keywords = english
    captions = [name, keywords] if keywords else [name]
    return {
        "__key__": key_of(points),
        "jpg": _on_white(path),
        "txt": name,
        "json": {
            "captions": captions,
            "names": {language: texts[points][0] for language, texts in others.items() if texts.get(points, ("",))[0]},
            "group": group[0],
            "subgroup": group[1],
            "concept": concept_of(points),
        },
    }


def _on_white(path: Path) -> bytes:
    try:
        picture = Image.open(path).convert("RGBA")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    white = Image.new("RGBA", picture.size, "white")
    out = io.BytesIO()
    Image.alpha_composite(white, picture).convert("RGB").save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()


def _points(points: Iterable[int]) -> Points:
    return tuple(point for point in points if point != _PRESENTATION)


def _is_hex(parts: list[str]) -> bool:
    return all(part and all(letter in "0123456789abcdefABCDEF" for letter in part) for part in parts)


def _one_file(folder: Path, name: str, what: str) -> Path:
    found = min(folder.rglob(name), default=None) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"{folder} holds no {what}; put the file into that folder")
    return found
