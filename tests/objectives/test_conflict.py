"""Relations that oppose consistency: each rule by its equation, on one process and over ranks."""

import pytest
import torch

from tests.objectives import conflict_cases as c
from tests.worlds import meet, worlds
from vlscale.config import validate
from vlscale.distributed import Ranks
from vlscale.objectives.conflict import resolved

CASES = [(case, rule) for case in range(len(c.OBJECTIVES)) for rule in c.RULES]


def check(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name].double(), value.double(), rtol=1e-9, atol=1e-11, msg=name)


@pytest.fixture(scope="module", params=worlds(2))
def over_two(request, tmp_path_factory):
    return meet(c.on_rank, request.param, tmp_path_factory.mktemp(str(request.param)))


@pytest.mark.parametrize(("case", "rule"), CASES)
def test_gradients_are_those_of_the_table(case, rule):
    check(c.gradients(case, rule, Ranks()), c.expected(case, rule))


@pytest.mark.parametrize(("case", "rule"), CASES)
def test_two_ranks_are_one_process(over_two, case, rule):
    wanted = c.expected(case, rule)
    for found in over_two:
        check(found[case, rule], wanted)


def test_the_cases_do_conflict_and_the_rules_differ():
    found = {rule: c.gradients(0, rule, Ranks()) for rule in c.RULES}
    assert max(found["scale"]["conflict_image"], found["scale"]["conflict_text"]) < -0.2
    assert not torch.allclose(found["keep"]["image"], found["project"]["image"], rtol=1e-3)
    assert not torch.allclose(found["scale"]["image"], found["project"]["image"], rtol=1e-3)


def test_by_hand():
    """Consistency pulls along (1, 0), relations along (-1, 1): the cosine is -1 / sqrt(2)."""
    for rule, wanted in (("keep", (0.0, 1.0)), ("scale", (2**-0.5, 1 - 2**-0.5)), ("project", (1.0, 1.0))):
        x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        loss, metrics = resolved(x[0, 0], x[0, 1] - x[0, 0], {"image": x}, rule, Ranks())
        loss.backward()
        assert x.grad[0].tolist() == pytest.approx(wanted) and loss == 0
        assert rule == "keep" or metrics["conflict_image"] == pytest.approx(-(2**-0.5))


def test_what_agrees_is_left_as_it_is():
    for rule in ("scale", "project"):
        x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        resolved(x[0, 0], x[0, 0] + x[0, 1], {"image": x}, rule, Ranks())[0].backward()
        assert x.grad[0].tolist() == pytest.approx([2.0, 1.0])


def test_gradients_at_two_places_are_not_compared():
    given = {"objective": {"name": "covlr", "conflict": "project"}, "teacher": {"source": "frozen_copy"}}
    assert validate(given, "x").objective.conflict == "project"
    with pytest.raises(ValueError, match=r"set meta\.mode=joint, or objective\.conflict=keep"):
        validate(given | {"meta": {"mode": "heads"}}, "x")
