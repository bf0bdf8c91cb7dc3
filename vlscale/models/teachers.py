"""Frozen single-modal teachers: their embeddings say which relations inside a modality are to be kept."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import ModelOutput

from vlscale.models import siglip
from vlscale.models.dual_encoder import DualEncoder, final_folder, load_dual_encoder
from vlscale.models.rows import unit
from vlscale.models.towers import Modality, check_weights, first_few, load_with_gaps, one_line
from vlscale.sections import ObjectiveConfig, TeacherConfig

PROJECTIONS = {"vision": "visual_projection", "text": "text_projection"}
LEAST_ROWS = 8  # below, equal relations may be chance
# How far the entropy of relations is below its maximum, as a share of it. Trained teachers of the demo: 0.49 (pictures)
# and 0.14 (captions) at temperature 0.1, barely trained towers of the tests 4e-3 and more. 1e-6 are cosines whose
# standard deviation is 3e-4, 1e-4 those of 3e-3.
CONSTANT = 1e-6  # and below
WEAK = 1e-4
_JUDGED = 256  # rows: their relations are compared all with all


@dataclass
class Teacher:
    """One frozen tower, with the projection of the dual encoder it came from or the identity.

    `source` is the folder or hub name whose processor prepares its inputs; None: the student's own inputs. A tower
    without a pooling layer speaks by its class token (pictures) or by the mean over a caption's tokens.
    """

    tower: nn.Module
    projection: nn.Module
    source: str | None

    def __post_init__(self) -> None:
        for part in (self.tower, self.projection):
            part.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """D_teacher. Configs of convolutional towers do not tell; these take pictures of any size."""
        known = getattr(self.projection, "out_features", None) or siglip.pooled_width(self.tower)
        if known is not None:
            return known
        return self(pixel_values=torch.zeros(1, 3, 64, 64, device=next(self.tower.parameters()).device)).shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Teacher":
        self.tower.to(device, dtype)
        self.projection.to(device, dtype)
        return self

    @torch.no_grad()
    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Model inputs of B samples to (B, D_teacher), L2-normalised."""
        dtype = next(self.tower.parameters()).dtype
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        pooled = self._pooled(self.tower(**inputs), inputs.get("attention_mask"))
        return unit(self.projection(pooled.to(dtype)))

    def _pooled(self, out: ModelOutput, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, width). `mask`: (B, L) of captions; None for pictures."""
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # ResNet's is (B, width, 1, 1)
        if mask is not None:
            mask = mask.unsqueeze(2)
            return (out.last_hidden_state.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
        if not hasattr(getattr(self.tower, "embeddings", None), "cls_token"):
            raise ValueError("it has neither a pooler_output nor a class token; give another vision model")
        return out.last_hidden_state[:, 0]


@dataclass
class Teachers:
    image: Teacher
    text: Teacher


def build_teachers(config: TeacherConfig, student: DualEncoder, *, projected: bool) -> Teachers | None:
    """The teachers of a run; `frozen_copy` copies the student as it is now, so call it before any training step.
    None without teachers, and with a cache, whose rows come with the batches.

    `projected`: whether the student's projections have been trained; a copy leaves out those that are still random.
    """
    if config.source in ("none", "cache"):
        return None
    if config.source == "frozen_copy":
        copied = copy.deepcopy(student)
        heads = (copied.visual_projection, copied.text_projection) if projected else (nn.Identity(), nn.Identity())
        return Teachers(
            Teacher(copied.vision_model, heads[0], source=None), Teacher(copied.text_model, heads[1], source=None)
        )
    return Teachers(load_teacher("vision", config.image), load_teacher("text", config.text))


@dataclass(frozen=True)
class Judged:
    """The relations of a teacher among different samples, as an objective looks at them."""

    samples: int
    least: float  # cosine
    most: float
    lack: float  # of the entropy of relations from its maximum, as a share of it; 0: all alike
    temperature: float

    @property
    def weak(self) -> bool:
        return self.lack < WEAK

    def __str__(self) -> str:
        return (
            f"all relations among {self.samples} samples lie between {self.least:.7f} and {self.most:.7f}, whose "
            f"entropy at temperature {self.temperature:g} is {1 - self.lack:.10f} of its maximum"
        )


def check_not_constant(rows: torch.Tensor, what: str, objective: ObjectiveConfig) -> Judged | None:
    """Raises ValueError when the relations among `rows` (B, D_teacher), unit, of different samples are all alike: a
    teacher whose relation entropy is at its maximum tells nothing. None where there are fewer than LEAST_ROWS, which
    are not judged.

    Waits for the device.
    """
    if len(rows) < LEAST_ROWS:
        return None
    judged = judge(rows, objective)
    if not judged.lack > CONSTANT:  # also for what is no number
        raise ValueError(
            f"{what} is constant: {judged}, so it tells nothing; expected below 1 - {CONSTANT:g}, give a trained "
            "teacher with the processor and tokenizer that it was trained with"
        )
    return judged


def judge(rows: torch.Tensor, objective: ObjectiveConfig) -> Judged:
    """Of the first of `rows` (B, D_teacher), unit; B at least 3."""
    cosines = relations_of(rows[:_JUDGED].detach().double())
    seen, temperature = cosines, objective.temperature_of_teachers
    if objective.euclidean:
        seen = -(2 - 2 * cosines).clamp(min=0).sqrt()
    lack = 1 - relation_entropy(seen / temperature)
    return Judged(len(cosines), cosines.min().item(), cosines.max().item(), lack, temperature)


def relations_of(rows: torch.Tensor) -> torch.Tensor:
    """(n, D) unit rows to (n, n - 1) cosines, each row without its own."""
    cosines = rows @ rows.T
    n = len(cosines)
    return cosines[~torch.eye(n, dtype=torch.bool, device=rows.device)].view(n, n - 1)


def relation_entropy(logits: torch.Tensor) -> float:
    """Mean entropy of the softmax of each row of (n, m), as a share of its maximum log m."""
    logs = logits.log_softmax(1)
    return float(-(logs.exp() * logs).sum(1).mean()) / max(math.log(logits.shape[1]), 1e-9)


def load_teacher(modality: Modality, path: str) -> Teacher:
    """The teacher in a run, its `final/`, or any Hugging Face folder with a tower of that modality."""
    folder = final_folder(path)
    check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher {path}: no Hugging Face config could be read there: {one_line(error)}") from None
    if getattr(config, f"{modality}_config", None) is None:
        return _single_modal(modality, folder)
    ours = config.model_type in ("vision-text-dual-encoder", siglip.MODEL)
    whole = load_dual_encoder(folder) if ours else AutoModel.from_pretrained(folder, use_safetensors=True)
    projection = getattr(whole, PROJECTIONS[modality], None) or nn.Identity()
    return Teacher(getattr(whole, f"{modality}_model"), projection, folder)


def _single_modal(modality: Modality, folder: str) -> Teacher:
    """Checkpoints of classifiers and of language models are often kept without a pooling layer: a random one in its
    place would say something else in each process. Of an encoder and a decoder, as T5's, the encoder is the teacher."""
    tower, lacking = load_with_gaps(modality, folder)
    if modality == "text" and hasattr(tower, "encoder") and hasattr(tower, "decoder"):
        tower, lacking = tower.encoder, [name for name in lacking if not name.startswith("decoder.")]
    beside = [name for name in lacking if not name.startswith("pooler.")]
    if beside:
        raise ValueError(
            f"teacher {folder}: its weights lack {first_few(beside)}, so what it says would be random; give a folder "
            "with all of them"
        )
    if lacking:
        tower.pooler = None
    if tower.config.model_type == "vit_mae":
        tower.embeddings.random_masking = _all_patches
    return Teacher(tower, nn.Identity(), folder)


def _all_patches(sequence: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, None, None]:
    """A masked autoencoder's patches (B, V, width) in their order, none masked: what it says is not drawn."""
    return sequence, None, None
