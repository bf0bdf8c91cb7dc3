"""Gathering over ranks: values, first and second derivatives, against one process that sees every row.

One launch of three ranks a backend runs all cases; each rank writes what it found and the test compares.
"""

import pytest
import torch
import torch.distributed as dist

from tests.worlds import meet, worlds
from vlscale.distributed import Ranks, gather_rows, plan_exchange
from vlscale.objectives.total import Embedded, total_loss
from vlscale.sections import ObjectiveConfig
from vlscale.train.key_hash import key_hash

W, B, D = 3, 4, 6
WAYS = ("gather", "ring", "half_ring")
KEYS = [f"sample-{i}" for i in range(W * B)]


def leaves(device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Parameters, the same on every rank: one linear tower a modality and a logit scale, in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parameters = {"image": draw(5, D), "text": draw(5, D), "scale": torch.tensor(7.0, dtype=torch.float64)}
    return {name: value.to(device).requires_grad_() for name, value in parameters.items()}


def objective(impl: str) -> ObjectiveConfig:
    return ObjectiveConfig(
        name="covlr",
        relation_weight_image=0.3,
        relation_weight_text=0.7,
        view_weight=0.5,
        caption_weight=0.25,
        impl=impl,
    )


def loss_of(parameters, rows: slice, ranks: Ranks, comm: str = "auto", impl: str = "reference") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(W * B, 5, generator=generator, dtype=torch.float64)[rows] for _ in range(6)]
    inputs = [part.to(ranks.device) for part in drawn]
    unit = torch.nn.functional.normalize
    embedded = Embedded(
        image=unit(inputs[0] @ parameters["image"]),
        text=unit(inputs[1] @ parameters["text"]),
        logit_scale=parameters["scale"],
        logit_bias=None,
        pair_id=(torch.arange(W * B) // 2)[rows].to(ranks.device),
        second_image=unit(inputs[2] @ parameters["image"]),
        second_text=unit(inputs[3] @ parameters["text"]),
        teacher_image=unit(inputs[4]),
        teacher_text=unit(inputs[5]),
    )
    return total_loss(embedded, objective(impl), ranks, comm)[0]


def own_rows(rank: int) -> slice:
    return slice(rank * B, (rank + 1) * B)


def second_derivative(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Gradient of |d loss / d rows|^2, for loss = sum of cubes of products between all gathered rows."""
    everyone = gather_rows(rows, ranks)
    loss = (everyone @ everyone.T).pow(3).sum()
    (first,) = torch.autograd.grad(loss, rows, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), rows)[0]


def gradients(ranks: Ranks, rows: slice, comm: str = "auto", impl: str = "reference") -> dict[str, torch.Tensor]:
    """With the loss; as an engine averages them."""
    parameters = leaves(ranks.device)
    loss = loss_of(parameters, rows, ranks, comm, impl)
    loss.backward()
    return {"loss": loss.detach()} | {name: ranks.sum(value.grad) / ranks.size for name, value in parameters.items()}


def of_later_ranks(everyone: Ranks) -> dict[str, object]:
    """What the ranks but the first find among themselves: in their group they have other numbers."""
    group = dist.new_group(list(range(1, W)))
    if everyone.first:
        return {}
    ranks = Ranks(everyone.rank - 1, W - 1, everyone.device, group)
    rows = torch.arange(B, dtype=torch.float64, device=ranks.device) + 10 * ranks.rank
    wanted = torch.tensor([0, B, B + 1], device=ranks.device)
    ranks.barrier()
    return {
        "first": ranks.from_first(f"from {everyone.rank}"),
        "objects": ranks.gather_objects(everyone.rank),
        "rows": gather_rows(rows, ranks),
        "sum": ranks.sum(rows.clone()),
        "exchanged": plan_exchange(wanted, B, ranks)(rows),
        "grads": {comm: gradients(ranks, own_rows(everyone.rank), comm, "chunked") for comm in WAYS},
    }


def on_rank(ranks: Ranks) -> dict[str, object]:
    draw = torch.Generator().manual_seed(2)
    rows = torch.randn(W * B, D, generator=draw, dtype=torch.float64)[own_rows(ranks.rank)].to(ranks.device)
    places = torch.arange(W * B)[own_rows(ranks.rank)]
    return {
        "grads": gradients(ranks, own_rows(ranks.rank)),
        "second": second_derivative(rows.requires_grad_(), ranks),
        "integers": gather_rows(torch.arange(B, device=ranks.device) + 10 * ranks.rank, ranks),
        "hash": ranks.sum(torch.tensor(key_hash(KEYS[own_rows(ranks.rank)], places), device=ranks.device)),
        "objects": ranks.gather_objects(ranks.rank),
        "first": ranks.from_first(f"from {ranks.rank}"),
        "later": of_later_ranks(ranks),
    }


@pytest.fixture(scope="module", params=worlds(W))
def found(request, tmp_path_factory) -> list[dict]:
    return meet(on_rank, request.param, tmp_path_factory.mktemp(str(request.param)))


def test_three_ranks_equal_one_process(found):
    alone = gradients(Ranks(), slice(None))
    for each in found:
        torch.testing.assert_close(each["grads"]["loss"], alone["loss"], rtol=1e-12, atol=0)
        for name, value in alone.items():
            torch.testing.assert_close(each["grads"][name], value, rtol=1e-10, atol=1e-14)

    # Every rank's loss holds all rows, so the sum over ranks is W times the loss; squaring first derivatives of rank r
    # alone, then summing over ranks, gives W^2 times the whole, once more W by the outer sum's own graph.
    rows = torch.randn(W * B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    whole = second_derivative(rows, Ranks())
    together = torch.cat([each["second"] for each in found])
    torch.testing.assert_close(together, W**2 * whole, rtol=1e-10, atol=0)

    assert found[0]["integers"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert {int(each["hash"]) for each in found} == {key_hash(KEYS, torch.arange(W * B))}
    assert found[2]["objects"] == [0, 1, 2] and found[2]["first"] == "from 0"


def test_a_group_without_the_first_process_is_a_world_of_its_own(found):
    later = [each["later"] for each in found[1:]]
    alone = gradients(Ranks(), slice(B, W * B))
    for rank, each in enumerate(later):
        assert each["first"] == "from 1" and each["objects"] == [1, 2]
        assert each["rows"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13] and each["sum"].tolist() == [10, 12, 14, 16]
        assert each["exchanged"].tolist() == [0, 10, 11], rank
        for comm in WAYS:
            for name, value in alone.items():
                torch.testing.assert_close(each["grads"][comm][name], value, rtol=1e-9, atol=1e-12, msg=comm)


def test_the_key_hash_sees_order_and_keys():
    positions = torch.arange(3)
    hashes = {key_hash(list(keys), positions) for keys in ("abc", "acb", "abd")}
    assert len(hashes) == 3 and all(-(1 << 63) <= value < 1 << 63 for value in hashes)
