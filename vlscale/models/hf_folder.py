"""Folders that plain `transformers` loads: `VisionTextDualEncoderModel` (`SiglipModel` for a pair of SigLIP's towers),
processor and tokenizer, safetensors only; a fusion encoder lies in a folder of its own inside (see `fusion_folder`)."""

import math
import os
import shutil
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipProcessor,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTImageProcessorPil,
)

from vlscale.models import siglip
from vlscale.models.dual_encoder import DualEncoder, final_folder, load_dual_encoder, weights_of
from vlscale.models.fusion import PREFIX as FUSION
from vlscale.models.fusion_folder import load_fusion, save_fusion
from vlscale.models.masked_head import PREFIX as MASKED_HEAD
from vlscale.models.teacher_heads import PREFIX as TEACHER_HEADS
from vlscale.models.towers import check_exists, one_line
from vlscale.sections import ModelConfig

_OF_LOADING = ("is_local", "local_files_only")  # how it was loaded here: transformers would save that with it


def save_folder(
    folder: Path,
    encoder: DualEncoder,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor,
) -> None:
    """Write the folder under another name and rename it: it is complete or not there.

    `weights` is the full float32 state dict of `encoder`, of which teacher heads and the head of masked words are left
    out. A sigmoid model's bias goes to config.json as `logit_bias`.
    """
    fusion = {name.removeprefix(FUSION): value for name, value in weights.items() if name.startswith(FUSION)}
    weights = dual_weights(weights)
    weights |= {"logit_scale": weights["logit_scale"].clamp(max=encoder.log_scale_max)}
    if encoder.is_siglip:
        model = siglip.siglip_model(encoder.vision_model, encoder.text_model, weights)
        processor = SiglipProcessor(image_processor, tokenizer)
    else:
        model = _dual_encoder(encoder, weights)
        processor = VisionTextDualEncoderProcessor(image_processor, tokenizer)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if encoder.fusion is not None:
        save_fusion(encoder.fusion, partial, fusion)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def dual_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state dict without what stands beside the dual encoder."""
    beside = (TEACHER_HEADS, MASKED_HEAD, FUSION)
    return {name: value for name, value in weights.items() if not name.startswith(beside)}


def _dual_encoder(encoder: DualEncoder, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    config = encoder.hf_config()
    bias = weights.pop("logit_bias", None)
    if bias is not None:
        config.logit_bias = float(bias)
    weights["logit_scale"] = weights["logit_scale"].squeeze()
    with torch.device("meta"):  # only the structure is needed: the weights come from the state dict
        model = VisionTextDualEncoderModel(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def load_encoder(path: str) -> tuple[DualEncoder, PreTrainedTokenizerBase, BaseImageProcessor]:
    """A run, a `final/` or an exported folder, ready to embed (evaluation mode), with its tokenizer and processor."""
    folder = final_folder(path)
    model = load_dual_encoder(folder)
    bias = getattr(model.config, "logit_bias", None)
    settings = ModelConfig(
        embed_dim=model.config.projection_dim,
        logit_scale_max=max(100.0, math.exp(float(model.logit_scale.detach()))),
        logit_bias_init=bias or 0.0,
    )
    fusion = load_fusion(folder, (model.vision_model, model.text_model))
    encoder = DualEncoder(model.vision_model, model.text_model, settings, sigmoid=bias is not None, fusion=fusion)
    encoder.load_state_dict(weights_of(model), strict=False)
    return encoder.eval(), load_tokenizer(folder), load_image_processor(folder)


def quiet() -> None:
    """No progress bars of transformers' own: vlscale shows its own progress."""
    transformers.utils.logging.disable_progress_bar()


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    check_exists(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        if not Path(source).is_dir():
            raise ValueError(f"{source} is no folder, and no model of that name was found: {one_line(error)}") from None
        raise ValueError(
            f"{source} holds no tokenizer: {error.__class__.__name__}; give model.text.tokenizer"
        ) from None
    for name in _OF_LOADING:
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def load_image_processor(source: str) -> BaseImageProcessor:
    check_exists(source)
    try:
        return AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} holds no image processor: {error.__class__.__name__}") from None


def new_image_processor(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> BaseImageProcessor:
    """For a vision tower trained from scratch: resize to (size, size), scale to [0, 1], normalise."""
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std))
