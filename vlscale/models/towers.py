"""One tower: a Hugging Face vision or text model whose own `pooler_output` is the representation.

Pooling is never ours, so that an exported folder gives the same embeddings in plain `transformers`.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlscale.logging import get_logger
from vlscale.models import siglip

Modality = Literal["vision", "text"]

# Model types whose `pooler_output` is (B, width); tests/models/test_towers.py builds and runs each of them.
WORKING: dict[str, list[str]] = {
    "vision": ["beit", "clip_vision_model", "deit", "dinov2", "dinov3_vit", "siglip_vision_model", "swinv2", "vit"],
    "text": [
        "albert",
        "bert",
        "camembert",
        "clip_text_model",
        "ernie",
        "mpnet",
        "roberta",
        "siglip_text_model",  # beside siglip_vision_model only, see `siglip`
        "xlm-roberta",
    ],
}


def build_tower(modality: Modality, source: str | None, config: dict[str, Any] | None, dropout: float | None):
    """The tower from a folder or hub name (`source`, with weights) or from a config (fresh weights)."""
    key = f"model.{modality}"
    if (source is None) == (config is None):
        raise ValueError(
            f"{key}: expected exactly one of {key}.source (a folder or hub name) and {key}.config (from scratch), "
            f"got {'neither' if source is None else 'both'}"
        )
    tower = _from_scratch(key, modality, config, dropout) if source is None else load_tower(modality, source, dropout)
    _check_pooling(key, modality, tower)
    return tower


def load_tower(modality: Modality, source: str, dropout: float | None = None) -> PreTrainedModel:
    """A tower with its weights; of a dual encoder, the one that is asked for."""
    tower, lacking = load_with_gaps(modality, source, dropout)
    if lacking:
        get_logger().info("model %s: its weights lack %s, which begin random", source, first_few(lacking))
    return tower


def load_with_gaps(modality: Modality, source: str, dropout: float | None = None) -> tuple[PreTrainedModel, list[str]]:
    """As `load_tower`, with the names of the weights that the folder lacks: they are random now."""
    check_weights(source)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {source}: no Hugging Face config could be read there: {one_line(error)}") from None
    part = getattr(config, f"{modality}_config", None)
    for each in filter(None, (config, part)):
        set_dropout(each, dropout)
    alone = config.model_type == siglip.TEXT
    try:
        kind = siglip.PaddedSiglipText if alone else AutoModel
        model, told = kind.from_pretrained(
            source, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {source}: its weights could not be loaded: {one_line(error)}") from None
    tower = model if part is None else getattr(model, f"{modality}_model")
    own = "" if part is None else f"{modality}_model."
    lacking = sorted(name.removeprefix(own) for name in told["missing_keys"] if name.startswith(own))
    if tower.config.model_type != siglip.TEXT:
        return tower, lacking
    tower.config.pad_token_id = padding_of(source, tower.config.pad_token_id)
    return (tower if alone else siglip.padded(tower)), lacking


def first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def padding_of(source: str, configured: int) -> int:
    """The id that the tokenizer beside the weights pads with: SigLIP2's configs still name SigLIP's."""
    try:
        known = AutoTokenizer.from_pretrained(source).pad_token_id
    except (OSError, ValueError):
        return configured
    return configured if known is None else known


def check_weights(source: str) -> None:
    """A local folder must hold safetensors weights; pickled weights are never read."""
    check_exists(source)
    folder = Path(source)
    if folder.is_dir() and not (any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))):
        names = sorted(path.name for path in folder.iterdir())
        pickled = any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names)
        change = "convert pickled weights with save_pretrained" if pickled else "check the path"
        found = ", ".join(names[:5]) or "nothing"
        raise ValueError(f"model folder {source} holds no weights: expected model.safetensors, got {found} ({change})")


def check_exists(source: str) -> None:
    """What can only be a local path has to be there; anything else may be a hub name."""
    if (Path(source).is_absolute() or source.startswith(".")) and not Path(source).is_dir():
        raise ValueError(f"model folder {source} does not exist")


def set_dropout(config: PretrainedConfig, rate: float | None) -> None:
    """Set every dropout and drop-path rate of a model's config; None leaves them."""
    if rate is None:
        return
    for name, value in vars(config).copy().items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, rate)


def fit_to_tokenizer(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """A text config with the vocabulary, special tokens and room for positions that a tokenizer needs.

    RoBERTa-like models start positions after the padding id, hence the spare ones.
    """
    fitted = dict(config, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    fitted["bos_token_id"], fitted["eos_token_id"] = tokenizer.cls_token_id, tokenizer.sep_token_id
    fitted.setdefault("max_position_embeddings", max_length + (0 if config.get("model_type") == siglip.TEXT else 2))
    return fitted


def image_size(tower: PreTrainedModel) -> int:
    """Side of the square pictures that a vision tower takes, in pixels."""
    size = tower.config.image_size
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ValueError(f"model.vision: expected a square image_size, got {size}; choose a tower with a square one")
    return int(sides.pop())


def check_room(text: PreTrainedModel, max_length: int) -> None:
    """Captions of `max_length` tokens must have positions; RoBERTa's begin behind the padding id."""
    first = text.config.pad_token_id + 1 if hasattr(getattr(text, "embeddings", None), "padding_idx") else 0
    room = getattr(text.config, "max_position_embeddings", max_length + first) - first
    if text.config.model_type == siglip.TEXT and max_length != room:
        raise ValueError(
            f"model.text.max_length={max_length}: SigLIP's text tower reads captions padded to its {room} positions; "
            f"set model.text.max_length={room}"
        )
    if max_length > room:
        raise ValueError(
            f"model.text.max_length={max_length}: {text.config.model_type} has positions for {room} tokens; "
            f"set model.text.max_length={room} or less"
        )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _from_scratch(key: str, modality: Modality, config: dict[str, Any], dropout: float | None) -> PreTrainedModel:
    options = dict(config)
    model_type = options.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"{key}.config needs model_type; known to work: {', '.join(WORKING[modality])}")
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), WORKING[modality], n=1)
        raise ValueError(
            f"{key}.config: {model_type} could not be built: transformers knows no such model_type"
            + (f"; did you mean {close[0]!r}?" if close else f"; known to work: {', '.join(WORKING[modality])}")
        )
    try:
        built = AutoConfig.for_model(model_type, **options)
        set_dropout(built, dropout)
        if model_type == siglip.TEXT:
            return siglip.PaddedSiglipText(built)
        return AutoModel.from_config(built, dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}.config: {model_type} could not be built: {one_line(error)}") from None


@torch.no_grad()
def _check_pooling(key: str, modality: Modality, tower: PreTrainedModel) -> None:
    """One tiny forward: a tower without a (B, width) pooler_output cannot be exported, so it is refused. So are those
    that `AutoModel` does not build from their config: no folder with them could be loaded."""
    known, has = tower.config.model_type, {"vision": "image_size", "text": "vocab_size"}[modality]
    built = type(tower.config) in MODEL_MAPPING or known == siglip.TEXT
    if not hasattr(tower.config, has) or not built:
        why = "transformers' AutoModel does not build it" if hasattr(tower.config, has) else f"it has no {has}"
        raise ValueError(
            f"{key}: {known} cannot be a {modality} tower: {why}; known to work: {', '.join(WORKING[modality])}"
        )
    training = tower.training
    tower.eval()
    if modality == "vision":
        side = image_size(tower)
        out = tower(pixel_values=torch.zeros(1, 3, side, side))
    else:
        ids = torch.zeros(1, 4, dtype=torch.long)  # not the end token: SigLIP's configs name one beyond the vocabulary
        out = tower(input_ids=ids, attention_mask=torch.ones_like(ids))
    tower.train(training)
    pooled = getattr(out, "pooler_output", None)
    width = siglip.pooled_width(tower)
    if pooled is None or tuple(pooled.shape) != (1, width):
        got = "none" if pooled is None else f"shape {tuple(pooled.shape)} of width {width}"
        raise ValueError(
            f"{key}: {tower.config.model_type} has no usable pooler_output: expected (B, width), got {got}; "
            f"known to work: {', '.join(WORKING[modality])}"
        )
