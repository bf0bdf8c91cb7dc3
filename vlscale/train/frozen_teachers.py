"""A teacher with the preprocessing that is its own, and the hashes that say which of both it is.

Legend: S side of a teacher's pictures, B pictures, T captions, D width of a teacher's embeddings.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from vlscale.data.images import ImageSpec, normalise
from vlscale.data.teacher_cache import TeacherFacts
from vlscale.data.tokens import tokenise
from vlscale.evaluate.run import longest_text
from vlscale.models.hf_folder import load_image_processor, load_tokenizer
from vlscale.models.teachers import Teacher, load_teacher
from vlscale.models.towers import check_room


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
    teacher = load_teacher("vision", path)
    return ImageTeacher(path, teacher, ImageSpec.from_processor(load_image_processor(teacher.source)))


def load_text_teacher(path: str) -> TextTeacher:
    teacher = load_teacher("text", path)
    tokenizer = load_tokenizer(teacher.source)
    max_length = longest_text(tokenizer)
    check_room(teacher.tower, max_length)
    return TextTeacher(path, teacher, tokenizer, max_length)


def _width(named: str, probe: Callable[[], torch.Tensor]) -> int:
    try:
        return probe().shape[1]
    except (AttributeError, TypeError):
        raise ValueError(f"teacher {named}: its tower gives no pooler_output, which is what a teacher says") from None


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
