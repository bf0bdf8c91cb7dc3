"""The sections of a run's configuration and their defaults: typed, closed to unknown keys, never changed once made."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Protocol = Literal["auto", "pairs", "synthetic", "labels", "flickr30k", "vizwiz", "coco-5k", "coco-1k", "cxc", "eccv"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class AugmentConfig(Section):
    """Random changes of a training picture, keyed by (seed, epoch, sample key). Flips are off: captions say left."""

    shift: float = Field(0.0, ge=0, le=0.5)  # largest translation, as a fraction of the side
    noise: float = Field(0.0, ge=0, le=1)  # standard deviation of pixel noise, as a fraction of the value range
    crop_scale: float = Field(1.0, gt=0, le=1)  # smallest area of the random crop, as a fraction of the picture
    flip: bool = False


class DataConfig(Section):
    train: list[str] | None = None  # shard urls: paths, brace globs, http(s); null: has to be given
    val: list[str] | None = None
    weights: list[float] | None = (
        None  # each entry of `train` a source of its own, drawn at this rate; null: one corpus
    )
    max_repeats: int | None = Field(None, gt=0)  # passes over a source after which it ends; null: any number
    image_keys: list[str] = ["jpg", "jpeg", "png", "webp"]
    caption_key: str = "txt"  # a member's extension, or `json:FIELD` (a string or a list of strings)
    captions: Literal["random", "first"] = "random"  # which one trains when a sample has several
    pair_id: str | None = None  # `json:FIELD`: samples with equal values are positives of each other
    augment: AugmentConfig = AugmentConfig()
    decode: Literal["fast", "pil"] = "fast"
    max_pixels: int = Field(64_000_000, gt=0)
    lanes: int | None = Field(None, gt=0)  # logical streams; null: largest power of two <= 64 that divides the batch
    window: int = Field(8, gt=0)  # blocks a lane shuffles together
    workers: int = Field(0, ge=0)
    prefetch: int = Field(2, gt=0)  # batches decoded ahead
    manifest_dir: str | None = None  # where shard indexes are kept; null: beside the shards, else the user's cache
    changed_shards: Literal["refuse", "next_epoch"] = "refuse"  # on resume, when the shards are not those of before
    damaged_shards: Literal["stop", "skip"] = "stop"  # what to do with a shard that is cut short or no tar
    cache_dir: str | None = None  # remote shards are copied there before they are read; null: read by ranges
    cache_gb: float = Field(100.0, gt=0)  # bound of that folder; the copies used longest ago go first

    @field_validator("train", "val", mode="before")
    @classmethod
    def _one_url_is_a_list(cls, value: Any) -> Any:
        return value.split("::") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _a_weight_for_each_source(self) -> "DataConfig":
        if self.weights is None:
            return self
        bad = next((weight for weight in self.weights if not 0 < weight < float("inf")), None)
        if bad is not None:
            raise ValueError(
                f"data.weights: every source needs a weight above 0, got {bad}; leave the source out instead"
            )
        if self.train is not None and len(self.weights) != len(self.train):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for the {len(self.train)} entries of data.train; "
                "give one for each"
            )
        return self


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


class ModelConfig(Section):
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
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
    source: Literal["none", "frozen_copy", "hf"] = "none"
    image: str | None = None  # hf: folder or hub name of a vision model or of a dual encoder
    text: str | None = None

    @model_validator(mode="after")
    def _folders(self) -> "TeacherConfig":
        if self.source == "hf" and not (self.image and self.text):
            raise ValueError("teacher.source=hf needs teacher.image and teacher.text")
        return self


class ObjectiveConfig(Section):
    name: Literal["contrastive", "covlr"] = "contrastive"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    contrastive_weight: float = Field(1.0, ge=0)
    relation_weight: float = Field(0.2, ge=0)  # covlr only
    relation_weight_image: float | None = Field(None, ge=0)  # null: relation_weight
    relation_weight_text: float | None = Field(None, ge=0)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.1, gt=0)
    relation_scope: Literal["row", "matrix"] = "row"
    relation: Literal["cosine", "euclidean"] = "cosine"
    view_weight: float = Field(0.0, ge=0)  # contrast of two augmented views of a picture
    caption_weight: float = Field(0.0, ge=0)  # contrast of two captions of a sample
    impl: Literal["auto", "triton", "chunked", "reference"] = "auto"

    @property
    def image_relation_weight(self) -> float:
        return self._relation_weight(self.relation_weight_image)

    @property
    def text_relation_weight(self) -> float:
        return self._relation_weight(self.relation_weight_text)

    def _relation_weight(self, own: float | None) -> float:
        if self.name == "contrastive":
            return 0.0
        return self.relation_weight if own is None else own


class MetaConfig(Section):
    mode: Literal["joint"] = "joint"


class OptimConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # not applied to norms, biases and scales
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    clip_norm: float = Field(1.0, ge=0)  # global gradient norm; 0: no clipping


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    dtype: Literal["fp32", "bf16"] = "fp32"
    comm: Literal["auto", "gather"] = "auto"
    threads: int | None = Field(None, gt=0)  # CPU threads a rank; null: cores / ranks on this machine
    timeout_seconds: float = Field(600.0, gt=0)  # of every collective
    deepspeed: dict[str, Any] = {}  # further keys, passed through to DeepSpeed


class TrainConfig(Section):
    global_batch_size: int = Field(256, gt=0)  # pairs that meet in the loss, over all ranks
    chunk_size: int | None = Field(None, gt=0)  # pairs whose activations a tower keeps at once; null: all of a rank's
    max_steps: int = Field(1000, gt=0)
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)


class EvalConfig(Section):
    every: int | None = Field(None, gt=0)  # steps between evaluations; null: only at the end
    protocol: Protocol = "auto"
    labels: list[str] = []  # json fields whose equal values are relevant (protocol `labels`)
    annotations: str | None = None  # folder of CxC's csv files (protocol `cxc`)
    cache: str | None = None  # folder that keeps ROUGE-L relevance (protocols of captioned pictures)
    batch_size: int = Field(256, gt=0)


class LogConfig(Section):
    every: int = Field(10, gt=0)  # steps between lines where there is no terminal
    progress: bool = True  # false: neither bar nor lines


class Config(Section):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    meta: MetaConfig = MetaConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.optim.warmup_steps >= self.train.max_steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be below train.max_steps={self.train.max_steps}"
            )
        o = self.objective
        weights = (
            o.contrastive_weight,
            o.view_weight,
            o.caption_weight,
            o.image_relation_weight,
            o.text_relation_weight,
        )
        if not any(weights):
            raise ValueError(
                "every objective weight is 0: nothing would be learned; set objective.contrastive_weight=1"
            )
        needs_teacher = self.objective.image_relation_weight > 0 or self.objective.text_relation_weight > 0
        if needs_teacher and self.teacher.source == "none":
            raise ValueError(
                f"objective.name={o.name} with a relation weight needs a teacher: got teacher.source=none, "
                "expected frozen_copy or hf (with teacher.image and teacher.text), or set objective.relation_weight=0"
            )
        return self
