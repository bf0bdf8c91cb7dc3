"""The dual encoder: two towers, two linear projections, a learned logit scale.

Submodules and parameters carry the names of `transformers.VisionTextDualEncoderModel`, so that the state dict of one is
that of the other (but for the shape of the scale, see `SCALARS`) and an exported folder is only ever that class.

Legend: B pairs, L tokens, D embedding width.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from vlscale.models.chunks import in_chunks
from vlscale.models.towers import build_tower, check_weights, one_line
from vlscale.sections import ModelConfig

SCALARS = ("logit_scale", "logit_bias")  # parameters of shape (1,) here: DeepSpeed cannot broadcast 0-d ones


class Embeddings(NamedTuple):
    """What one forward gives; a tuple, because ZeRO-3 looks for tensors in tuples. Rows are L2-normalised, in the dtype
    of the towers."""

    image: torch.Tensor  # (B, D)
    text: torch.Tensor  # (B, D)
    logit_scale: torch.Tensor  # (), the multiplier itself, at most model.logit_scale_max
    logit_bias: torch.Tensor | None  # (), sigmoid loss only


class DualEncoder(nn.Module):
    def __init__(self, vision_model: PreTrainedModel, text_model: PreTrainedModel, model: ModelConfig, sigmoid: bool):
        super().__init__()
        self.vision_model = vision_model
        self.text_model = text_model
        self.visual_projection = _projection(vision_model.config.hidden_size, model.embed_dim)
        self.text_projection = _projection(text_model.config.hidden_size, model.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(model.logit_scale_init)]))  # the logarithm is learned
        self.logit_bias = nn.Parameter(torch.tensor([model.logit_bias_init])) if sigmoid else None
        self.log_scale_max = math.log(model.logit_scale_max)
        self.locked = tuple(model.locked)
        for name in self.locked:
            self.tower(name).requires_grad_(False)
        self.train()

    def tower(self, modality: str) -> PreTrainedModel:
        return {"vision": self.vision_model, "text": self.text_model}[modality]

    def train(self, mode: bool = True) -> "DualEncoder":
        """Locked towers stay in evaluation mode: no dropout in what does not learn."""
        super().train(mode)
        for name in self.locked:
            self.tower(name).eval()
        return self

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, H, W) to (B, D)."""
        pixels = pixels.to(self.visual_projection.weight.dtype)
        return unit(self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output))

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask (B, L) to (B, D)."""
        out = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return unit(self.text_projection(out.pooler_output))

    def forward(
        self,
        pixels: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        chunk_size: int | None = None,
    ) -> Embeddings:
        """`chunk_size`: rows that a tower keeps activations of at once, see `in_chunks`."""
        scale = _ProjectedMax.apply(self.logit_scale, self.log_scale_max).float().exp().squeeze()
        bias = None if self.logit_bias is None else self.logit_bias.float().squeeze()
        image = in_chunks(self.encode_image, chunk_size, pixels)
        text = in_chunks(self.encode_text, chunk_size, input_ids, attention_mask)
        return Embeddings(image, text, scale, bias)

    def hf_config(self) -> VisionTextDualEncoderConfig:
        vision, text = self.vision_model.config, self.text_model.config
        width = self.visual_projection.out_features
        return VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=width)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length one, computed in float32 at least, returned in their own dtype."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return F.normalize(wide, dim=-1).to(rows.dtype)


def build_dual_encoder(model: ModelConfig, sigmoid: bool = False) -> DualEncoder:
    """Towers as the config says, then the weights of `model.init_from` over them."""
    vision = build_tower("vision", model.vision.source, model.vision.config, model.dropout)
    text = build_tower("text", model.text.source, model.text.config, model.dropout)
    encoder = DualEncoder(vision, text, model, sigmoid)
    if model.init_from is not None:
        load_weights(encoder, model.init_from)
    return encoder


def final_folder(path: str) -> str:
    """A run's `final/` where `path` is a run folder, else the path itself (a Hugging Face folder or hub name)."""
    final = Path(path) / "final"
    if (Path(path) / "config.yaml").is_file() and not final.is_dir():
        raise ValueError(f"run {path} has no final/ folder: it has not finished; continue it with --resume")
    return str(final) if final.is_dir() else path


def load_dual_encoder(path: str) -> VisionTextDualEncoderModel:
    """The Hugging Face model of a run, a `final/` or another dual-encoder folder."""
    folder = final_folder(path)
    check_weights(folder)
    try:
        return VisionTextDualEncoderModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"model {folder} is not a dual encoder that can be loaded: {one_line(error)}") from None


def weights_of(model: VisionTextDualEncoderModel) -> dict[str, torch.Tensor]:
    """A Hugging Face dual encoder's state dict in our shapes."""
    return {name: value.reshape(1) if name in SCALARS else value for name, value in model.state_dict().items()}


def load_weights(encoder: DualEncoder, path: str) -> None:
    """Copy the weights of a run, a `final/` or a Hugging Face dual encoder; shapes must agree."""
    source = weights_of(load_dual_encoder(path))
    own = encoder.state_dict()
    for name, value in source.items():
        if name not in own or own[name].shape != value.shape:
            got = f"shape {tuple(value.shape)}"
            expected = f"shape {tuple(own[name].shape)}" if name in own else "no such weight"
            raise ValueError(
                f"model.init_from={path}: weight {name} has {got}, expected {expected}; "
                "use the towers and embed_dim that it was trained with"
            )
    encoder.load_state_dict(source, strict=False)


def _projection(width: int, embed_dim: int) -> nn.Linear:
    linear = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


class _ProjectedMax(torch.autograd.Function):
    """min(x, largest), whose gradient is dropped only where it would push x further up: projected descent.

    A plain clamp has no gradient above the bound, so a scale that momentum carried over it could never come back.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, largest: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.largest = largest
        return x.clamp(max=largest)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.largest) & (grad < 0), torch.zeros_like(grad), grad), None
