"""`vlscale import open-clip`: a ViT checkpoint of open_clip as the CLIPModel folder that it is, numbers unchanged.

open_clip's ViT models are CLIP under other names: query, key and value in one matrix, projections transposed, and the
text tower either at the top (`transformer...`) or under `text.`. What its config can say and CLIPModel cannot hold is
refused by its key, so nothing is dropped in silence. Safetensors only: nothing is ever unpickled.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from vlscale.data.folders import new_folder
from vlscale.export.open_clip_tokens import load_bpe
from vlscale.models.towers import one_line

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # open_clip's, where none is said
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's codes
ANY = None

# Keys of open_clip's config with the only values that CLIPModel can hold.
KNOWN: dict[str, dict[str, tuple | None]] = {
    "": {
        "embed_dim": ANY,
        "quick_gelu": ANY,
        "vision_cfg": ANY,
        "text_cfg": ANY,
        "custom_text": ANY,
        "init_logit_scale": ANY,
        "init_logit_bias": ANY,
    },
    "vision_cfg.": {
        "image_size": ANY,
        "layers": ANY,
        "width": ANY,
        "head_width": ANY,
        "patch_size": ANY,
        "mlp_ratio": ANY,
        "patch_dropout": ANY,  # of training only
        "output_tokens": (False,),
        "attentional_pool": (False,),
        "no_ln_pre": (False,),
        "final_ln_after_pool": (False,),
        "pool_type": ("tok",),
        "pos_embed_type": ("learnable",),
        "ls_init_value": (None,),
    },
    "text_cfg.": {
        "context_length": ANY,
        "vocab_size": ANY,
        "width": ANY,
        "heads": ANY,
        "layers": ANY,
        "mlp_ratio": ANY,
        "output_tokens": (False,),
        "embed_cls": (False,),
        "no_causal_mask": (False,),
        "final_ln_after_pool": (False,),
        "pool_type": ("argmax",),
        "proj_bias": (False,),
        "proj_type": ("linear",),
        "ls_init_value": (None,),
    },
}
TOP = {  # without `visual.` and `text.`; a trailing dot: weight and bias
    "vision": {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre.": "pre_layrnorm.",
        "ln_post.": "post_layernorm.",
    },
    "text": {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.": "final_layer_norm.",
    },
}
BLOCK = {
    "ln_1.": "layer_norm1.",
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def import_open_clip(checkpoint: Path, config: Path, out: Path, tokenizer: str | None = None) -> Path:
    """`out` is new or empty; it is complete or not there. `tokenizer`: a Hugging Face folder or open_clip's merges
    file; None: the file of an installed open_clip."""
    model_cfg, preprocess_cfg = read_config(config)
    model = clip_model(read_weights(checkpoint), model_cfg, str(checkpoint))
    size = model.config.vision_config.image_size
    processor = CLIPProcessor(
        image_processor(preprocess_cfg, size),
        load_bpe(tokenizer, model.config.text_config.max_position_embeddings),
    )
    if len(processor.tokenizer) != model.config.text_config.vocab_size:
        raise ValueError(
            f"{config}: text_cfg.vocab_size is {model.config.text_config.vocab_size}, the tokenizer has "
            f"{len(processor.tokenizer)} entries; give its own with --tokenizer"
        )
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return out


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's and the preprocessing's part, from open_clip_config.json or from a bare model config."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        model = tree.get("model_cfg", tree)
        parts = {"": model, "vision_cfg.": model["vision_cfg"], "text_cfg.": model["text_cfg"]}
    except OSError as error:
        raise ValueError(f"open_clip config {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is no open_clip model config: expected JSON with vision_cfg and text_cfg, got {error!r}"
        ) from None
    for prefix, part in parts.items():
        for key, value in part.items():
            allowed = KNOWN[prefix].get(key, ())
            fits = not prefix or isinstance(value, int | float) if allowed is ANY else value in allowed
            if not fits:
                raise ValueError(
                    f"{path}: CLIPModel cannot hold {prefix}{key}={value!r}; only open_clip's plain ViT models can be "
                    "imported"
                )
    return model, tree.get("preprocess_cfg", {})


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"open_clip checkpoint {path}: expected a safetensors file, got {one_line(error)}; pickled checkpoints are "
            "not read: save their state dict with safetensors.torch.save_file"
        ) from None


def clip_model(weights: dict[str, Tensor], model_cfg: dict[str, Any], source: str) -> CLIPModel:
    """CLIPModel of open_clip's state dict; `source` is what errors speak of."""
    config = clip_config(model_cfg)
    if "logit_bias" in weights:
        config.logit_bias = float(weights["logit_bias"])
    with torch.device("meta"):
        expected = {name: value.shape for name, value in CLIPModel(config).state_dict().items()}
    renamed = rename(weights)
    renamed.pop("logit_bias", None)
    wrong = sorted(expected.keys() ^ renamed.keys())
    wrong = wrong or [name for name, value in renamed.items() if value.shape != expected[name]]
    if wrong:
        got = f"shape {tuple(renamed[wrong[0]].shape)}" if wrong[0] in renamed else "none"
        wanted = f"shape {tuple(expected[wrong[0]])}" if wrong[0] in expected else "none"
        raise ValueError(
            f"open_clip checkpoint {source} does not fit its config: {len(wrong)} weights differ, first {wrong[0]}: "
            f"expected {wanted}, got {got}; give the config of this model"
        )
    model = CLIPModel(config)
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def clip_config(model_cfg: dict[str, Any]) -> CLIPConfig:
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    act = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    width, text_width = vision.get("width", 768), text.get("width", 512)
    return CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            "hidden_act": act,
            "projection_dim": model_cfg["embed_dim"],
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_act": act,
            "projection_dim": model_cfg["embed_dim"],
            "bos_token_id": text.get("vocab_size", 49408) - 2,
            "eos_token_id": text.get("vocab_size", 49408) - 1,  # the largest id, which open_clip's argmax finds
            "pad_token_id": text.get("vocab_size", 49408) - 1,
        },
        projection_dim=model_cfg["embed_dim"],
    )


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layouts to CLIPModel's; a name that it has no rule for stays as it is."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        tower, inner = ("vision", name.removeprefix("visual.")) if name.startswith("visual.") else ("text", name)
        inner = inner.removeprefix("text.")
        if name in ("logit_scale", "logit_bias"):
            out[name] = value.reshape(())
        elif inner in ("proj", "text_projection"):
            out["visual_projection.weight" if tower == "vision" else "text_projection.weight"] = value.T.contiguous()
        elif inner.startswith("transformer.resblocks."):
            number, part = inner.removeprefix("transformer.resblocks.").split(".", 1)
            out |= _block(f"{tower}_model.encoder.layers.{number}.", part, value)
        else:
            out[f"{tower}_model.{_translated(inner, TOP[tower])}"] = value
    return out


def _block(prefix: str, part: str, value: Tensor) -> dict[str, Tensor]:
    if part.startswith("attn.in_proj_"):
        kind, (q, k, v) = part.removeprefix("attn.in_proj_"), value.chunk(3)
        return {f"{prefix}self_attn.{name}_proj.{kind}": row.clone() for name, row in (("q", q), ("k", k), ("v", v))}
    return {prefix + _translated(part, BLOCK): value}


def _translated(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return name


def image_processor(preprocess_cfg: dict[str, Any], size: int) -> CLIPImageProcessorPil:
    """As open_clip's evaluation transform: the shorter side and the centre, or `squash` to a square."""
    mode, interpolation = (
        preprocess_cfg.get(key, default) for key, default in (("resize_mode", "shortest"), ("interpolation", "bicubic"))
    )
    if mode not in ("shortest", "squash") or interpolation not in RESAMPLE:
        raise ValueError(
            f"open_clip preprocess_cfg: expected resize_mode shortest or squash and interpolation bilinear or bicubic, "
            f"got {mode} and {interpolation}; write one of these into the config"
        )
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": size} if mode == "shortest" else square,
        crop_size=square,
        do_center_crop=mode == "shortest",
        resample=RESAMPLE[interpolation],
        image_mean=list(preprocess_cfg.get("mean", MEAN)),
        image_std=list(preprocess_cfg.get("std", STD)),
    )
