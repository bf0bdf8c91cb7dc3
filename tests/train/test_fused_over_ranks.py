"""Every term of a fusion encoder over ranks against one plain process: gradients, hard negatives, bytes, refusals."""

import functools
from dataclasses import replace

import pytest
import torch

from tests.train import fused_over_ranks as o
from tests.worlds import World, meet, worlds
from vlscale.distributed import Ranks

WORLDS = worlds(2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of a world found; one launch for all tests."""

    @functools.cache
    def launch(world: World) -> list[dict]:
        return meet(o.on_rank, world, tmp_path_factory.mktemp(str(world)))

    return launch


@functools.cache
def truth_of(case: o.Case) -> dict[str, torch.Tensor]:
    return o.truth(case)


def truth(case: o.Case) -> dict[str, torch.Tensor]:
    """However it is computed over ranks."""
    return truth_of(replace(case, chunks=1, dtype=torch.float64, comm="auto"))


def check(got: dict[str, torch.Tensor], case: o.Case) -> None:
    """Each parameter within the bound of its gradient, or of a thousandth of the whole where its own is next to
    zero."""
    exact, bound = truth(case), 1e-5 if case.dtype == torch.float32 else 1e-10
    found = {name: value for name, value in got.items() if name not in ("loss", "metrics")}
    assert found.keys() == exact.keys() - {"loss"}
    torch.testing.assert_close(got["loss"].double(), exact["loss"], rtol=bound, atol=0)
    floor = 1e-3 * torch.cat([exact[name].flatten() for name in found]).norm() / len(found) ** 0.5
    for name, value in found.items():
        error = (value.double() - exact[name]).norm() / max(exact[name].norm(), floor)
        assert error <= bound, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("case", o.CASES, ids=str)
def test_gradients_of_one_process_are_the_plain_ones(case):
    check(o.gradient(case, Ranks()), case)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", o.CASES, ids=str)
def test_gradients_over_ranks_are_the_plain_ones(found, world, case):
    ranks = [each["cases"][str(case)] for each in found(world)]
    for each in ranks[1:]:
        assert {k: float(v) for k, v in each["metrics"].items()} == {
            k: float(v) for k, v in ranks[0]["metrics"].items()
        }
    check(ranks[0], case)


def test_every_part_of_the_fusion_encoder_learns():
    got = o.gradient(next(case for case in o.CASES if case.name == "everything"), Ranks())
    parts = ("fusion.", "masked_head.", "vision_model.", "text_model.")
    model = o.model(False, torch.float64)
    learned = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    left = {name for name in learned if name not in got or not got[name].any()}
    assert {name for name in left if not name.endswith("key.bias")} == set()  # a softmax is blind to those


@pytest.mark.parametrize("world", [World(1), *WORLDS], ids=str)
def test_hard_negatives_are_those_of_a_plain_sampler(found, world):
    """2,400 pairs: three blocks of columns; the same draws at any number of ranks."""
    image, text, ids = o.many(2400)
    expected = o.plain_negatives(image.double(), text.double(), torch.tensor(8.0).double(), ids)
    of_ranks = [each["draws"] for each in found(world)] if world.size > 1 else [o.draws(Ranks(), 2400)]
    for side in range(2):
        got = torch.cat([each[side] for each in of_ranks])
        assert (got == expected[side]).double().mean() >= 0.9995  # float32 against float64 at a boundary
        assert not (ids[got] == ids).any()
        assert len(got.unique()) > 600  # a draw, not the nearest


@pytest.mark.parametrize("world", WORLDS)
def test_rows_that_are_asked_for_come_and_their_gradients_go_back(found, world):
    ranks = [each["exchanged"] for each in found(world)]
    everyone, wanted = ranks[0]["everyone"], ranks[0]["wanted"]
    leaf = everyone.clone().requires_grad_()
    weight = torch.arange(1.0, 5.0, dtype=torch.float64)[:, None]
    total = sum((leaf[wanted[rank]] * weight * (rank + 1)).square().sum() for rank in range(world.size))
    (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    for rank, each in enumerate(ranks):
        own = slice(3 * rank, 3 * rank + 3)
        assert torch.equal(each["found"], everyone[wanted[rank]])
        torch.testing.assert_close(each["grad"], grad[own].detach())
        torch.testing.assert_close(each["second"], second[own])
        away, asked = each["rows"]
        assert each["bytes"] == 2 * (away + asked) * 5 * 8  # there and back, and the same for the second derivative


@pytest.mark.parametrize("world", WORLDS)
def test_pairs_that_all_share_an_id_are_refused_on_every_rank(found, world):
    for each in found(world):
        assert each["refused"].startswith(
            f"objective.itm_weight: all {2 * world.size} pairs of the batch share the id 5"
        )
        assert "set objective.itm_weight=0" in each["refused"]
