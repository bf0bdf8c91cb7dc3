"""The sections of a run's configuration and their defaults: typed, closed to unknown keys, never changed once made."""

from pydantic import model_validator

from vlscale.sections.base import Section
from vlscale.sections.data import AugmentConfig, DataConfig
from vlscale.sections.model import FusionConfig, ModelConfig, TeacherConfig, TextConfig, VisionConfig
from vlscale.sections.objective import MetaConfig, ObjectiveConfig
from vlscale.sections.training import EngineConfig, EvalConfig, LogConfig, OptimConfig, Protocol, TrainConfig

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "FusionConfig",
    "LogConfig",
    "MetaConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Protocol",
    "Section",
    "TeacherConfig",
    "TextConfig",
    "TrainConfig",
    "VisionConfig",
    "check_schedule",
]


def check_schedule(optim: OptimConfig, steps: int, length: str) -> None:
    """Raises ValueError where the schedule needs more than the run's `steps`, whose origin `length` names."""
    if optim.warmup_steps >= steps:
        raise ValueError(f"optim.warmup_steps={optim.warmup_steps} must be below {length}")
    for tower, until in optim.unlock_after.items():
        if until >= steps:
            instead = "leave model.fusion out" if tower == "fusion" else "lock it with model.locked"
            raise ValueError(
                f"optim.unlock_after.{tower}={until} must be below {length}: it would never learn; {instead} instead"
            )


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
        if self.train.max_steps is not None:
            check_schedule(self.optim, self.train.max_steps, f"train.max_steps={self.train.max_steps}")
        if self.train.epochs is not None:
            self._epochs_can_be_counted()
        if self.train.keep_best is not None and self.data.val is None:
            raise ValueError(
                f"train.keep_best={self.train.keep_best} needs evaluations, and data.val is not set; give data.val, "
                "and eval.every for more than the last"
            )
        best, rerank = self.train.keep_best, self.eval.rerank
        if best is not None and "/" not in best and "rsum" not in best:
            raise ValueError(
                f"train.keep_best={best} is no measure of an evaluation; expected one such as rsum, i2t/r@1 or "
                "t2t/ndcg@10_norm, as `vlscale eval` writes them with --json"
            )
        if rerank is not None and self.data.val is not None and self.model.fusion is None:
            raise ValueError(
                f"eval.rerank={rerank} needs a fusion encoder, and the model has none; set eval.rerank=null, or give "
                "model.fusion"
            )
        narrow = self.engine.dtype == "bf16" and self.engine.zero_stage < 3
        if self.train.accumulate_losses > 1 and self.engine.offload_optimizer != "none" and narrow:
            raise ValueError(
                f"train.accumulate_losses={self.train.accumulate_losses} with engine.offload_optimizer="
                f"{self.engine.offload_optimizer} and engine.dtype=bf16: at ZeRO-{self.engine.zero_stage} DeepSpeed "
                "adds the gradients up in bf16, which loses them; set engine.zero_stage=3, or "
                "engine.offload_optimizer=none"
            )
        o, fusion = self.objective, self.model.fusion is not None
        asked = {"itm_weight": o.itm_weight or 0, "mlm_weight": o.mlm_weight}
        for name, weight in asked.items():
            if weight > 0 and not fusion:
                raise ValueError(
                    f"objective.{name}={weight:g} needs a fusion encoder, and the model has none; set "
                    f"objective.{name}=0, or give model.fusion"
                )
        if fusion and o.name == "rvlr" and o.cross_modal_relation:
            raise ValueError(
                "objective.cross_modal_relation goes with relations of embeddings, and with model.fusion relations are "
                "those of the fused pairs; set objective.cross_modal_relation=false"
            )
        if not (o.contrasts or o.needs_teachers or (fusion and o.fuses)):
            raise ValueError(
                "every objective weight is 0: nothing would be learned; set objective.contrastive_weight=1"
            )
        nothing = o.too_few_pairs(self.train.global_batch_size, fusion)
        if nothing is not None:
            raise ValueError(
                f"train.global_batch_size={self.train.global_batch_size}: {nothing}; train.chunk_size makes room for "
                "more, train.accumulate_losses does not: pairs of different losses never meet"
            )
        if o.needs_teachers and self.teacher.source == "none":
            weights = "iic, ttc, kd, kd_image and kd_text weights" if o.name == "rvlr" else "relation_weight"
            raise ValueError(
                f"objective.name={o.name} needs a teacher: got teacher.source=none, expected frozen_copy, hf (with "
                f"teacher.image and teacher.text) or cache (with teacher.cache), or set objective's {weights} to 0"
            )
        if o.conflict != "keep" and self.meta_mode != "joint":
            raise ValueError(
                f"objective.conflict={o.conflict} compares gradients at one place, and meta.mode={self.meta_mode} "
                "takes them at two; set meta.mode=joint, or objective.conflict=keep"
            )
        if o.relation_reliability and o.name == "covlr" and o.distils and self.teacher.source == "cache":
            raise ValueError(
                "objective.relation_reliability shows the teachers two views of each sample, and a cache has one: set "
                "teacher.source=hf with its teachers, or objective.relation_reliability=false"
            )
        if self.meta_mode == "heads" and self.engine.comm in ("ring", "half_ring"):
            raise ValueError(
                f"meta.mode=heads differentiates the contrastive loss twice, which engine.comm={self.engine.comm} "
                "cannot; set engine.comm=gather, or meta.mode=first_order"
            )
        return self

    def _epochs_can_be_counted(self) -> None:
        epochs, data = self.train.epochs, self.data
        if data.captions == "all" and data.caption_key.startswith("json:"):
            raise ValueError(
                f"train.epochs={epochs:g} with data.captions=all: how many pairs a pass over {data.caption_key} has is "
                "not known before all of it is read; give train.max_steps instead"
            )
        if data.max_repeats is not None and data.weights is None and epochs >= data.max_repeats:
            raise ValueError(
                f"train.epochs={epochs:g} needs more passes than data.max_repeats={data.max_repeats} allows; set "
                "data.max_repeats=null"
            )

    @property
    def teacher_cache(self) -> str | None:
        """The cache to read, where the objective needs its rows."""
        return self.teacher.cache if self.teacher.source == "cache" and self.objective.needs_teachers else None

    @property
    def meta_mode(self) -> str:
        """`meta.mode`, or joint where a meta step would have nothing to do."""
        return "joint" if self.why_joint else self.meta.mode

    @property
    def why_joint(self) -> str | None:
        """Why a run that asks for a meta step is made of joint steps; None where it is not, and where it asks for
        none."""
        o, fusion = self.objective, self.model.fusion is not None
        heads = self.meta.mode == "heads"
        if self.meta.mode == "joint":
            return None
        if not o.distils:
            return "no relation has a weight, so there is nothing to look at after a shift; set meta.mode=joint"
        if not (o.contrasts or (fusion and not heads and (o.matching_weight or o.mlm_weight))):
            return "consistency has no weight to shift by; set objective.contrastive_weight=1, or meta.mode=joint"
        if heads and fusion and o.name == "rvlr":
            return (
                "it shifts the projections, and with model.fusion RVLR's relations are those of fused pairs, which no "
                "projection reaches; set meta.mode=first_order for a meta step, or joint"
            )
        return None
