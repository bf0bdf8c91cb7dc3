"""Frozen single-modal teachers: their embeddings say which relations inside a modality are to be kept."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from vlscale.models.dual_encoder import DualEncoder, final_folder, load_dual_encoder, unit
from vlscale.models.towers import Modality, check_weights, load_tower, one_line
from vlscale.sections import TeacherConfig

PROJECTIONS = {"vision": "visual_projection", "text": "text_projection"}


@dataclass
class Teacher:
    """One frozen tower, with the projection of the dual encoder it came from or the identity.

    `source` is the folder or hub name whose processor prepares its inputs; None: the student's own inputs.
    """

    tower: nn.Module
    projection: nn.Module
    source: str | None

    def __post_init__(self) -> None:
        for part in (self.tower, self.projection):
            part.requires_grad_(False).eval()

    def to(self, device: torch.device, dtype: torch.dtype) -> "Teacher":
        self.tower.to(device, dtype)
        self.projection.to(device, dtype)
        return self

    @torch.no_grad()
    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Model inputs of B samples to (B, D_teacher), L2-normalised."""
        dtype = next(self.tower.parameters()).dtype
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        return unit(self.projection(self.tower(**inputs).pooler_output))


@dataclass
class Teachers:
    image: Teacher
    text: Teacher


def build_teachers(config: TeacherConfig, student: DualEncoder, *, projected: bool) -> Teachers | None:
    """The teachers of a run; `frozen_copy` copies the student as it is now, so call it before any training step.

    `projected`: whether the student's projections have been trained; a copy leaves out those that are still random.
    """
    if config.source == "none":
        return None
    if config.source == "frozen_copy":
        copied = copy.deepcopy(student)
        heads = (copied.visual_projection, copied.text_projection) if projected else (nn.Identity(), nn.Identity())
        return Teachers(
            Teacher(copied.vision_model, heads[0], source=None), Teacher(copied.text_model, heads[1], source=None)
        )
    return Teachers(_load("vision", config.image), _load("text", config.text))


def _load(modality: Modality, path: str) -> Teacher:
    folder = final_folder(path)
    check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher {path}: no Hugging Face config could be read there: {one_line(error)}") from None
    if getattr(config, f"{modality}_config", None) is None:
        return Teacher(load_tower(modality, folder), nn.Identity(), folder)
    dual_encoder = config.model_type == "vision-text-dual-encoder"
    whole = load_dual_encoder(folder) if dual_encoder else AutoModel.from_pretrained(folder, use_safetensors=True)
    projection = getattr(whole, PROJECTIONS[modality], None) or nn.Identity()
    return Teacher(getattr(whole, f"{modality}_model"), projection, folder)
