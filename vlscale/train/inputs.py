"""From a batch on the host to what the student and the teachers take on the device."""

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from vlscale.data.batch import Batch, PackedPictures
from vlscale.data.images import ImageSpec, normalise
from vlscale.data.tokens import tokenise
from vlscale.kernels.preprocess import preprocess_images
from vlscale.models.chunks import in_chunks
from vlscale.models.rows import unit
from vlscale.models.teachers import Teacher, Teachers
from vlscale.objectives.masked_language import Words

TeacherEmbeddings = tuple[torch.Tensor | None, torch.Tensor | None]


class Inputs:
    """Prepares model inputs. A teacher loaded from elsewhere gets the same augmented sample as the student: the
    pictures resized to its own size and normalised its own way, the captions by its own tokenizer."""

    def __init__(
        self,
        spec: ImageSpec,
        tokenizer: PreTrainedTokenizerBase,
        teachers: Teachers | None,
        device: torch.device,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        fuses: bool = False,
        words: Words | None = None,
        chunk_size: int | None = None,
    ):
        """`fuses`: whether the student has a fusion encoder; `words`: what masking needs, where words are masked;
        `chunk_size`: rows that a teacher sees at once."""
        self.fuses, self.words, self.chunk_size = fuses, words, chunk_size
        self.spec, self.device, self.teachers, self.max_length = spec, device, teachers, max_length
        self._dtype = dtype  # of the towers, and of cached rows, as the teachers' own would be
        self._last: tuple[Batch | None, dict[str, torch.Tensor]] = None, {}
        self.teacher_spec = spec
        self._teacher_tokenizer = None  # None: the student's token ids serve
        if teachers is not None and teachers.image.source is not None:
            self.teacher_spec = ImageSpec.from_processor(AutoImageProcessor.from_pretrained(teachers.image.source))
        if teachers is not None and teachers.text.source is not None:
            own = AutoTokenizer.from_pretrained(teachers.text.source)
            self._teacher_tokenizer = None if own.get_vocab() == tokenizer.get_vocab() else own

    def student(self, batch: Batch) -> dict[str, torch.Tensor]:
        """All views of the pairs, first views first. Pixels stay uint8 until a tower takes them; those that the device
        makes are floats."""
        given = (batch.images, batch.second_images)
        views = [self._pixels(images, self.spec) for images in given if images is not None]
        ids, mask = batch.input_ids, batch.attention_mask
        if batch.second_input_ids is not None:
            ids, mask = _stack_tokens(ids, mask, batch.second_input_ids, batch.second_attention_mask)
        return {
            "pixels": torch.cat(views) if len(views) > 1 else views[0],
            "input_ids": ids.to(self.device, non_blocking=True),
            "attention_mask": mask.to(self.device, non_blocking=True),
        }

    def teacher_rows(self, batch: Batch, seen: tuple[bool, bool] = (True, True)) -> TeacherEmbeddings:
        """Image and text embeddings (B, D_teacher) of the teachers for the first views, or those that a teacher cache
        has of the samples; None without teachers, and of a side that is not `seen`: that teacher does not run. Those of
        the last batch are kept: a meta step asks again."""
        if self._last[0] is not batch:
            self._last = batch, {}
        made = self._last[1]
        if batch.teacher_image is not None or self.teachers is not None:
            for name, asked in zip(("image", "text"), seen, strict=True):
                if asked and name not in made:
                    made[name] = self._made_rows(name, batch)
        image, text = (made.get(name) if asked else None for name, asked in zip(("image", "text"), seen, strict=True))
        return image, text

    def _made_rows(self, name: str, batch: Batch) -> torch.Tensor:
        if batch.teacher_image is not None:
            cached = batch.teacher_image if name == "image" else batch.teacher_text
            return unit(cached.to(self.device)).to(self._dtype)
        if name == "image":
            return self._image_rows(self.teachers.image, batch)
        return self._text_rows(self.teachers.text, batch)

    def _pixels(self, images: torch.Tensor | PackedPictures, spec: ImageSpec) -> torch.Tensor:
        """uint8 as they come, or of packed pictures what a tower of `spec` takes, (B, 3, S, S) of the towers' dtype."""
        if isinstance(images, torch.Tensor):
            return images.to(self.device, non_blocking=True)
        return preprocess_images(
            images.pictures.to(self.device, non_blocking=True),
            images.offsets,
            images.sizes,
            images.boxes,
            images.flips,
            images.colours,
            size=spec.size,
            mean=spec.mean,
            std=spec.std,
            resample=spec.resample,
            dtype=self._dtype,
        )

    def _image_rows(self, teacher: Teacher, batch: Batch) -> torch.Tensor:
        def encode(images: torch.Tensor) -> torch.Tensor:
            if images.dtype == torch.uint8:
                size = self.teacher_spec.size
                if size != self.spec.size:
                    mode = "bilinear" if self.teacher_spec.resample == 2 else "bicubic"
                    resized = F.interpolate(images.float(), size=(size, size), mode=mode, antialias=True)
                    images = resized.round().clamp(0, 255).to(torch.uint8)
                images = normalise(images, self.teacher_spec)
            return teacher(pixel_values=images)

        return in_chunks(encode, self.chunk_size, self._pixels(batch.images, self.teacher_spec))

    def _text_rows(self, teacher: Teacher, batch: Batch) -> torch.Tensor:
        ids, mask = batch.input_ids, batch.attention_mask
        if self._teacher_tokenizer is not None:
            ids, mask = tokenise(self._teacher_tokenizer, batch.captions, self.max_length)

        def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return teacher(input_ids=ids, attention_mask=mask)

        return in_chunks(encode, self.chunk_size, ids.to(self.device), mask.to(self.device))


def _stack_tokens(
    ids: torch.Tensor, mask: torch.Tensor, second_ids: torch.Tensor, second_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches of tokens (B, L) and (B, L2), one on top of the other, the shorter padded with masked zeros."""
    length = max(ids.shape[1], second_ids.shape[1])
    padded = [F.pad(rows, (0, length - rows.shape[1])) for rows in (ids, second_ids, mask, second_mask)]
    return torch.cat(padded[:2]), torch.cat(padded[2:])
