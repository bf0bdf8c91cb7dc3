"""What a plan knows of a run before anything is counted: its towers as traced, rows, ranks, ZeRO's settings, passes.

Legend: as in `memory_plan`.
"""

from dataclasses import dataclass, replace
from typing import Any

from vlscale.config import STAGE_PREFIX, PlannedRun
from vlscale.models.dual_encoder import final_folder
from vlscale.sections import Config, ModelConfig
from vlscale.train.comm import Comm
from vlscale.train.deepspeed_json import json_for_deepspeed
from vlscale.train.loss_terms import MASTER, Widths, gathered_bytes
from vlscale.train.memory_plan_trace import (
    FusedCost,
    TowerCost,
    picture_side,
    trace_fused,
    trace_teacher_heads,
    trace_towers,
)


@dataclass(frozen=True)
class Run:
    """What the costs are functions of."""

    config: Config
    world: int
    towers: dict[str, TowerCost]  # of the rows of one chunk
    forwards: dict[str, int]  # how many chunks each tower's rows are
    teachers: dict[str, TowerCost]
    teacher_widths: dict[str, int]
    side: int  # of a picture, in pixels
    zero: dict[str, Any]  # DeepSpeed's `zero_optimization`
    fused: FusedCost | None = None  # where the model has a fusion encoder: of the rows of one chunk
    teacher_heads: TowerCost | None = None  # rvlr's projections of its teachers' embeddings, of a rank's rows
    memory: int = 0  # bytes that a rank has, where known: what engine.comm=auto decides by

    @property
    def fuses(self) -> bool:
        return self.fused is not None and self.config.objective.fuses

    @property
    def parts(self) -> list[TowerCost]:
        """What the parameters are in."""
        return [*self.towers.values(), *(part for part in (self.fused, self.teacher_heads) if part is not None)]

    @property
    def once(self) -> "Once":
        """Of a forward and backward over the rows that are seen at once, one tower after the other."""
        if self.fuses:
            return Once(self.fused.saved, self.fused.peak, self.fused.peak_with_gradients)
        vision, text = self.towers["vision"], self.towers["text"]
        if self.chunked:
            return Once(0, max(vision.peak, text.peak), 0)
        return Once(
            saved=vision.saved + text.saved,
            peak=max(vision.peak, vision.saved + text.peak),
            peak_with_gradients=max(
                vision.saved + text.peak_with_gradients, text.learned * self.size + vision.peak_with_gradients
            ),
        )

    def teacher_width(self, modality: str) -> int:
        """Of its embeddings; those of a cache are counted as wide as the student's."""
        return self.teacher_widths.get(modality, self.config.model.embed_dim)

    @property
    def local(self) -> int:
        return self.config.train.global_batch_size // self.world

    @property
    def at_once(self) -> int:
        """Rows of a view that a tower sees at once."""
        return min(self.config.train.chunk_size or self.local, self.local)

    @property
    def stage(self) -> int:
        """Of ZeRO, as DeepSpeed is told: bf16 never runs at 0."""
        return self.zero["stage"]

    @property
    def rows(self) -> dict[str, int]:
        """Rows that each tower sees, all views."""
        o = self.config.objective
        return {"vision": self.local * (1 + (o.view_weight > 0)), "text": self.local * (1 + (o.caption_weight > 0))}

    @property
    def size(self) -> int:
        return 2 if self.config.engine.dtype == "bf16" else 4

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def learned(self) -> int:
        return sum(part.learned for part in self.parts)

    @property
    def losses(self) -> int:
        """Of one update, each over a global batch of its own."""
        return self.config.train.accumulate_losses

    @property
    def passes(self) -> "Passes":
        return PASSES[self.config.meta.mode, self.config.meta.test_batch]

    @property
    def gradient_size(self) -> int:
        """Bytes of a gradient that waits: sums of several losses are float32."""
        return MASTER if self.losses > 1 else self.size

    def offloads(self, key: str) -> bool:
        """`offload_optimizer` or `offload_param`, of DeepSpeed's keys."""
        return (self.zero.get(key) or {}).get("device", "none") != "none"

    @property
    def chunked(self) -> bool:
        return max(self.forwards.values()) > 1

    @property
    def sharded(self) -> int:
        """Ranks that the optimizer's states are split over."""
        return self.world if self.stage else 1

    @property
    def widths(self) -> Widths:
        fused = self.fused and self.fused.width
        return Widths(self.config.model.embed_dim, self.teacher_width("vision"), self.teacher_width("text"), fused)

    @property
    def met(self) -> Comm:
        """How losses meet the rows of other ranks."""
        everyone = self.config.train.global_batch_size
        gathered = gathered_bytes(self.config.objective, self.widths, everyone, self.size)
        return Comm(self.config.engine.comm, gathered, self.memory)

    @property
    def comm(self) -> str:
        """How contrasts do, which are no relations."""
        return "gather" if self.met.way == "gather" else "ring"


@dataclass(frozen=True)
class Once:
    """Bytes of activations."""

    saved: int
    peak: int
    peak_with_gradients: int


@dataclass(frozen=True)
class Passes:
    """What a step does beside one joint pass."""

    towers: int = 1  # forward and backward, of which
    consistency: int = 1  # end in consistency, and
    at_once: int = 1  # wait for one backward
    kept: int = 0  # gradients of all that learns, whole on every rank, beside a copy of the parameters


PASSES = {
    ("joint", "same"): Passes(),
    ("heads", "same"): Passes(),
    ("heads", "next"): Passes(towers=2, at_once=2),
    **{("first_order", test): Passes(towers=2, kept=1) for test in ("same", "next")},
    **{("finite_difference", test): Passes(towers=4, consistency=3, kept=3) for test in ("same", "next")},
}


def gather_facts(config: Config, plan: list[PlannedRun], world: int, memory: int = 0) -> Run:
    """Traces the towers of a run; seconds for a large one."""
    chunk, zero = config.train.chunk_size, json_for_deepspeed(config, world)["zero_optimization"]
    whole = Run(config, world, {}, {}, {}, {}, picture_side(config), zero, memory=memory)
    if chunk is not None and whole.local % chunk:
        raise ValueError(
            f"train.chunk_size={chunk} does not divide a rank's {whole.local} pairs (train.global_batch_size="
            f"{config.train.global_batch_size} over {world} ranks)"
        )
    rows = {name: count if chunk is None else min(chunk, count) for name, count in whole.rows.items()}
    forwards = {name: whole.rows[name] // count for name, count in rows.items()}
    teachers: dict[str, TowerCost] = {}
    if config.teacher.source in ("frozen_copy", "hf"):
        teacher = _teacher_config(config, plan)
        teachers = trace_towers(teacher, dict.fromkeys(rows, whole.at_once), learning=False)
    projected = config.teacher.source == "frozen_copy" and config.model.init_from is not None
    widths = {name: config.model.embed_dim if projected else tower.width for name, tower in teachers.items()}
    towers, fused = trace_towers(config, rows), None
    if config.model.fusion is not None:
        fused = trace_fused(config, rows, whole.at_once, chunk=whole.at_once < whole.local)
    whole = replace(whole, towers=towers, forwards=forwards, teachers=teachers, teacher_widths=widths, fused=fused)
    if config.objective.name == "rvlr" and config.objective.needs_teachers:
        wide = whole.teacher_width("vision"), whole.teacher_width("text")
        whole = replace(whole, teacher_heads=trace_teacher_heads(config, *wide, whole.local))
    return replace(whole, zero=json_for_deepspeed(config, world, whole.learned)["zero_optimization"])


def _teacher_config(config: Config, plan: list[PlannedRun]) -> Config:
    """A config whose towers are the teachers."""
    if config.teacher.source == "frozen_copy":
        return config
    towers = {"vision": config.teacher.image, "text": config.teacher.text}
    sections: dict[str, Any] = {"fusion": None}
    for modality, source in towers.items():
        if source.startswith(STAGE_PREFIX):
            stage = next((r for r in plan if r.name == source.removeprefix(STAGE_PREFIX)), None)
            if stage is None:
                raise ValueError(f"teacher: {source} names no stage of this plan")
            sections[modality] = getattr(stage.config.model, modality)
            if modality == "text":
                sections["fusion"] = stage.config.model.fusion
        else:
            own = getattr(ModelConfig(), modality)
            sections[modality] = own.model_copy(update={"source": final_folder(source)})
    text = sections["text"].model_copy(update={"max_length": config.model.text.max_length})
    model = config.model.model_copy(update=sections | {"text": text})
    return config.model_copy(update={"model": model})
