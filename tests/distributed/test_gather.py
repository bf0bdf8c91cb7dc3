"""Gathering over ranks: values, first and second derivatives, against one process that sees every row.

One launch of three gloo ranks runs all cases; each rank writes what it found and the test compares.
"""

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from vlscale.distributed import Ranks, gather_rows
from vlscale.objectives.total import Embedded, total_loss
from vlscale.sections import ObjectiveConfig
from vlscale.train.key_hash import key_hash

W, B, D = 3, 4, 6
KEYS = [f"sample-{i}" for i in range(W * B)]


def leaves() -> dict[str, torch.Tensor]:
    """Parameters, the same on every rank: one linear tower a modality and a logit scale, in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parameters = {"image": draw(5, D), "text": draw(5, D), "scale": torch.tensor(7.0, dtype=torch.float64)}
    return {name: value.requires_grad_() for name, value in parameters.items()}


def objective() -> ObjectiveConfig:
    return ObjectiveConfig(
        name="covlr",
        relation_weight_image=0.3,
        relation_weight_text=0.7,
        view_weight=0.5,
        caption_weight=0.25,
        impl="reference",
    )


def loss_of(parameters, rows: slice, ranks: Ranks) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(W * B, 5, generator=generator, dtype=torch.float64)[rows] for _ in range(6)]
    unit = torch.nn.functional.normalize
    embedded = Embedded(
        image=unit(inputs[0] @ parameters["image"]),
        text=unit(inputs[1] @ parameters["text"]),
        logit_scale=parameters["scale"],
        logit_bias=None,
        pair_id=(torch.arange(W * B) // 2)[rows],
        second_image=unit(inputs[2] @ parameters["image"]),
        second_text=unit(inputs[3] @ parameters["text"]),
        teacher_image=unit(inputs[4]),
        teacher_text=unit(inputs[5]),
    )
    return total_loss(embedded, objective(), ranks)[0]


def own_rows(rank: int) -> slice:
    return slice(rank * B, (rank + 1) * B)


def second_derivative(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Gradient of |d loss / d rows|^2, for loss = sum of cubes of products between all gathered rows."""
    everyone = gather_rows(rows, ranks)
    loss = (everyone @ everyone.T).pow(3).sum()
    (first,) = torch.autograd.grad(loss, rows, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), rows)[0]


def on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=W)
    ranks = Ranks(rank, W, torch.device("cpu"), dist.group.WORLD)
    parameters = leaves()
    loss = loss_of(parameters, own_rows(rank), ranks)
    loss.backward()
    rows = torch.randn(W * B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = {
        "loss": loss.detach(),
        "grads": {name: ranks.sum(value.grad) / W for name, value in parameters.items()},  # what an engine averages
        "second": second_derivative(rows[own_rows(rank)].clone().requires_grad_(), ranks),
        "integers": gather_rows(torch.arange(B) + 10 * rank, ranks),
        "hash": ranks.sum(torch.tensor(key_hash(KEYS[own_rows(rank)], torch.arange(W * B)[own_rows(rank)]))),
        "objects": ranks.gather_objects(rank),
        "first": ranks.from_first(f"from {rank}"),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_equal_one_process(tmp_path):
    multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=W)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(W)]

    parameters = leaves()
    alone = loss_of(parameters, slice(None), Ranks())
    alone.backward()
    for each in found:
        torch.testing.assert_close(each["loss"], alone.detach(), rtol=1e-12, atol=0)
        for name, value in parameters.items():
            torch.testing.assert_close(each["grads"][name], value.grad, rtol=1e-10, atol=1e-14)

    # Every rank's loss holds all rows, so the sum over ranks is W times the loss; squaring first derivatives of rank r
    # alone, then summing over ranks, gives W^2 times the whole, once more W by the outer sum's own graph.
    rows = torch.randn(W * B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    whole = second_derivative(rows, Ranks())
    together = torch.cat([each["second"] for each in found])
    torch.testing.assert_close(together, W**2 * whole, rtol=1e-10, atol=0)

    assert found[0]["integers"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert {int(each["hash"]) for each in found} == {key_hash(KEYS, torch.arange(W * B))}
    assert found[2]["objects"] == [0, 1, 2] and found[2]["first"] == "from 0"


def test_the_key_hash_sees_order_and_keys():
    positions = torch.arange(3)
    hashes = {key_hash(list(keys), positions) for keys in ("abc", "acb", "abd")}
    assert len(hashes) == 3 and all(-(1 << 63) <= value < 1 << 63 for value in hashes)
