"""Relation weights by how far each teacher can be trusted: `objective.relation_reliability`.

Measured once, before the first step, on the first global batch of the run's stream with two views of each picture and
two captions of each sample: the same at any number of ranks and after a resume, so nothing of it has to be saved.
"""

from contextlib import closing
from dataclasses import replace

from vlscale.data.batch import Batch
from vlscale.distributed import Ranks, gather_rows
from vlscale.logging import get_logger
from vlscale.objectives.reliability import agreement
from vlscale.sections import AugmentConfig, Config, TeacherConfig
from vlscale.train.setup import Parts, build_stream

MOST = 1024  # samples that are compared, all with all
VIEWS = AugmentConfig(shift=0.1, noise=0.05)  # whatever data.augment is: the teacher is judged, not the training
_DIGITS = 3  # so that the rounding of another number of ranks changes nothing


def weighed(config: Config, parts: Parts, ranks: Ranks) -> Config:
    """The config with each modality's relation weight times its teacher's reliability, which the log tells."""
    objective = config.objective
    if not (objective.relation_reliability and objective.name == "covlr" and objective.distils):
        return config
    found = teacher_reliability(config, parts, ranks)
    if ranks.first:
        get_logger().info("reliability of the teachers' relations: image %.3f, text %.3f", *found)
    weights = {
        "relation_weight_image": objective.image_relation_weight * found[0],
        "relation_weight_text": objective.text_relation_weight * found[1],
    }
    return config.model_copy(update={"objective": objective.model_copy(update=weights)})


def teacher_reliability(config: Config, parts: Parts, ranks: Ranks) -> tuple[float, float]:
    """Of the image and the text teacher, each in [0, 1], the same on every rank."""
    with closing(iter(build_stream(_two_views(config), parts, ranks, state=None))) as batches:
        batch = next(batches)
    views = [parts.inputs.teacher_rows(each) for each in (batch, _second(batch))]
    if not any(ranks.gather_objects(batch.captions != batch.second_captions)) and ranks.first:
        get_logger().warning(
            "objective.relation_reliability: no sample has two captions, so the text teacher counts as reliable"
        )
    pairs = zip(*views, strict=True)
    found = [agreement(*(gather_rows(rows.float(), ranks)[:MOST] for rows in pair)) for pair in pairs]
    image, text = ranks.from_first([round(value, _DIGITS) for value in found])
    return image, text


def _two_views(config: Config) -> Config:
    data = config.data.model_copy(update={"augment": VIEWS, "captions": "random", "workers": 0, "prefetch": 1})
    objective = config.objective.model_copy(update={"view_weight": 1.0, "caption_weight": 1.0})
    return config.model_copy(update={"data": data, "objective": objective, "teacher": TeacherConfig()})


def _second(batch: Batch) -> Batch:
    return replace(
        batch,
        images=batch.second_images,
        captions=batch.second_captions,
        input_ids=batch.second_input_ids,
        attention_mask=batch.second_attention_mask,
    )
