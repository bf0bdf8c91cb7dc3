"""Which terms a run's loss has, how wide their rows are, and what gathering all of these takes: from the config alone.

Legend: N global pairs, D embedding width; D_s and D_t, the widths of a relation term's student and of all its teachers.
"""

from dataclasses import dataclass

from vlscale.sections import ObjectiveConfig

MASTER = 4  # bytes of a gradient inside a loss


@dataclass(frozen=True)
class Widths:
    """Of the rows that terms look at."""

    embedding: int
    teacher_image: int
    teacher_text: int
    fused: int | None = None  # where the model has a fusion encoder


@dataclass(frozen=True)
class Relations:
    """A term that holds a student's relations to those of teachers."""

    distance: str  # kl, mae, mse or wasserstein
    student: int  # D_s
    teachers: int  # D_t
    frozen_student: bool = False
    mixed: bool = False  # the teachers' weights learn; but for kl they get their gradient by that of the teachers' rows

    @property
    def width(self) -> int:
        return self.student + self.teachers

    @property
    def learned(self) -> int:
        return self.student * (not self.frozen_student) + self.teachers * (self.mixed and self.distance != "kl")


def contrasts(o: ObjectiveConfig) -> int:
    """How many terms contrast two embeddings of each pair."""
    weights = [o.contrastive_weight, o.view_weight, o.caption_weight]
    if o.name == "rvlr":
        weights += [o.iic_weight, o.ttc_weight]
    return sum(weight > 0 for weight in weights)


def relations(o: ObjectiveConfig, widths: Widths) -> list[Relations]:
    """The terms that hold relations, in the order of the objectives."""
    width, image, text = widths.embedding, widths.teacher_image, widths.teacher_text
    if o.name != "rvlr":
        sides = (image, o.image_relation_weight), (text, o.text_relation_weight)
        return [Relations("kl", width, teacher) for teacher, weight in sides if weight > 0]
    students = [width, width] if widths.fused is None else [widths.fused]
    kd = [Relations(o.relation_distance, student, image + text, mixed=True) for student in students]
    if o.cross_modal_relation:
        kd.append(Relations(o.relation_distance, width, width + image + text, mixed=True))
    terms = kd * (o.kd_weight > 0)
    for teacher, weight in ((image, o.kd_image_weight), (text, o.kd_text_weight)):
        if weight > 0:
            terms.append(Relations(o.relation_distance, teacher, image + text, frozen_student=True, mixed=True))
    return terms


def gathered_bytes(o: ObjectiveConfig, widths: Widths, everyone: int, size: int) -> int:
    """What all terms together take on a rank by gather: N rows as they travel, `size` bytes a number, and float32 of
    them to work on or as gradients. Not the terms that have one way whatever is asked for: mse, wasserstein."""
    moved = sum(term.width for term in relations(o, widths) if term.distance in ("kl", "mae"))
    return everyone * (contrasts(o) * widths.embedding + moved) * (size + MASTER)
