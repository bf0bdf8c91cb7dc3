"""Hard negatives, matching and masked words on one process; for ranks see tests/train/test_fused_over_ranks.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlscale.distributed import Ranks
from vlscale.objectives import matching as m
from vlscale.objectives.masked_language import Words, mask_words, masked_language

RANKS, SCALE = Ranks(), torch.tensor(5.0)


def rows(count: int, seed: int, ids: torch.Tensor | None = None) -> m.Rows:
    emb = F.normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), dim=1)
    return m.Rows(emb, torch.arange(count) if ids is None else ids)


def test_draws_follow_the_softmax_of_the_logits():
    """One row, 20,000 uniform numbers: frequencies within sampling error, its own id never."""
    one, columns = rows(1, 0), rows(7, 1, torch.tensor([3, 0, 1, 2, 0, 4, 5]))
    count = 20_000
    many = m.Rows(one.emb.expand(count, -1), torch.zeros(count, dtype=torch.long))
    found = m.draw(many, columns, SCALE, torch.rand(count, dtype=torch.float64))
    logits = (SCALE * one.emb @ columns.emb.T)[0].masked_fill(columns.pair_id == 0, -torch.inf)
    expected, got = logits.softmax(0), torch.bincount(found, minlength=7) / count
    assert (got[columns.pair_id == 0] == 0).all()
    assert ((got - expected).abs() <= 5 * (expected / count).sqrt()).all()


@pytest.mark.parametrize(("count", "size"), [(9, 4), (8, 4), (5, 16), (33, 1)])
def test_blocks_of_any_size_give_the_same_draws(monkeypatch, count, size):
    columns, uniform = rows(count, 1), torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    some = rows(12, 2, torch.arange(12) % count)
    whole = m.draw(some, columns, SCALE, uniform)
    monkeypatch.setattr(m, "COLUMNS", size)
    monkeypatch.setattr(m, "ROWS", size)
    assert torch.equal(m.draw(some, columns, SCALE, uniform), whole)


def test_the_ends_of_the_uniform_numbers_and_what_is_no_number():
    """The first and the last column that may be, whatever block they are in."""
    columns = rows(2500, 1, torch.cat([torch.zeros(1200), torch.arange(1.0, 101), torch.zeros(1200)]).long())
    ends = m.draw(rows(2, 0, torch.zeros(2).long()), columns, SCALE, torch.tensor([0.0, 1 - 2**-53]).double())
    assert ends[0] == 1200 and 1200 <= ends[1] < 1300
    broken = m.Rows(torch.full((3, 6), torch.nan), torch.arange(3))
    found = m.draw(broken, rows(10, 1), SCALE, torch.rand(3, dtype=torch.float64))
    assert ((found >= 0) & (found < 10)).all()


def test_draws_depend_on_the_key_and_the_place_alone():
    image, text, places = rows(64, 0), rows(64, 1), torch.arange(64)
    first = m.hard_negatives(image, text, places, SCALE, 7, RANKS)
    again = m.hard_negatives(image, text, places, SCALE, 7, RANKS)
    other = m.hard_negatives(image, text, places, SCALE, 8, RANKS)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = [m.Rows(side.emb[order], side.pair_id[order]) for side in (image, text)]
    for got, expected in zip(m.hard_negatives(*shuffled, places[order], SCALE, 7, RANKS), first, strict=True):
        assert torch.equal(order[got], expected[order])


@pytest.mark.parametrize("count", [1, 4])
def test_a_batch_of_one_id_is_refused(count):
    given = rows(count, 0, torch.full((count,), 9))
    with pytest.raises(ValueError, match=f"all {count} pairs of the batch share the id 9.* set objective.itm_weight=0"):
        m.hard_negatives(given, given, torch.arange(count), SCALE, 0, RANKS)


def test_matching_is_the_cross_entropy_of_all_pairs():
    logits = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    loss, metrics = m.matching(logits, RANKS)
    each = [F.cross_entropy(logits[i, j][None], torch.tensor([int(j == 0)])) for i in range(5) for j in range(3)]
    right = [logits[i, j].argmax() == int(j == 0) for i in range(5) for j in range(3)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    assert metrics["itm_accuracy"] == pytest.approx(sum(map(float, right)) / 15) and metrics["itm"] == loss


WORDS = Words(50, mask=1, special=np.arange(5))


def test_words_are_masked_in_the_shares_of_bert():
    ids = torch.randint(5, 50, (400, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 0], mask = 2, torch.ones_like(ids)
    mask[:, 25:] = 0
    masked = mask_words(ids, mask, torch.arange(400), WORDS, 0.2, 3, torch.device("cpu"))
    shown, asked = masked.input_ids.flatten()[masked.places], masked.words
    count = len(asked)
    assert torch.equal(asked, ids.flatten()[masked.places]) and sum(masked.counts) == count
    assert count == pytest.approx(0.2 * 400 * 24, rel=0.06) and set((masked.places % 30).tolist()) == set(range(1, 25))
    assert float((shown == 1).double().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((shown == asked).double().mean()) == pytest.approx(0.1 + 0.1 / 45, abs=0.025)
    assert (shown[shown != 1] >= 5).all()
    left = torch.ones(ids.numel(), dtype=torch.bool)
    left[masked.places] = False
    assert torch.equal(masked.input_ids.flatten()[left], ids.flatten()[left])


def test_masks_are_those_of_the_place_whatever_rank_has_it():
    ids, places = torch.randint(5, 50, (8, 6)), torch.arange(8)
    whole = mask_words(ids, torch.ones_like(ids), places, WORDS, 0.5, 3, torch.device("cpu"))
    longer = torch.nn.functional.pad(ids[4:], (0, 3))
    part = mask_words(longer, (longer > 0).long(), places[4:], WORDS, 0.5, 3, torch.device("cpu"))
    assert torch.equal(part.input_ids[:, :6], whole.input_ids[4:]) and part.counts == whole.counts[4:]


def test_nothing_masked_is_a_loss_of_zero():
    nothing = torch.zeros(0, requires_grad=True)
    loss, _ = masked_language(nothing, RANKS)
    assert loss == 0 and torch.autograd.grad(loss, nothing)[0].shape == (0,)
