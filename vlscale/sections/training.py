"""`optim`, `engine`, `train`, `eval` and `log`: how a run goes."""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, field_validator, model_validator

from vlscale.sections.base import Section

Protocol = Literal["auto", "pairs", "synthetic", "labels", "flickr30k", "vizwiz", "coco-5k", "coco-1k", "cxc", "eccv"]


class OptimConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # not applied to norms, biases and scales
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    fused: Literal["auto"] | bool = "auto"  # the update in one kernel; auto: wherever torch has it for the device
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    clip_norm: float = Field(1.0, ge=0)  # global gradient norm; 0: no clipping
    layer_decay: float = Field(1.0, gt=0, le=1)  # rate of a tower's block over that of the one after it; 1: equal
    unlock_after: dict[Literal["vision", "text", "fusion"], PositiveInt] = {}  # steps that a tower waits unchanged, or
    # the fusion encoder: it learns from the first step where it is not named, also over a text tower that waits


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    dtype: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False  # towers keep the inputs of their blocks and compute the rest again
    offload_optimizer: Literal["none", "cpu"] = "none"  # where master weights and optimizer states live
    offload_parameters: Literal["none", "cpu"] = "none"  # ZeRO-3 only: where a rank's shards of the weights live
    comm: Literal["auto", "gather", "ring", "half_ring"] = "auto"  # how embeddings of other ranks come; auto: by memory
    # (wasserstein distances and the draw of matching's negatives take all of them at once, whatever it says)
    threads: int | None = Field(None, gt=0)  # CPU threads a rank; null: cores / ranks on this machine
    timeout_seconds: float = Field(600.0, gt=0)  # of every collective
    warm_timeout_seconds: float = Field(300.0, gt=0)  # of those of a step once two are made; at most timeout_seconds
    step_timeout_seconds: float | None = Field(None, gt=0)  # of reading a batch, a step, a validation or a checkpoint;
    # what takes longer is reported with its stacks in watchdog-rank-R.txt; null: never
    deepspeed: dict[str, Any] = {}  # further keys, passed through to DeepSpeed

    @model_validator(mode="after")
    def _stage_can_offload(self) -> "EngineConfig":
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"engine.offload_optimizer={self.offload_optimizer} needs ZeRO, got engine.zero_stage=0; set "
                "engine.zero_stage to 1, 2 or 3, or engine.offload_optimizer=none"
            )
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"engine.offload_parameters={self.offload_parameters} needs shards of the weights, got "
                f"engine.zero_stage={self.zero_stage}; set engine.zero_stage=3, or engine.offload_parameters=none"
            )
        return self


class TrainConfig(Section):
    global_batch_size: int = Field(256, gt=0)  # pairs that meet in the loss, over all ranks
    chunk_size: int | None = Field(None, gt=0)  # pairs whose activations a tower keeps at once; null: all of a rank's
    accumulate_losses: int = Field(1, gt=0)  # global batches whose losses one update is the mean of. Pairs of different
    # ones never meet, so negatives do not grow: for a larger batch than memory holds there is chunk_size
    max_steps: int | None = Field(None, gt=0)  # updates; either these or epochs have to be given
    epochs: float | None = Field(None, gt=0)  # passes over data.train's samples, rounded up to a whole update; with
    # data.weights, over as many samples as all sources together hold
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(500, gt=0)
    checkpoint_minutes: float | None = Field(None, gt=0)  # and after so many minutes without one
    keep_checkpoints: int = Field(2, gt=0)
    checkpoint_async: bool = True  # written while training goes on, from a copy in host memory; false: training waits
    checkpoint_remote: str | None = None  # url under which complete checkpoints are copied, RUN/step-N, the last
    # keep_checkpoints of them; --resume fetches the newest one where there is none here
    disk_full: Literal["stop", "continue"] = "stop"  # what follows a checkpoint that cannot be written
    keep_best: str | None = None  # measure of the evaluations, as rsum: its best model so far is kept in best/
    elastic: bool = False  # checkpoints that any world size and ZeRO stage can continue; as large again on disk
    bad_numbers: Literal["stop", "skip", "rollback"] = "stop"  # what follows a loss or gradient that is not finite
    max_bad_steps: int = Field(10, gt=0)  # so many of them in a row stop the run, whatever bad_numbers says

    @field_validator("checkpoint_remote")
    @classmethod
    def _url_without_secrets(cls, url: str | None) -> str | None:
        """The config is kept in the run's folder, and shown."""
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme in ("", "http", "https") or len(parts.scheme) == 1:
            raise ValueError("train.checkpoint_remote has to be an url that can be written to, as s3://BUCKET/FOLDER")
        if parts.password is not None or parts.query:
            raise ValueError(
                "train.checkpoint_remote holds a password or a query, and configs are kept and shown; give credentials "
                "by the environment or the files of the store's own tools"
            )
        return url

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.max_steps={self.max_steps} and train.epochs={self.epochs:g} both say how long the run is; keep "
                "one and set the other to null"
            )
        return self

    @property
    def pairs_a_step(self) -> int:
        """That one update learns from."""
        return self.global_batch_size * self.accumulate_losses


class EvalConfig(Section):
    every: int | None = Field(None, gt=0)  # steps between evaluations; null: only at the end
    protocol: Protocol = "auto"
    labels: list[str] = []  # json fields whose equal values are relevant (protocol `labels`)
    annotations: str | None = None  # folder of CxC's csv files (protocol `cxc`)
    cache: str | None = None  # folder that keeps ROUGE-L relevance (protocols of captioned pictures)
    batch_size: int = Field(256, gt=0)
    rerank: int | None = Field(None, gt=0)  # nearest of each query that the fusion encoder scores; null: none


class LogConfig(Section):
    every: int = Field(10, gt=0)  # steps between lines where there is no terminal
    progress: bool = True  # false: neither bar nor lines
    csv: bool = False  # the numbers of metrics.jsonl and eval.jsonl also in the run's monitors/metrics.csv
    tensorboard: bool = False  # and for TensorBoard, in monitors/tensorboard
    wandb: Literal["none", "offline", "online"] = "none"  # and for Weights & Biases
    wandb_project: str = "vlscale"
    diagnostics_every: int | None = Field(None, gt=0)  # steps between looks at relations and gradients; null: never
