"""`model` and `teacher`: the towers, the fusion encoder, and the frozen models whose relations are kept."""

from typing import Any, Literal

from pydantic import Field, model_validator

from vlscale.sections.base import Section


class VisionConfig(Section):
    source: str | None = None  # folder or hub name with weights
    config: dict[str, Any] | None = None  # Hugging Face config with `model_type`: trained from scratch
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # used when the model comes without an image processor
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class TextConfig(Section):
    source: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None  # folder or hub name; null: the source's, or one trained on the training captions
    vocab_size: int = Field(4096, gt=8)  # upper bound of a trained tokenizer
    max_length: int = Field(64, gt=2)


class FusionConfig(Section):
    """The fusion encoder: cross-attention over the vision tower's tokens, on top of the text tower's."""

    source: str | None = None  # text: the upper layers of the text model, whose lower ones stay the text tower; else a
    # folder or hub name of a BERT-like model, whose upper layers it starts from
    layers: int | None = Field(None, gt=0)  # how many of the source's; null: the upper half
    config: dict[str, Any] | None = None  # Hugging Face config with `model_type`: a transformer from scratch

    @model_validator(mode="after")
    def _one_origin(self) -> "FusionConfig":
        if (self.source is None) == (self.config is None):
            raise ValueError(
                "model.fusion: expected exactly one of model.fusion.source (text, or a folder or hub name) and "
                f"model.fusion.config (from scratch), got {'neither' if self.source is None else 'both'}"
            )
        if self.config is not None and self.layers is not None:
            raise ValueError(
                f"model.fusion.layers={self.layers} goes with model.fusion.source; with model.fusion.config, set its "
                "num_hidden_layers"
            )
        return self


class ModelConfig(Section):
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    fusion: FusionConfig | None = None  # null: none, the dual encoder alone
    embed_dim: int = Field(512, gt=0)
    logit_scale_init: float = Field(1 / 0.07, gt=0)
    logit_scale_max: float = Field(100.0, gt=0)
    logit_bias_init: float = -10.0  # sigmoid loss only
    dropout: float | None = Field(
        None, ge=0, lt=1
    )  # every dropout and drop-path rate of both towers; null: as they are
    init_from: str | None = None  # a run, a `final/` or a Hugging Face folder: weights only
    locked: list[Literal["vision", "text"]] = []


class TeacherConfig(Section):
    source: Literal["none", "frozen_copy", "hf", "cache"] = "none"
    image: str | None = None  # hf: folder or hub name of a vision model or of a dual encoder
    text: str | None = None
    cache: str | None = None  # cache: folder that `vlscale data teach` wrote, or an url of a copy of it (which needs
    # data.cache_dir); its teachers saw pictures unaugmented.
    # teacher.image and teacher.text, when given beside it, have to be those teachers

    @model_validator(mode="after")
    def _folders(self) -> "TeacherConfig":
        if self.source == "hf" and not (self.image and self.text):
            raise ValueError("teacher.source=hf needs teacher.image and teacher.text")
        if self.source == "cache" and not self.cache:
            raise ValueError("teacher.source=cache needs teacher.cache, a folder that `vlscale data teach` wrote")
        return self
