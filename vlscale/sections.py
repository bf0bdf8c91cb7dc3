"""The sections of a run's configuration and their defaults: typed, closed to unknown keys, never changed once made."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

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
    captions: Literal["random", "first", "all"] = "random"  # which one trains when a sample has several; all: each in
    # turn, one a pass over the corpus, so that after k passes each of k captions has trained once
    pair_id: str | None = None  # `json:FIELD`: samples with equal values are positives of each other
    augment: AugmentConfig = AugmentConfig()
    decode: Literal["fast", "pil"] = "fast"
    max_pixels: int = Field(64_000_000, gt=0)
    lanes: int | None = Field(None, gt=0)  # logical streams; null: largest power of two <= 64 that divides the batch
    window: int = Field(8, gt=0)  # blocks a lane shuffles together
    length_buckets: int = Field(1, gt=0)  # groups of alike caption length in a window: less padding, batches of a kind
    workers: int = Field(0, ge=0)
    prefetch: int = Field(2, gt=0)  # batches decoded ahead
    read_ahead_mb: float = Field(2048.0, gt=0)  # and at most so many megabytes of them on a rank, but at least one
    manifest_dir: str | None = None  # where shard indexes are kept; null: beside the shards, else the user's cache
    changed_shards: Literal["refuse", "next_epoch"] = "refuse"  # on resume, when the shards are not those of before
    damaged_shards: Literal["stop", "skip"] = "stop"  # what to do with a shard that is cut short or no tar
    unreadable_shards: Literal["stop", "quarantine"] = "stop"  # what to do when reading fails for good while training;
    # quarantine: all ranks leave the shard out from the same batch on, and a resumed run still does
    cache_dir: str | None = None  # remote shards are copied there before they are read; null: read by ranges
    cache_gb: float = Field(100.0, gt=0)  # bound of that folder; the copies used longest ago go first
    allow_pipe: bool = False  # shards `pipe:COMMAND` are what the command writes, copied to cache_dir; runs commands!

    @field_validator("train", "val", mode="before")
    @classmethod
    def _one_url_is_a_list(cls, value: Any) -> Any:
        return value.split("::") if isinstance(value, str) else value

    @property
    def pipes(self) -> str | None:
        """Where the output of `pipe:` shards is kept; None: they are refused."""
        return self.cache_dir if self.allow_pipe else None

    @model_validator(mode="after")
    def _lengths_are_known(self) -> "DataConfig":
        if self.length_buckets > 1 and self.caption_key.startswith("json:"):
            raise ValueError(
                f"data.length_buckets={self.length_buckets} needs captions in members of their own, whose length the "
                f"index tells, got data.caption_key={self.caption_key}; set data.length_buckets=1"
            )
        return self

    @model_validator(mode="after")
    def _pipes_have_a_place(self) -> "DataConfig":
        if self.allow_pipe and self.cache_dir is None:
            raise ValueError("data.allow_pipe=true needs data.cache_dir: what a command writes is kept there")
        return self

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
    source: Literal["none", "frozen_copy", "hf", "cache"] = "none"
    image: str | None = None  # hf: folder or hub name of a vision model or of a dual encoder
    text: str | None = None
    cache: str | None = None  # cache: folder that `vlscale data teach` wrote; its teachers saw pictures unaugmented.
    # teacher.image and teacher.text, when given beside it, have to be those teachers

    @model_validator(mode="after")
    def _folders(self) -> "TeacherConfig":
        if self.source == "hf" and not (self.image and self.text):
            raise ValueError("teacher.source=hf needs teacher.image and teacher.text")
        if self.source == "cache" and not self.cache:
            raise ValueError("teacher.source=cache needs teacher.cache, a folder that `vlscale data teach` wrote")
        return self


class ObjectiveConfig(Section):
    name: Literal["contrastive", "covlr", "rvlr"] = "contrastive"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    contrastive_weight: float = Field(1.0, ge=0)  # rvlr's itc
    relation_weight: float = Field(0.2, ge=0)  # covlr only
    relation_weight_image: float | None = Field(None, ge=0)  # null: relation_weight
    relation_weight_text: float | None = Field(None, ge=0)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.1, gt=0)
    relation_scope: Literal["row", "matrix"] = "row"
    relation: Literal["cosine", "euclidean"] = "cosine"
    # The next ones are rvlr's, by the paper's names; its official weights are configs/rvlr-official.yaml.
    iic_weight: float = Field(0.25, ge=0)  # contrast of image embeddings with the image teacher's, projected
    ttc_weight: float = Field(0.5, ge=0)
    kd_weight: float = Field(0.5, ge=0)  # student relations against the mixture w T_text + (1 - w) T_image
    kd_image_weight: float = Field(0.25, ge=0)  # the image teacher's relations against the mixture: what w learns from
    kd_text_weight: float = Field(0.25, ge=0)
    itm_weight: float | None = Field(None, ge=0)  # matching; null: 0, since there is no fusion encoder
    relation_distance: Literal["mae", "mse", "kl", "wasserstein"] = "mae"
    cross_modal_relation: bool = False  # kd also of the symmetrised image-text matrix (mae and mse)
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
        if self.name != "covlr":
            return 0.0
        return self.relation_weight if own is None else own

    @property
    def distils(self) -> bool:
        """Whether a relation of a student is held to one of a teacher."""
        of_rvlr = (self.kd_weight, self.kd_image_weight, self.kd_text_weight)
        return any(of_rvlr if self.name == "rvlr" else (self.image_relation_weight, self.text_relation_weight))

    @property
    def contrasts(self) -> bool:
        """Whether consistency has a weight: what a meta step moves the parameters by."""
        return any((self.contrastive_weight, self.view_weight, self.caption_weight)) or self._contrasts_with_teachers

    @property
    def needs_teachers(self) -> bool:
        return self.distils or self._contrasts_with_teachers

    @property
    def _contrasts_with_teachers(self) -> bool:
        return self.name == "rvlr" and (self.iic_weight > 0 or self.ttc_weight > 0)

    @model_validator(mode="after")
    def _possible(self) -> "ObjectiveConfig":
        if self.name == "rvlr" and self.itm_weight:
            raise ValueError(
                f"objective.itm_weight={self.itm_weight} needs a fusion encoder, and the model has none; "
                "set objective.itm_weight=0"
            )
        if self.name == "rvlr" and self.cross_modal_relation and self.relation_distance not in ("mae", "mse"):
            raise ValueError(
                f"objective.cross_modal_relation needs objective.relation_distance mae or mse, got "
                f"{self.relation_distance}; choose one of them or set objective.cross_modal_relation=false"
            )
        return self


class MetaConfig(Section):
    """CoVLR's meta step: consistency at theta, relations at theta' = theta - a grad(consistency)."""

    mode: Literal["joint", "heads", "first_order", "finite_difference"] = "joint"  # joint: theta' = theta
    inner_lr: float = Field(0.02, ge=0)
    inner_lr_unit: Literal["absolute", "gradient", "parameter"] = "parameter"
    # absolute: a = inner_lr; gradient: the shift is inner_lr long; parameter: inner_lr times as long as what it shifts
    test_batch: Literal["same", "next"] = "same"  # the batch whose relations are looked at at theta'
    epsilon: float | None = Field(None, gt=0)  # finite_difference: length of its two shifts over that of the
    # parameters; null: 2e-5 in fp32, 2e-4 in bf16

    @model_validator(mode="after")
    def _next_needs_a_shift(self) -> "MetaConfig":
        if self.mode == "joint" and self.test_batch == "next":
            raise ValueError("meta.test_batch=next needs a meta step, got meta.mode=joint; set meta.mode=heads")
        return self


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
    layer_decay: float = Field(1.0, gt=0, le=1)  # rate of a tower's block over that of the one after it; 1: equal
    unlock_after: dict[Literal["vision", "text"], PositiveInt] = {}  # steps that a tower waits unchanged


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    dtype: Literal["fp32", "bf16"] = "fp32"
    comm: Literal["auto", "gather", "ring", "half_ring"] = "auto"  # how embeddings of other ranks come; auto: by memory
    threads: int | None = Field(None, gt=0)  # CPU threads a rank; null: cores / ranks on this machine
    timeout_seconds: float = Field(600.0, gt=0)  # of every collective
    step_timeout_seconds: float | None = Field(None, gt=0)  # of reading a batch, a step, a validation or a checkpoint;
    # what takes longer is reported with its stacks in watchdog-rank-R.txt; null: never
    deepspeed: dict[str, Any] = {}  # further keys, passed through to DeepSpeed


class TrainConfig(Section):
    global_batch_size: int = Field(256, gt=0)  # pairs that meet in the loss, over all ranks
    chunk_size: int | None = Field(None, gt=0)  # pairs whose activations a tower keeps at once; null: all of a rank's
    max_steps: int = Field(1000, gt=0)
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(500, gt=0)
    checkpoint_minutes: float | None = Field(None, gt=0)  # and after so many minutes without one
    keep_checkpoints: int = Field(2, gt=0)
    keep_best: str | None = None  # measure of the evaluations, as rsum: its best model so far is kept in best/
    elastic: bool = False  # checkpoints that any world size and ZeRO stage can continue; as large again on disk
    bad_numbers: Literal["stop", "skip", "rollback"] = "stop"  # what follows a loss or gradient that is not finite
    max_bad_steps: int = Field(10, gt=0)  # so many of them in a row stop the run, whatever bad_numbers says


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
    csv: bool = False  # the numbers of metrics.jsonl and eval.jsonl also in the run's monitors/metrics.csv
    tensorboard: bool = False  # and for TensorBoard, in monitors/tensorboard
    wandb: Literal["none", "offline", "online"] = "none"  # and for Weights & Biases
    wandb_project: str = "vlscale"
    diagnostics_every: int | None = Field(None, gt=0)  # steps between looks at relations and gradients; null: never


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
        for tower, until in self.optim.unlock_after.items():
            if until >= self.train.max_steps:
                raise ValueError(
                    f"optim.unlock_after.{tower}={until} must be below train.max_steps={self.train.max_steps}: "
                    "the tower would never learn; lock it with model.locked instead"
                )
        if self.train.keep_best is not None and self.data.val is None:
            raise ValueError(
                f"train.keep_best={self.train.keep_best} needs evaluations, and data.val is not set; give data.val, "
                "and eval.every for more than the last"
            )
        o = self.objective
        if not (o.contrastive_weight or o.view_weight or o.caption_weight or o.needs_teachers):
            raise ValueError(
                "every objective weight is 0: nothing would be learned; set objective.contrastive_weight=1"
            )
        if o.needs_teachers and self.teacher.source == "none":
            weights = "iic, ttc, kd, kd_image and kd_text weights" if o.name == "rvlr" else "relation_weight"
            raise ValueError(
                f"objective.name={o.name} needs a teacher: got teacher.source=none, expected frozen_copy, hf (with "
                f"teacher.image and teacher.text) or cache (with teacher.cache), or set objective's {weights} to 0"
            )
        if self.meta_mode == "heads" and self.engine.comm in ("ring", "half_ring"):
            raise ValueError(
                f"meta.mode=heads differentiates the contrastive loss twice, which engine.comm={self.engine.comm} "
                "cannot; set engine.comm=gather, or meta.mode=first_order"
            )
        if self.meta_mode == "heads" and o.loss == "sigmoid" and o.impl != "reference":
            raise ValueError(
                "meta.mode=heads differentiates the contrastive loss twice, which the fused sigmoid loss is not: set "
                "meta.mode=first_order, objective.loss=softmax, or objective.impl=reference (quadratic memory)"
            )
        return self

    @property
    def teacher_cache(self) -> str | None:
        """The cache to read, where the objective needs its rows."""
        return self.teacher.cache if self.teacher.source == "cache" and self.objective.needs_teachers else None

    @property
    def meta_mode(self) -> str:
        """`meta.mode`, or joint where relations or consistency have no weight: there is then nothing to look at after a
        shift, or nothing to shift by."""
        return self.meta.mode if self.objective.distils and self.objective.contrasts else "joint"
