"""The synthetic corpus: procedural scenes as webdataset shards, made in parallel, a pure function of its config.

Scenes depend on the seed alone, so presets of one seed show the same scenes with other pictures or captions.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import simplejpeg

from vlscale.data.folders import new_folder
from vlscale.data.processes import core_count, in_processes
from vlscale.data.scene_captions import tell
from vlscale.data.scene_pictures import draw_picture
from vlscale.data.scenes import ATTRIBUTES, Draw, draw_scene
from vlscale.data.writer import write_shard
from vlscale.progress import Progress

CAPTIONS = 5
_QUALITY = 92
_WORTH_PROCESSES = 4000  # pairs below which starting processes costs more than it saves


@dataclass(frozen=True)
class SynthConfig:
    pairs: int = 12_000  # training pairs
    val_pairs: int = 1_000
    preset: str = "clean"
    caption_dropout: float = 0.1  # chance that an attribute is left out of a mention
    never_said: tuple[str, ...] = ()  # attributes that no caption mentions
    caption_noise: float = 0.0  # chance that an attribute is said wrongly
    occlusion: float = 0.0  # share of the picture that is covered
    blur: float = 0.0  # sigma, in 32nds of the side
    resolution: int = 32
    seed: int = 0
    shard_size: int = 1_000

    def __post_init__(self):
        for name in ("caption_dropout", "caption_noise", "occlusion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; expected a number from 0 to 1")
        for name, least in (
            ("pairs", 1),
            ("val_pairs", 0),
            ("resolution", 8),
            ("shard_size", 1),
            ("seed", 0),
            ("blur", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; expected at least {least}")
        unknown = [name for name in self.never_said if name not in ATTRIBUTES]
        if unknown:
            raise ValueError(f"never_said: unknown attribute {unknown[0]!r}; choose from: {', '.join(ATTRIBUTES)}")


PRESETS: dict[str, dict] = {
    "clean": {},
    "text-noisy": {"caption_dropout": 0.4, "caption_noise": 0.25},
    "text-generic": {"caption_dropout": 0.25, "never_said": ("shape", "size", "texture", "place")},
    "image-weak": {"occlusion": 0.3, "blur": 1.2},
}


def synth_config(preset: str = "clean", **knobs) -> SynthConfig:
    """A preset with some knobs set otherwise; knobs that are None stay as the preset has them."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from: {', '.join(PRESETS)}")
    return replace(SynthConfig(preset=preset, **PRESETS[preset]), **{k: v for k, v in knobs.items() if v is not None})


def make_corpus(out: str | Path, config: SynthConfig, *, processes: int | None = None, progress: bool = True) -> None:
    """Writes `out/train-*.tar` and `out/val-*.tar`. `out` has to be new or empty, and appears only when complete."""
    parts = [("train", *part) for part in _shards(config.pairs, config.shard_size)]
    parts += [("val", *part) for part in _shards(config.val_pairs, config.shard_size)]
    total = config.pairs + config.val_pairs
    if processes is None:
        processes = core_count() if total >= _WORTH_PROCESSES else 1
    with new_folder(out) as folder, Progress("making scenes", total, "pairs", shown=progress) as bar:
        jobs = [(*part, folder, config) for part in parts]
        for written in in_processes(_write, jobs, min(processes, len(jobs))):
            bar.advance(written)


def make_sample(config: SynthConfig, split: str, index: int) -> dict:
    """One webdataset sample: picture, first caption, and json with all captions and the scene."""
    scene = draw_scene(config.seed, split, index)
    picture = draw_picture(
        scene,
        Draw("picture", config.seed, split, index),
        resolution=config.resolution,
        occlusion=config.occlusion,
        blur=config.blur,
    )
    draw, never_said = Draw("captions", config.seed, split, index), frozenset(config.never_said)
    captions = [
        tell(scene, draw, dropout=config.caption_dropout, noise=config.caption_noise, never_said=never_said)
        for _ in range(CAPTIONS)
    ]
    return {
        "__key__": f"{split}-{index:08d}",
        "jpg": simplejpeg.encode_jpeg(picture, quality=_QUALITY, colorsubsampling="444"),
        "txt": captions[0],
        "json": {"captions": captions, "scene": scene.to_json(), "preset": config.preset},
    }


def _shards(pairs: int, size: int) -> list[tuple[int, int, int]]:
    """(number, first pair, end) of each shard."""
    return [(number, first, min(first + size, pairs)) for number, first in enumerate(range(0, pairs, size))]


def _write(split: str, number: int, first: int, end: int, folder: Path, config: SynthConfig) -> int:
    write_shard(folder / f"{split}-{number:06d}.tar", (make_sample(config, split, i) for i in range(first, end)))
    return end - first
