"""What the plan counts of work that is left out: teachers that nobody asks, forwards that are not made again."""

from tests.train.test_plan import config_of, planned


def test_a_teacher_that_no_loss_looks_at_is_not_counted():
    both, text, image = (
        planned(config_of("objective.name=covlr", "teacher.source=frozen_copy", *weights)).operations["teachers"]
        for weights in ([], ["objective.relation_weight_image=0"], ["objective.relation_weight_text=0"])
    )
    assert text > 0 and image > 0 and text + image == both


def test_chunks_of_a_locked_tower_are_counted_once():
    def again(*overrides: str) -> int:
        whole, chunked = (planned(config_of(*overrides, *more)) for more in ([], ["train.chunk_size=16"]))
        return chunked.operations["towers"] - whole.operations["towers"]

    both, text, image = again(), again("model.locked=[vision]"), again("model.locked=[text]")
    assert text > 0 and image > 0 and text + image == both
