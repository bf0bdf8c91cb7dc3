"""Metrics against hand-made tables, against counting all orders, and chance against simulation."""

from itertools import permutations

import pytest
import torch

from vlscale.evaluate.metrics import (
    Ranks,
    at_r_chance,
    best_positive,
    ndcg,
    over_chance,
    own_modality,
    own_modality_chance,
    precision_at_r,
    recall_chance,
)


def table(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def marks(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_rank_is_that_of_the_best_positive_among_the_others():
    # captions 1 and 3 belong to the image; 3 is the better of them, and only caption 0 stands above it
    ranks = best_positive(table([0.9, 0.1, 0.2, 0.5]), marks([0, 1, 0, 1]))
    assert (ranks.above.item(), ranks.tied.item(), ranks.same.item()) == (1, 0, 1)
    assert ranks.expected().item() == 2
    assert [ranks.recall(k).item() for k in (1, 2, 3)] == [0, 1, 1]


def test_a_positive_above_the_best_positive_does_not_count():
    ranks = best_positive(table([0.9, 0.8, 0.7]), marks([1, 1, 0]))
    assert ranks.expected().item() == 1


def test_excluded_items_are_neither_above_nor_positive():
    scores, positive = table([0.9, 0.8, 0.7, 0.6]), marks([1, 0, 0, 1])
    ranks = best_positive(scores, positive, torch.tensor([[0, 1]]))
    assert ranks.expected().item() == 2
    padded = best_positive(scores, positive, torch.tensor([[-1, -1]]))
    assert padded.expected().item() == 1


def test_a_query_without_a_positive_is_nan():
    ranks = best_positive(table([0.3, 0.2]), marks([0, 0]))
    assert ranks.expected().isnan().all() and ranks.recall(1).isnan().all()


@pytest.mark.parametrize("above, tied, same", [(0, 0, 1), (0, 3, 1), (2, 2, 2), (1, 0, 3), (0, 4, 2)])
def test_ties_count_as_the_mean_over_all_orders(above, tied, same):
    ranks = Ranks(*(torch.tensor([n]) for n in (above, tied, same)))
    firsts = [order.index(True) + above + 1 for order in permutations([False] * tied + [True] * same)]
    assert ranks.expected().item() == pytest.approx(sum(firsts) / len(firsts))
    for k in range(1, above + tied + same + 2):
        assert ranks.recall(k).item() == pytest.approx(sum(first <= k for first in firsts) / len(firsts)), k


def test_a_million_ties_stay_exact():
    ranks = Ranks(torch.tensor([0]), torch.tensor([999_999]), torch.tensor([1]))
    assert ranks.recall(10).item() == pytest.approx(1e-5, rel=1e-6)
    assert ranks.expected().item() == 500_000.5


def test_recall_chance_is_what_random_orders_score():
    generator = torch.Generator().manual_seed(0)
    positive = torch.zeros(1, 30, dtype=torch.bool)
    positive[0, :4] = True
    hits = [best_positive(torch.rand(1, 30, generator=generator), positive).recall(5).item() for _ in range(4000)]
    chance = recall_chance(torch.tensor([4]), torch.tensor([30]), 5).item()
    assert chance == pytest.approx(1 - (26 * 25 * 24 * 23 * 22) / (30 * 29 * 28 * 27 * 26))
    assert sum(hits) / len(hits) == pytest.approx(chance, abs=0.025)
    assert recall_chance(torch.tensor([4]), torch.tensor([5]), 2).item() == 1


def test_ndcg_by_hand():
    # best first would be 3, 2, 1; shown are 1 (place 1) and 3 (place 2)
    graded = ndcg(table([0.9, 0.8, 0.1]), table([1.0, 3.0, 2.0]), (1, 2))
    half = 1 / torch.log2(torch.tensor(3.0)).item()
    assert graded.value[0].tolist() == pytest.approx([1 / 3, (1 + 3 * half) / (3 + 2 * half)])
    assert graded.chance[0].tolist() == pytest.approx([2 / 3, 2 * (1 + half) / (3 + 2 * half)])


def test_ndcg_of_the_ideal_order_is_one_and_of_nothing_relevant_nan():
    relevance = table([0.4, 0.9, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0])
    graded = ndcg(relevance, relevance, (3,))
    assert graded.value[0].item() == pytest.approx(1)
    assert graded.value[1].isnan().all() and graded.chance[1].isnan().all()


def test_ndcg_leaves_excluded_items_out_of_the_search_and_of_the_ideal():
    scores, relevance = table([9.0, 0.5, 0.4, 0.3]), table([5.0, 0.0, 1.0, 0.0])
    graded = ndcg(scores, relevance, (2,), torch.tensor([[0]]))
    assert graded.value.item() == pytest.approx(1 / torch.log2(torch.tensor(3.0)).item())
    assert scores[0, 0] == 9 and relevance[0, 0] == 5  # the caller's tables are as they were


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_tied_ndcg_is_the_mean_over_all_orders(k):
    scores, relevance = [0.9, 0.5, 0.5, 0.5, 0.1], [0.2, 1.0, 0.0, 0.6, 0.8]
    values = []
    for order in permutations([1, 2, 3]):
        strict = table([0.9, *[0.5 - 0.01 * order.index(place) for place in (1, 2, 3)], 0.1])
        values.append(ndcg(strict, table(relevance), (k,)).value.item())
    assert ndcg(table(scores), table(relevance), (k,)).value.item() == pytest.approx(sum(values) / 6)


def test_chance_is_what_random_rankings_score():
    generator = torch.Generator().manual_seed(1)
    relevance = torch.rand(1, 40, generator=generator) ** 3
    repeated = relevance.expand(4000, 40)
    shuffled = ndcg(torch.rand(4000, 40, generator=generator), repeated, (10, 20))
    assert shuffled.value.mean(0).tolist() == pytest.approx(shuffled.chance[0].tolist(), abs=0.01)
    # a model that scores everything alike is a random order, in one query
    flat = ndcg(torch.zeros(1, 40), relevance, (10, 20))
    assert flat.value[0].tolist() == pytest.approx(flat.chance[0].tolist())


def test_over_chance_is_0_at_chance_and_1_at_the_ideal():
    assert over_chance(0.52, 0.52) == 0
    assert over_chance(1.0, 0.52) == 1
    assert over_chance(0.76, 0.52) == pytest.approx(0.5)


def test_ndcg_deeper_than_the_gallery_says_so():
    with pytest.raises(ValueError, match="NDCG@3 needs 3 items to rank, got 2"):
        ndcg(table([0.1, 0.2, 0.3]), table([1.0, 0.0, 0.0]), (3,), torch.tensor([[1]]))


def test_precision_at_r_by_hand():
    # three positives; among the first three stand two, at places 1 and 3
    found = precision_at_r(table([0.9, 0.8, 0.7, 0.6]), marks([1, 0, 1, 1]))
    assert found.r_precision.item() == pytest.approx(2 / 3)
    assert found.map_at_r.item() == pytest.approx((1 + 2 / 3) / 3)
    assert precision_at_r(table([0.9, 0.8]), marks([0, 0])).map_at_r.isnan().all()


def test_precision_at_r_leaves_excluded_items_out():
    found = precision_at_r(table([0.9, 0.8, 0.7, 0.6]), marks([1, 0, 1, 0]), torch.tensor([[0, 1]]))
    assert found.r_precision.item() == 1 and found.map_at_r.item() == 1


@pytest.mark.parametrize("positive", [(1, 0, 1, 1, 0, 1), (0, 1, 0, 1, 1, 0), (0, 0, 1, 1, 1, 1), (1, 0, 0, 0, 0, 0)])
def test_tied_precision_at_r_is_the_mean_over_all_orders(positive):
    tied = [0.9, 0.5, 0.5, 0.5, 0.5, 0.1]
    over_orders = []
    for order in permutations(range(4)):
        strict = [0.9, *[0.5 - 0.01 * order.index(place) for place in range(4)], 0.1]
        found = precision_at_r(table(strict), marks(positive))
        over_orders.append((found.r_precision.item(), found.map_at_r.item()))
    found = precision_at_r(table(tied), marks(positive))
    mean = torch.tensor(over_orders, dtype=torch.float64).mean(0).tolist()
    assert [found.r_precision.item(), found.map_at_r.item()] == pytest.approx(mean)


@pytest.mark.parametrize("positives, gallery", [(1, 1), (1, 7), (3, 7), (7, 7), (5, 40)])
def test_chance_of_precision_at_r_is_that_of_equal_scores(positives, gallery):
    marked = torch.arange(gallery)[None] < positives
    found = precision_at_r(torch.zeros(1, gallery), marked)
    chance = at_r_chance(torch.tensor([positives]), torch.tensor([gallery]))
    assert chance.r_precision.item() == pytest.approx(found.r_precision.item())
    assert chance.map_at_r.item() == pytest.approx(found.map_at_r.item())


def test_own_modality_is_a_share_of_what_is_shown():
    own = torch.tensor([True, True, False, False])
    assert own_modality(table([0.9, 0.1, 0.8, 0.7]), own, 2).item() == 0.5
    assert own_modality(table([0.9, 0.1, 0.8, 0.7]), own, 2, torch.tensor([[0]])).item() == 0
    assert own_modality_chance(own, torch.tensor([[0, -1], [-1, -1]])).tolist() == pytest.approx([1 / 3, 1 / 2])


def test_ndcg_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(2)
    scores, relevance = torch.rand(30, 50, generator=generator), torch.rand(30, 50, generator=generator)
    scores[:, :8] = scores[:, :1]  # ties, which scikit-learn averages as well
    ours = ndcg(scores, relevance, (10, 20))
    for place, k in enumerate((10, 20)):
        theirs = metrics.ndcg_score(relevance.numpy(), scores.numpy(), k=k)
        assert ours.value[:, place].mean().item() == pytest.approx(theirs, abs=1e-6)
