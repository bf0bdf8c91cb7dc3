"""`vlscale export`: a Hugging Face folder that plain `transformers` loads, with a model card.

dual-encoder   VisionTextDualEncoderModel, whatever the towers, but for SigLIP's text tower, which it cannot hold
clip           CLIPModel, where both towers are CLIP's: the same modules under the same names
siglip         SiglipModel, where both towers are SigLIP's. It has no projections, and neither has such a run: they are
               fixed identities, since one over the vision tower could not be folded into its head, whose output is a
               sum of the attention pool and a function of it
In each of them a fusion encoder lies in `fusion/`, where transformers does not look; vlscale loads it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from vlscale.data.folders import new_folder
from vlscale.export.card import write_card
from vlscale.export.loaded import LoadedModel, load_model
from vlscale.models import siglip
from vlscale.models.fusion_folder import save_fusion
from vlscale.models.hf_folder import dual_weights, save_folder

Layout = Literal["dual-encoder", "clip", "siglip"]
CLIP_TOWERS = ("clip_vision_model", "clip_text_model")
CLASSES = {
    "dual-encoder": "VisionTextDualEncoderModel",
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
}


def export_model(run: str, out: Path, layout: Layout | None = None) -> Path:
    """`run`: a run, its `final/` or an exported folder. `out` is new or empty; it is complete or not there. Without a
    `layout`, siglip for SigLIP's towers and dual-encoder for all others."""
    if layout is not None and layout not in _WRITERS:
        raise ValueError(f"--as {layout}: expected {', '.join(_WRITERS)}")
    model = load_model(run, torch.device("cpu"))
    layout = layout or ("siglip" if model.encoder.is_siglip else "dual-encoder")
    for part in (model.encoder.vision_model, model.encoder.text_model, model.encoder.fusion):
        if part is not None:
            part.config._name_or_path = ""  # a path of this machine
    model.tokenizer.model_max_length = model.preprocess.max_length  # `truncation=True` then cuts where training did
    with new_folder(out) as folder:
        _WRITERS[layout](model, folder)
        write_card(model, folder, CLASSES[layout])
    return out


def _dual_encoder(model: LoadedModel, folder: Path) -> None:
    if model.encoder.is_siglip:
        raise ValueError(
            f"--as dual-encoder: VisionTextDualEncoderModel cannot hold {siglip.TEXT}, which AutoModel does not build; "
            "what works: --as siglip"
        )
    save_folder(folder, model.encoder, model.encoder.state_dict(), model.tokenizer, model.image_processor)


def _clip(model: LoadedModel, folder: Path) -> None:
    towers = _tower_types(model)
    if towers != CLIP_TOWERS:
        raise ValueError(
            f"--as clip needs the towers {' + '.join(CLIP_TOWERS)}, this model has {' + '.join(towers)}; "
            "--as dual-encoder works with any"
        )
    encoder = model.encoder
    weights = dual_weights(encoder.state_dict())
    bias = weights.pop("logit_bias", None)
    weights["logit_scale"] = weights["logit_scale"].squeeze()
    config = CLIPConfig(
        text_config=encoder.text_model.config.to_dict(),
        vision_config=encoder.vision_model.config.to_dict(),
        projection_dim=model.embed_dim,
        logit_scale_init_value=float(weights["logit_scale"]),
    )
    if bias is not None:
        config.logit_bias = float(bias)
    with torch.device("meta"):  # only the structure is needed: the weights come from the state dict
        clip = CLIPModel(config)
    clip.load_state_dict(weights, strict=True, assign=True)
    clip.save_pretrained(folder)
    CLIPProcessor(model.image_processor, model.tokenizer).save_pretrained(folder)
    if encoder.fusion is not None:
        save_fusion(encoder.fusion, folder)


def _siglip(model: LoadedModel, folder: Path) -> None:
    if not model.encoder.is_siglip:
        towers = _tower_types(model)
        works = "dual-encoder or clip" if towers == CLIP_TOWERS else "dual-encoder"
        raise ValueError(
            f"--as siglip: SiglipModel has no projections, this model has learned one over each of "
            f"{' + '.join(towers)}; what works: --as {works}"
        )
    save_folder(folder, model.encoder, model.encoder.state_dict(), model.tokenizer, model.image_processor)


_WRITERS: dict[str, Callable[[LoadedModel, Path], None]] = {
    "dual-encoder": _dual_encoder,
    "clip": _clip,
    "siglip": _siglip,
}


def _tower_types(model: LoadedModel) -> tuple[str, str]:
    return model.encoder.vision_model.config.model_type, model.encoder.text_model.config.model_type
