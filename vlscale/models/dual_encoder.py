"""The dual encoder: two towers, two linear projections, a learned logit scale.

Submodules and parameters carry the names of `transformers.VisionTextDualEncoderModel`, so that the state dict of one is
that of the other (but for the shape of the scale, see `SCALARS`) and a saved folder is that class; a pair of SigLIP's
towers, which have no projections, is `SiglipModel` (see `siglip`).

Legend: B pairs, L tokens, D embedding width.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from vlscale.logging import get_logger
from vlscale.models import siglip
from vlscale.models.chunks import in_chunks
from vlscale.models.fused_pairs import Fused, Fusing, Made, Pairs, fuse_pairs
from vlscale.models.fusion import PREFIX, FusionEncoder, build_fusion, split_weights
from vlscale.models.fusion_folder import load_fusion
from vlscale.models.masked_head import MaskedHead
from vlscale.models.rows import unit, wide
from vlscale.models.teacher_heads import TeacherHeads, TeacherRows
from vlscale.models.towers import build_tower, check_weights, first_few, one_line, padding_of
from vlscale.sections import ModelConfig

SCALARS = ("logit_scale", "logit_bias")  # parameters of shape (1,) here: DeepSpeed cannot broadcast 0-d ones


class Embeddings(NamedTuple):
    """What one forward gives; a tuple, because ZeRO-3 looks for tensors in tuples. Rows are L2-normalised, in the dtype
    of the towers."""

    image: torch.Tensor  # (B, D)
    text: torch.Tensor  # (B, D)
    logit_scale: torch.Tensor  # (), the multiplier itself, at most model.logit_scale_max
    logit_bias: torch.Tensor | None  # (), sigmoid loss only
    teacher: TeacherRows | None = None  # where the model has teacher heads
    fused: Fused | None = None  # where a fusion encoder was asked


class Features(NamedTuple):
    """One forward up to the projections, for a step that moves these: `project` does the rest."""

    image: torch.Tensor  # (B, width of the vision tower)
    text: torch.Tensor  # (B, width of the text tower)
    visual_weight: torch.Tensor  # (D, width), the projection itself: a gradient of it reaches the parameter
    text_weight: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None
    teacher: TeacherRows | None = None
    fused: Fused | None = None


class Projection(nn.Linear):
    """Called without rows, it gives its weight as a tensor of the graph: ZeRO-3 gathers weights when their module is
    called, and at no other time."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__(width, embed_dim, bias=False)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight.clone() if rows is None else super().forward(rows)


class DualEncoder(nn.Module):
    def __init__(
        self,
        vision_model: PreTrainedModel,
        text_model: PreTrainedModel,
        model: ModelConfig,
        sigmoid: bool,
        fusion: FusionEncoder | None = None,
    ):
        super().__init__()
        self.vision_model = vision_model
        self.text_model = text_model
        self.is_siglip = siglip.shares_space(vision_model, text_model, model.embed_dim)
        self.visual_projection, self.text_projection = (
            Projection(siglip.pooled_width(tower), model.embed_dim) for tower in (vision_model, text_model)
        )
        if self.is_siglip:
            for projection in (self.visual_projection, self.text_projection):
                siglip.fix_identity(projection)
        self.fusion = fusion
        self.normalise: Callable[[torch.Tensor], torch.Tensor] | None = None  # uint8 pixels to the floats that are seen
        self.teacher_heads: TeacherHeads | None = None  # given by a run whose objective learns them
        self.masked_head: MaskedHead | None = None  # likewise
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
        """Pixels (B, 3, H, W) to (B, D)."""
        return unit(self.visual_projection(self._image_features(pixels)))

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask (B, L) to (B, D)."""
        return unit(self.text_projection(self._text_features(input_ids, attention_mask)))

    def image_tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) to the embeddings (B, D) and the tokens (B, V, width) that a fusion encoder looks at."""
        pooled, tokens = self.vision_rows(pixels)
        return unit(self.visual_projection(pooled)), tokens

    def text_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) to the embeddings (B, D) and the tokens (B, L, width) that a fusion encoder starts from."""
        pooled, tokens = self.text_rows(input_ids, attention_mask)
        return unit(self.text_projection(pooled)), tokens

    def embeddings(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled rows (B, width) of both towers to (B, D)."""
        return unit(self.visual_projection(image)), unit(self.text_projection(text))

    def vision_rows(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W), normalised or, with `normalise`, uint8, to what the tower pools (B, width) and its tokens
        (B, V, width)."""
        if pixels.dtype == torch.uint8:
            pixels = self.normalise(pixels)
        out = self.vision_model(pixel_values=pixels.to(self.visual_projection.weight.dtype))
        return out.pooler_output, out.last_hidden_state

    def text_rows(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) to what the tower pools (B, width) and its tokens (B, L, width)."""
        out = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return out.pooler_output, out.last_hidden_state[:, : input_ids.shape[1]]  # SigLIP's pads the captions itself

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision_rows(pixels)[0]

    def _text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.text_rows(input_ids, attention_mask)[0]

    def forward(
        self,
        pixels: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        chunk_size: int | None = None,
        teacher_image: torch.Tensor | None = None,
        teacher_text: torch.Tensor | None = None,
        split_heads: bool = False,
        fusing: Fusing | None = None,
    ) -> Embeddings | Features:
        """`pixels`: as `vision_rows` takes them; uint8 ones become floats a chunk at a time. `chunk_size`: rows that a
        tower keeps activations of at once, see `in_chunks`. `teacher_image`, `teacher_text`: what teacher heads
        project. `split_heads`: stop before the projections. `fusing`: what the fusion encoder is to see."""
        scale = wide(_ProjectedMax.apply(self.logit_scale, self.log_scale_max)).exp().squeeze()
        bias = None if self.logit_bias is None else wide(self.logit_bias).squeeze()
        teacher = None if teacher_image is None else self.teacher_heads(teacher_image, teacher_text)
        if fusing is not None:
            image, text, fused = self._fused((pixels, input_ids, attention_mask), fusing, scale.detach(), chunk_size)
        elif split_heads:
            image = in_chunks(self._image_features, chunk_size, pixels)
            text = in_chunks(self._text_features, chunk_size, input_ids, attention_mask)
            fused = None
        else:
            image = self._by_chunks("vision", chunk_size, pixels)
            text = self._by_chunks("text", chunk_size, input_ids, attention_mask)
            return Embeddings(image, text, scale, bias, teacher)
        if split_heads:
            return Features(image, text, self.visual_projection(), self.text_projection(), scale, bias, teacher, fused)
        return Embeddings(*self.embeddings(image, text), scale, bias, teacher, fused)

    def _by_chunks(self, modality: str, chunk_size: int | None, *inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D). A locked tower has no activations to save: its chunks run once, and end at its rows."""
        vision = modality == "vision"
        if modality in self.locked:
            rows = in_chunks(self._image_features if vision else self._text_features, chunk_size, *inputs)
            return unit((self.visual_projection if vision else self.text_projection)(rows))
        return in_chunks(self.encode_image if vision else self.encode_text, chunk_size, *inputs)

    def _fused(self, views: Pairs, fusing: Fusing, scale: torch.Tensor, chunk_size: int | None) -> Made:
        """Pooled rows of all views, and what the fusion encoder makes of the first ones."""
        count = fusing.pairs
        first, further = (tuple(rows[place] for rows in views) for place in (slice(count), slice(count, None)))
        image, text, fused = fuse_pairs(self, first, fusing, scale, chunk_size)
        if len(further[0]):
            image = torch.cat([image, in_chunks(self._image_features, chunk_size, further[0])])
        if len(further[1]):
            text = torch.cat([text, in_chunks(self._text_features, chunk_size, *further[1:])])
        return image, text, fused

    def hf_config(self) -> VisionTextDualEncoderConfig:
        vision, text = self.vision_model.config, self.text_model.config
        width = self.visual_projection.out_features
        return VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=width)


def project(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Features (B, width) through a projection (D, width), L2-normalised, in the dtype of the features. The product is
    made in the wider dtype of both, so that a float32 weight is not rounded to that of bf16 towers."""
    dtype = torch.promote_types(features.dtype, weight.dtype)
    return unit(F.linear(features.to(dtype), weight.to(dtype))).to(features.dtype)


def build_dual_encoder(model: ModelConfig, sigmoid: bool = False) -> DualEncoder:
    """Towers as the config says, then the weights of `model.init_from` over them."""
    vision = build_tower("vision", model.vision.source, model.vision.config, model.dropout)
    text = build_tower("text", model.text.source, model.text.config, model.dropout)
    fusion = None
    if model.fusion is not None:
        fusion = build_fusion(model.fusion, text, siglip.pooled_width(vision), model.dropout)
    encoder = DualEncoder(vision, text, model, sigmoid, fusion)
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
    """The Hugging Face model of a run, a `final/` or another folder of a dual encoder, CLIP or SigLIP."""
    folder = final_folder(path)
    check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type == siglip.MODEL:
            whole = SiglipModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            whole.text_model.config.pad_token_id = padding_of(folder, whole.text_model.config.pad_token_id)
            return siglip.as_dual_encoder(whole)
        if not (hasattr(config, "vision_config") and hasattr(config, "text_config")):
            raise ValueError(f"it is a {config.model_type}, expected a model of pictures and of texts")
        values, _ = VisionTextDualEncoderConfig.get_config_dict(folder)
        model, told = VisionTextDualEncoderModel.from_pretrained(
            folder,
            config=VisionTextDualEncoderConfig.from_dict(values),  # its from_pretrained warns of every other type
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if told["missing_keys"]:  # random now
            raise ValueError(f"its weights lack {first_few(sorted(told['missing_keys']))}")
        return model
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"model {folder} is not a dual encoder that can be loaded: {one_line(error)}") from None


def weights_of(model: VisionTextDualEncoderModel) -> dict[str, torch.Tensor]:
    """A Hugging Face dual encoder's state dict in our shapes, with the bias that its config keeps."""
    weights = {name: value.reshape(1) if name in SCALARS else value for name, value in model.state_dict().items()}
    bias = getattr(model.config, "logit_bias", None)
    return weights if bias is None else weights | {"logit_bias": torch.tensor([bias])}


def load_weights(encoder: DualEncoder, path: str) -> None:
    """Copy the weights of a run, a `final/` or a Hugging Face dual encoder; shapes must agree. A bias of the sigmoid
    loss is left out where the loss is another."""
    source = weights_of(load_dual_encoder(path))
    if encoder.fusion is not None:
        source = _with_fusion(encoder, source, path)
    own = encoder.state_dict()
    if "logit_bias" not in own:
        source.pop("logit_bias", None)
    for name, value in source.items():
        if name not in own or own[name].shape != value.shape:
            got = f"shape {tuple(value.shape)}"
            expected = f"shape {tuple(own[name].shape)}" if name in own else "no such weight"
            raise ValueError(
                f"model.init_from={path}: weight {name} has {got}, expected {expected}; "
                "use the towers and embed_dim that it was trained with"
            )
    encoder.load_state_dict(source, strict=False)


def _with_fusion(encoder: DualEncoder, weights: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """With the weights of the fusion encoder in the same folder; where there is none and the text model has as many
    layers as text tower and fusion encoder together, its upper ones become those of the latter."""
    fusion = load_fusion(final_folder(path))
    if fusion is not None:
        return weights | {PREFIX + name: value for name, value in fusion.state_dict().items()}
    split = split_weights(weights, encoder.text_model.config.num_hidden_layers, len(encoder.fusion.layers))
    start = "what model.fusion says" if split is None else "the upper layers of its text model"
    get_logger().info("model.init_from=%s holds no fusion encoder: this one starts from %s", path, start)
    return weights if split is None else split


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
