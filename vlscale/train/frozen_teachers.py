"""A teacher with the preprocessing that is its own, and the hashes that say which of both it is.

A run keeps the hashes of its teachers, its stamp, and goes on with no others. Each of its checkpoints tells them too,
for a run that is continued where only its copies are.

Legend: S side of a teacher's pictures, B pictures, T captions, D width of a teacher's embeddings.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from vlscale.data.images import ImageSpec, normalise
from vlscale.data.teacher_cache import TeacherFacts
from vlscale.data.tokens import tokenise
from vlscale.evaluate.run import longest_text
from vlscale.models.hf_folder import load_image_processor, load_tokenizer
from vlscale.models.teachers import Teacher, Teachers, load_teacher
from vlscale.models.towers import check_room, one_line
from vlscale.sections import TeacherConfig
from vlscale.train.checkpoint_folder import CHECKPOINTS, by_step, read_manifest

TEACHERS = "teachers.json"  # file in a run: its stamp
Stamp = dict[str, TeacherFacts]  # of image and text
_PUT_BACK = {
    "hf": "put the teacher of then back",
    "cache": "give a cache of the teacher of then",
    "frozen_copy": "put back model.init_from, the towers and train.seed, which the copy is made of",
}


@dataclass(frozen=True)
class ImageTeacher:
    named: str
    teacher: Teacher
    spec: ImageSpec

    def embed(self, pictures: np.ndarray, device: torch.device) -> torch.Tensor:
        """(B, S, S, 3) uint8 to (B, D) float32 on the host, unit rows."""
        pixels = normalise(torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2), self.spec)
        return self.teacher(pixel_values=pixels).float().cpu()

    @cached_property
    def facts(self) -> TeacherFacts:
        """Of the weights as they were loaded: ask before they are moved to another dtype."""
        side = self.spec.size
        width = _width(self.named, lambda: self.embed(np.zeros((1, side, side, 3), np.uint8), torch.device("cpu")))
        return TeacherFacts(self.named, _hash_weights(self.teacher), _hash(asdict(self.spec)), width)


@dataclass(frozen=True)
class TextTeacher:
    named: str
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def embed(self, captions: list[str], device: torch.device) -> torch.Tensor:
        """T captions to (T, D) float32 on the host, unit rows."""
        ids, mask = tokenise(self.tokenizer, captions, self.max_length)
        return self.teacher(input_ids=ids.to(device), attention_mask=mask.to(device)).float().cpu()

    @cached_property
    def facts(self) -> TeacherFacts:
        """As `ImageTeacher.facts`."""
        width = _width(self.named, lambda: self.embed(["one"], torch.device("cpu")))
        preprocessing = _hash([_tokenizer_facts(self.tokenizer), self.max_length])
        return TeacherFacts(self.named, _hash_weights(self.teacher), preprocessing, width)


def load_image_teacher(path: str) -> ImageTeacher:
    return _image_teacher(path, load_teacher("vision", path))


def load_text_teacher(path: str) -> TextTeacher:
    loaded = _text_teacher(path, load_teacher("text", path))
    check_room(loaded.teacher.tower, loaded.max_length)
    return loaded


def _image_teacher(path: str, teacher: Teacher) -> ImageTeacher:
    return ImageTeacher(path, teacher, ImageSpec.from_processor(load_image_processor(teacher.source)))


def _text_teacher(path: str, teacher: Teacher) -> TextTeacher:
    tokenizer = load_tokenizer(teacher.source)
    return TextTeacher(path, teacher, tokenizer, longest_text(tokenizer))


def live_stamp(config: TeacherConfig, teachers: Teachers, spec: ImageSpec) -> Stamp:
    """Of a run's own teachers: ask before they are moved to another dtype. A frozen copy sees what the student sees:
    pictures prepared by `spec`, and tokens of the tokenizer that the run keeps."""
    if config.source == "frozen_copy":
        return {"image": _copy_facts(teachers.image, asdict(spec)), "text": _copy_facts(teachers.text, None)}
    image, text = _image_teacher(config.image, teachers.image), _text_teacher(config.text, teachers.text)
    return {"image": image.facts, "text": text.facts}


def _copy_facts(teacher: Teacher, preprocessing: Any) -> TeacherFacts:
    return TeacherFacts("frozen_copy", _hash_weights(teacher), _hash(preprocessing), teacher.width)


def difference(given: TeacherFacts, kept: TeacherFacts) -> tuple[str, str, str] | None:
    """The first of both hashes that differs: of what, as given, as kept."""
    parts = ((part, getattr(given, part), getattr(kept, part)) for part in ("weights", "preprocessing"))
    return next((each for each in parts if each[1] != each[2]), None)


def check_same_teachers(stamp: Stamp, config: TeacherConfig, folder: Path) -> None:
    """Raises ValueError where the run in `folder` began with other teachers. One that kept no stamp goes on."""
    begun = _kept_stamp(folder)
    for name, kept in begun.items() if begun else ():
        given = stamp[name]
        differs = difference(given, kept)
        if differs is not None:
            part, got, expected = differs
            delete = f", or delete {folder / TEACHERS} to go on with this one" if (folder / TEACHERS).exists() else ""
            raise ValueError(
                f"cannot resume: teacher.source={config.source}: the {name} teacher changed, {folder} began with "
                f"{kept.source} ({part} hash {expected}), this run has {given.source} ({part} hash {got}); "
                f"{_PUT_BACK[config.source]}, or start a new run in another folder{delete}"
            )


def _kept_stamp(folder: Path) -> Stamp | None:
    """Of a run in `folder`, or of a checkpoint that came to a folder without one. None where there is neither, or what
    the run says of its teachers was lost with the power."""
    try:
        if (folder / "config.yaml").is_file():
            told = json.loads((folder / TEACHERS).read_text())
        else:
            told = next((read_manifest(step)["teachers"] for step in by_step(folder / CHECKPOINTS)), {})
        return {name: TeacherFacts(**told[name]) for name in ("image", "text")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def stamp_facts(stamp: Stamp) -> dict[str, Any]:
    """What a checkpoint's manifest tells."""
    return {name: asdict(facts) for name, facts in stamp.items()}


def stamp_text(stamp: Stamp) -> str:
    """What `teachers.json` holds."""
    return json.dumps(stamp_facts(stamp), indent=1) + "\n"


def _width(named: str, probe: Callable[[], torch.Tensor]) -> int:
    try:
        return probe().shape[1]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"teacher {named} cannot embed a sample: {one_line(error)}") from None


def _hash_weights(teacher: Teacher) -> str:
    digest = blake2b(digest_size=16)
    for part in (teacher.tower, teacher.projection):
        for name, value in sorted(part.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All of a fast tokenizer but its padding and truncation, which every call sets; a slow one's vocabulary."""
    if not tokenizer.is_fast:
        return sorted(tokenizer.get_vocab().items())
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in told.items() if name not in ("padding", "truncation")}


def _hash(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
