"""The fusion encoder: transformer layers whose queries are a caption's tokens and which look at a picture's tokens.

The layers are Hugging Face's own, with cross-attention (RVLR, arXiv 2412.10761; X-VLM, 2111.08276; ALBEF, 2107.07651).
They come from the text model itself, whose lower layers stay the text tower and whose upper ones become these; from
the upper layers of another BERT-like model; or from a config, with fresh weights. Cross-attention always starts fresh.
Transformers has it only in what it calls a decoder; attention among the caption's tokens is nevertheless both ways.

Legend: P pairs of a picture with a caption, L text tokens of width Wt, V vision tokens of width Wv, W own width.
"""

import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from vlscale.models.towers import load_tower, one_line, set_dropout
from vlscale.sections import FusionConfig

PREFIX = "fusion."  # of its weights in the dual encoder's state dict
SPLITTABLE = ["bert", "camembert", "ernie", "roberta", "xlm-roberta"]  # each is built and run by the tests
_NO_WORDS = {"vocab_size": 1, "max_position_embeddings": 1, "type_vocab_size": 1, "pad_token_id": 0}
_NO_WORDS |= {"bos_token_id": None, "eos_token_id": None}  # its layers alone are built


class FusionEncoder(nn.Module):
    """`config` alone rebuilds it: that of a BERT-like model, with `text_width` and `vision_width`."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config, self.width = config, config.hidden_size
        self.above_text = False  # whether its layers were the text tower's own upper ones
        self.body = AutoModel.from_config(config, add_pooling_layer=False, dtype=torch.float32)
        del self.body.embeddings
        self.body.main_input_name = "inputs_embeds"  # else activation checkpointing looks for the embeddings
        for layer in self.layers:
            layer.attention.self.is_causal = False  # a decoder's is, where no mask is given
        self.text_projection = _projection(config.text_width, self.width)
        self.vision_projection = _projection(config.vision_width, self.width)
        self.matching = nn.Linear(self.width, 2)  # index 1: picture and caption match

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.encoder.layer

    def forward(self, text_tokens: torch.Tensor, text_mask: torch.Tensor, vision_tokens: torch.Tensor) -> torch.Tensor:
        """(P, L, Wt), mask (P, L), (P, V, Wv) to fused tokens (P, L, W), of which [:, 0] is the fused [CLS]."""
        text = self.text_projection(text_tokens)
        mask = create_bidirectional_mask(
            config=self.body.config, inputs_embeds=text, attention_mask=text_mask, allow_is_bidirectional_skip=False
        )
        vision = self.vision_projection(vision_tokens)
        return self.body.encoder(text, attention_mask=mask, encoder_hidden_states=vision).last_hidden_state


def build_fusion(
    fusion: FusionConfig, text_model: PreTrainedModel, vision_width: int, dropout: float | None = None
) -> FusionEncoder:
    """As `model.fusion` says. With `source: text`, the layers are taken off `text_model`."""
    text_width, source = text_model.config.hidden_size, None
    if fusion.config is None:
        source = text_model if fusion.source == "text" else load_tower("text", fusion.source)
    encoder = FusionEncoder(config_for(fusion, source and source.config, text_width, vision_width, dropout))
    if source is not None:
        count = len(encoder.layers)
        for layer, upper in zip(encoder.layers, source.encoder.layer[-count:], strict=True):
            layer.load_state_dict(upper.state_dict(), strict=False)
        if source is text_model:
            encoder.above_text = True
            del text_model.encoder.layer[-count:]
            text_model.config.num_hidden_layers -= count
    return encoder


def config_for(
    fusion: FusionConfig, source: PretrainedConfig | None, text_width: int, vision_width: int, dropout: float | None
) -> PretrainedConfig:
    """The fusion encoder's, where `model.fusion` takes its layers from a model of config `source`, or from none."""
    if fusion.config is not None:
        source = _config_from(fusion.config)
        count = source.num_hidden_layers
    else:
        key = "model.text" if fusion.source == "text" else f"model.fusion.source={fusion.source}"
        count = upper_layers(source, fusion.layers, key)
    config = copy.deepcopy(source)
    set_dropout(config, dropout)
    own = {"num_hidden_layers": count, "is_decoder": True, "add_cross_attention": True}
    config.update(own | _NO_WORDS | {"text_width": text_width, "vision_width": vision_width})
    return config


def split_weights(weights: dict[str, torch.Tensor], lower: int, upper: int) -> dict[str, torch.Tensor] | None:
    """A dual encoder's weights whose text model has `lower` + `upper` layers, with the upper ones as those of a fusion
    encoder; None where it has another number."""
    layers = "text_model.encoder.layer."
    place = {name: int(name.split(".")[3]) for name in weights if name.startswith(layers)}
    if max(place.values(), default=-1) + 1 != lower + upper:
        return None

    def renamed(name: str) -> str:
        if place.get(name, 0) < lower:
            return name
        inside = name.split(".", 4)[4]
        return f"{PREFIX}body.encoder.layer.{place[name] - lower}.{inside}"

    return {renamed(name): value for name, value in weights.items()}


def _projection(width: int, own: int) -> nn.Module:
    return nn.Identity() if width == own else nn.Linear(width, own)


def upper_layers(config: PretrainedConfig, asked: int | None, key: str) -> int:
    """How many layers of a text model become fusion layers; by default the upper half. `key`: what the user set."""
    if config.model_type not in SPLITTABLE:
        raise ValueError(
            f"{key}: {config.model_type} cannot be split into a text tower and fusion layers; those that can: "
            f"{', '.join(SPLITTABLE)}; or give model.fusion.config, a transformer of its own"
        )
    count = asked or config.num_hidden_layers // 2
    if not 0 < count < config.num_hidden_layers:
        raise ValueError(
            f"{key}: {config.num_hidden_layers} layers cannot give {count or 'half of them'} to the fusion encoder and "
            "keep one; set model.fusion.layers, or give a text model with more layers"
        )
    return count


def _config_from(options: dict) -> PretrainedConfig:
    options = dict(options)
    known = options.pop("model_type", None)
    if known not in SPLITTABLE:
        raise ValueError(
            f"model.fusion.config.model_type: expected one whose layers can have cross-attention "
            f"({', '.join(SPLITTABLE)}), got {known}"
        )
    try:
        return AutoConfig.for_model(known, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.fusion.config: {known} could not be built: {one_line(error)}") from None
