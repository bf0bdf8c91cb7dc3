"""`data`: what is read, how pictures are changed, how the stream is cut and kept."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vlscale.sections.base import Section


class AugmentConfig(Section):
    """Random changes of a training picture, keyed by (seed, epoch, sample key). Flips are off: captions say left."""

    shift: float = Field(0.0, ge=0, le=0.5)  # largest translation, as a fraction of the side
    noise: float = Field(0.0, ge=0, le=1)  # standard deviation of pixel noise, as a fraction of the value range
    crop_scale: float = Field(1.0, gt=0, le=1)  # smallest area of the random crop, as a fraction of the picture
    flip: bool = False
    # Colours, off as well: captions say red. Factors are drawn from 1 - x to 1 + x.
    brightness: float = Field(0.0, ge=0, le=1)
    contrast: float = Field(0.0, ge=0, le=1)  # about mid grey
    saturation: float = Field(0.0, ge=0, le=1)
    hue: float = Field(0.0, ge=0, le=0.5)  # largest turn, as a fraction of the circle
    grayscale: float = Field(0.0, ge=0, le=1)  # probability that a picture loses its colours


class DataConfig(Section):
    train: list[str] | None = None  # shard urls: paths, brace globs, http(s); null: has to be given
    val: list[str] | None = None
    weights: list[float] | None = (
        None  # each entry of `train` a source of its own, drawn at this rate; null: one corpus
    )
    max_repeats: int | None = Field(None, gt=0)  # passes over a source after which it ends; null: any number
    image_keys: list[str] = ["jpg", "jpeg", "png", "webp"]
    caption_key: str = "txt"  # a member's extension, or `json:FIELD` (a string or a list of strings)
    captions: Literal["random", "first", "in_turn", "all"] = "random"  # which one trains when a sample has several;
    # in_turn: one a pass over the corpus, so that after k passes each of k has trained once; all: each is a pair of its
    # own, one after the other, with the same view of the picture and one pair_id, so that they are positives
    pair_id: str | None = None  # `json:FIELD`: samples with equal values are positives of each other
    augment: AugmentConfig = AugmentConfig()
    decode: Literal["fast", "pil", "device"] = "fast"  # how pictures get the model's size: an area resize of what
    # JPEG's DCT scaling leaves; the processor's own, bit for bit; or on the device, by the processor's filter, cropped,
    # resized, flipped, coloured and scaled in one CUDA kernel (elsewhere in torch, slower): workers only decode
    max_pixels: int = Field(64_000_000, gt=0)
    lanes: int | None = Field(None, gt=0)  # logical streams; null: a power of two that divides the batch, 64 or, of a
    # batch of 4,096 pairs and more, one for every 32 pairs
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
    def _the_device_neither_shifts_nor_adds_noise(self) -> "DataConfig":
        if self.decode == "device" and (self.augment.shift or self.augment.noise):
            raise ValueError(
                f"data.decode=device crops, flips and colours, it neither shifts nor adds noise, got "
                f"data.augment.shift={self.augment.shift}, data.augment.noise={self.augment.noise}; "
                "set both to 0 or data.decode=fast"
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
