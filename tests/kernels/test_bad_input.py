"""Every public function against every bad input of its kind, and the defined results at the edges of good ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vlscale.kernels.checks import available_impls
from vlscale.kernels.preprocess import pack_pictures, preprocess_images

from tests.kernels import cases as k
from vlscale.kernels import (
    contrastive_loss,
    relation_kl_loss,
    relation_match_loss,
    retrieval_ranks,
    sigmoid_loss,
    topk_neighbors,
)

X, Y = (v.float() for v in k.embeddings("random", 6, 4))
ID = torch.arange(6)
FIRST = torch.zeros(6, 1, dtype=torch.int64)
IMPLS = available_impls(torch.device("cpu"))  # triton's interpreter among them, where triton is
TAUS = {"student_temperature": 0.1, "teacher_temperature": 0.1}

# What each is called with, and what it calls its two embeddings.
FUNCTIONS = {
    "contrastive": (lambda x, y, **s: contrastive_loss(x, y, **{"logit_scale": 10.0} | s), "image_emb", "text_emb"),
    "sigmoid": (
        lambda x, y, **s: sigmoid_loss(x, y, **{"logit_scale": 10.0, "logit_bias": -5.0} | s),
        "image_emb",
        "text_emb",
    ),
    "relation_kl": (lambda x, y, **s: relation_kl_loss(x, [y], **TAUS | s), "student_emb", r"teacher_embs\[0\]"),
    "relation_match": (
        lambda x, y, **s: relation_match_loss(x, [y], **{"temperature": 0.1} | s),
        "student_emb",
        r"teacher_embs\[0\]",
    ),
    "ranks": (lambda x, y, **s: retrieval_ranks(x, y, **{"positives": FIRST} | s), "query_emb", "gallery_emb"),
    "neighbours": (lambda x, y, **s: topk_neighbors(x, y, **{"k": 2} | s), "query_emb", "gallery_emb"),
}
PAIRS, RELATIONS, RETRIEVAL = (list(FUNCTIONS)[i : i + 2] for i in (0, 2, 4))
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def refused(message: str, call, *arguments, **settings) -> None:
    """One line that says what was expected and what came."""
    with pytest.raises(ValueError, match=message) as error:
        call(*arguments, **settings)
    said = str(error.value)
    assert "\n" not in said and "expected" in said and "got" in said


@every_function
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v.tolist(), r"expected a tensor \(N, D\), got list"),
        (lambda v: None, r"expected a tensor \(N, D\), got NoneType"),
        (lambda v: v[0], r"expected shape \(N, D\), got \(4,\)"),
        (lambda v: v[None], r"expected shape \(N, D\), got \(1, 6, 4\)"),
        (lambda v: v.long(), "expected a floating dtype, got torch.int64"),
        (lambda v: v[:0], r"expected at least one row and one column, got shape \(0, 4\)"),
        (lambda v: v[:, :0], r"expected at least one row and one column, got shape \(6, 0\)"),
    ],
    ids=["list", "none", "vector", "cube", "integers", "no rows", "no columns"],
)
def test_embeddings(name, second, spoil, message):
    call, first_name, second_name = FUNCTIONS[name]
    given = (X, spoil(Y)) if second else (spoil(X), Y)
    refused(f"{second_name if second else first_name}: {message}", call, *given)


@every_function
def test_sides_that_do_not_match(name):
    call, first_name, second_name = FUNCTIONS[name]
    refused(f"{second_name}: expected device cpu, got meta", call, X, Y.to("meta"))
    refused(f"{second_name}: expected device meta, got cpu", call, X.to("meta"), Y)
    if name in RETRIEVAL:
        refused(f"{second_name}: expected width 4 as {first_name}, got 3", call, X, Y[:, :3])
    elif name in PAIRS:
        refused(rf"{second_name}: expected shape \(6, 4\) as {first_name}, got \(5, 4\)", call, X, Y[:5])
        refused(rf"{second_name}: expected shape \(6, 4\) as {first_name}, got \(6, 3\)", call, X, Y[:, :3])
    else:
        refused(f"{second_name}: expected 6 rows as {first_name}, got 5", call, X, Y[:5])
    if name in RELATIONS:  # a teacher's dtype and width are its own
        assert call(X, Y.bfloat16()).dtype == torch.float32 and call(X, Y[:, :3]).isfinite()
    else:
        refused(f"{second_name}: expected dtype torch.float32 as {first_name}, got torch.float64", call, X, Y.double())


@every_function
def test_impls(name, monkeypatch):
    call = FUNCTIONS[name][0]
    refused("impl: expected one of auto, triton, chunked, reference, got 'cuda'", call, X, Y, impl="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl: 'triton' is not available for cpu.*available: auto, chunked, refer"):
        call(X, Y, impl="triton")


SCALARS = [
    *((name, "logit_scale") for name in PAIRS),
    ("relation_kl", "student_temperature"),
    ("relation_kl", "teacher_temperature"),
    ("relation_match", "temperature"),
]


@pytest.mark.parametrize(("name", "scalar"), SCALARS, ids=["-".join(pair) for pair in SCALARS])
def test_scalars(name, scalar):
    call = FUNCTIONS[name][0]
    for value in (0.0, 0, -1.0, float("nan"), float("inf"), float("-inf")):
        refused(f"{scalar}: expected a finite positive number, got {value}", call, X, Y, **{scalar: value})
    for value, kind in (("1", "str"), (None, "NoneType"), (True, "bool"), ([1.0], "list")):
        refused(f"{scalar}: expected a float or a 0-d tensor, got {kind}", call, X, Y, **{scalar: value})
    refused(rf"{scalar}: expected one floating value, got \(2,\)", call, X, Y, **{scalar: torch.ones(2)})
    refused(rf"{scalar}: expected one floating value, got \(\) of torch.int64", call, X, Y, **{scalar: torch.tensor(1)})
    refused(f"{scalar}: expected device cpu, got meta", call, X, Y, **{scalar: torch.ones((), device="meta")})
    assert call(X, Y, **{scalar: torch.tensor(torch.nan)}).isnan()  # a tensor is never looked into


def test_a_bias_may_be_negative_and_has_to_be_finite():
    for value in (float("nan"), float("-inf")):
        refused(f"logit_bias: expected a finite number, got {value}", sigmoid_loss, X, Y, 1.0, value)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (ID[:5], r"expected shape \(6,\), one id a pair, got \(5,\)"),
        (torch.arange(7), r"expected shape \(6,\), one id a pair, got \(7,\)"),
        (ID[:, None], r"expected shape \(6,\), one id a pair, got \(6, 1\)"),
        (ID.tolist(), r"expected shape \(6,\), one id a pair, got list"),
        (ID.int(), "expected int64, got torch.int32"),
        (ID.to("meta"), "expected device cpu, got meta"),
    ],
    ids=["short", "long", "column", "list", "int32", "device"],
)
def test_pair_ids(name, ids, message):
    refused(f"pair_id: {message}", FUNCTIONS[name][0], X, Y, pair_id=ids)


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], r"expected shape \(1,\), got \(2,\)"),
        (torch.ones(()), r"expected shape \(1,\), got \(\)"),
        (torch.ones(1, dtype=torch.int64), "expected a floating dtype, got torch.int64"),
        (torch.ones(1, device="meta"), "expected device cpu, got meta"),
        ([float("nan")], r"expected a tensor \(K,\) or a list of finite floats"),
        ([], r"expected a tensor \(K,\) or a list of finite floats"),
    ],
    ids=["two", "0-d", "integers", "device", "nan", "none"],
)
def test_teacher_weights(name, weights, message):
    refused(f"teacher_weights: {message}", FUNCTIONS[name][0], X, Y, teacher_weights=weights)


def test_choices():
    refused("scope: expected one of row, matrix, got 'rows'", relation_kl_loss, X, Y, **TAUS, scope="rows")
    refused("relation: expected one of cosine, euclidean", relation_kl_loss, X, Y, **TAUS, relation="l2")
    refused("metric: expected one of mae, mse, wasserst", relation_match_loss, X, [Y], temperature=1.0, metric="kl")


@pytest.mark.parametrize("amount", [7, 0, -1, True, 2.0, None])
def test_neighbours_beyond_the_gallery(amount):
    refused(f"k: expected an integer 1 to 6, the size of the gallery, got {amount}", topk_neighbors, X, Y, amount)


def test_neighbours_counted_by_numpy():
    """A count out of an array is a count."""
    assert topk_neighbors(X, Y, np.int64(2))[1].shape == (6, 2)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (None, "pictures: expected at least one, as a list, got NoneType"),
        ((p for p in [X]), "pictures: expected at least one, as a list, got generator"),
        ([], "pictures: expected at least one, as a list, got none"),
        ([[[1, 2, 3]]], r"pictures\[0\]: expected \(H, W, 3\) of torch.uint8, got list"),
        ([torch.zeros(3, 5, 7)], r"pictures\[0\]: expected .*, got \(3, 5, 7\) of torch.float32"),
    ],
    ids=["none", "generator", "empty", "lists", "floats"],
)
def test_pictures_to_pack(pictures, message):
    refused(message, pack_pictures, pictures)


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [0.5, None, (0.5, 0.5), ("1", "1", "1"), (1.0, 1.0, float("inf"))], ids=str)
def test_means_and_deviations(name, value):
    packed = pack_pictures([torch.zeros(5, 7, 3, dtype=torch.uint8)])
    settings = {"size": 4, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)} | {name: value}
    refused(f"{name}: expected three finite numbers, one a colour, got", preprocess_images, *packed, **settings)


@pytest.mark.parametrize("table", ["positives", "exclude"])
def test_tables_of_indices(table):
    call = FUNCTIONS["ranks"][0]
    for value, message in (
        (FIRST[:5], r"expected a tensor \(6, P\) of gallery indices padded by -1, got \(5, 1\)"),
        (FIRST[:, 0], r"expected a tensor \(6, P\) of gallery indices padded by -1, got \(6,\)"),
        (FIRST.tolist(), r"expected a tensor \(6, P\) of gallery indices padded by -1, got list"),
        (FIRST.float(), "expected int64, got torch.float32"),
        (FIRST.to("meta"), "expected device cpu, got meta"),
        (FIRST + 6, "expected gallery indices 0 to 5, or -1 as padding, got 6"),
        (FIRST - 2, "expected gallery indices 0 to 5, or -1 as padding, got -2"),
    ):
        refused(f"{table}: {message}", call, X, Y, **{table: value})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*PAIRS, *RELATIONS])
def test_losses_of_nothing_but_nan_or_infinity_come_back_as_nan(name, impl):
    call = FUNCTIONS[name][0]
    for value in (torch.nan, torch.inf):
        x = torch.full_like(X, value).requires_grad_()
        loss = call(x, Y, impl=impl)
        loss.backward()
        assert loss.isnan() or (value == torch.inf and not loss.isfinite())
        assert x.grad.shape == X.shape and not x.grad.isfinite().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_retrieval_among_nan_comes_back(impl):
    nothing = torch.full_like(X, torch.nan)
    for query, gallery in ((nothing, Y), (X, nothing), (nothing, nothing)):
        above, tied, same = retrieval_ranks(query, gallery, FIRST, impl=impl)
        assert (above == 5).all() and (tied == 0).all() and (same == 0).all()
        scores, indices = topk_neighbors(query, gallery, 3, impl=impl)
        assert scores.isnan().all() and indices.tolist() == [[0, 1, 2]] * 6


@pytest.mark.parametrize("impl", IMPLS)
def test_one_pair_and_rows_without_a_partner(impl):
    """One pair has only its own term; a row that has no other row to relate to has loss 0."""
    product = (X[:1] * Y[:1]).sum()
    alone = sigmoid_loss(X[:1], Y[:1], 10.0, -5.0, impl=impl)
    torch.testing.assert_close(alone, F.softplus(-(10.0 * product - 5.0)))
    assert contrastive_loss(X[:1], Y[:1], 10.0, impl=impl).abs() <= 1e-7
    for n in (1, 2):  # of two rows each has one other, which has all the probability
        for settings in ({"scope": "row"}, {"scope": "matrix"}, {"relation": "euclidean"}):
            assert relation_kl_loss(X[:n], Y[:n], **TAUS, **settings, impl=impl).abs() <= 1e-7
    for metric in ("mae", "mse", "wasserstein"):
        assert relation_match_loss(X[:1], [Y[:1]], temperature=0.1, metric=metric, impl=impl) == 0
    found = retrieval_ranks(X[:1], Y[:1], FIRST[:1], impl=impl), topk_neighbors(X[:1], Y[:1], 1, impl=impl)
    assert [int(v) for v in found[0]] == [0, 0, 1] and found[1][1].tolist() == [[0]]
    nobody = retrieval_ranks(X, Y, -torch.ones_like(FIRST), impl=impl)
    assert [v.unique().tolist() for v in nobody] == [[6], [0], [0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_identical_rows_and_ids_all_equal(impl):
    same = torch.full((6, 4), 0.5)  # of length 1: every product is exactly 1
    ids = torch.zeros(6, dtype=torch.int64)
    torch.testing.assert_close(contrastive_loss(same, same, 10.0, impl=impl), torch.tensor(6.0).log())
    torch.testing.assert_close(contrastive_loss(same, same, 10.0, pair_id=ids, impl=impl), torch.tensor(6.0).log())
    z = torch.tensor(5.0)
    mixed = F.softplus(-z) + 5 * F.softplus(z)
    torch.testing.assert_close(sigmoid_loss(same, same, 10.0, -5.0, impl=impl), mixed)
    torch.testing.assert_close(sigmoid_loss(same, same, 10.0, -5.0, pair_id=ids, impl=impl), 6 * F.softplus(-z))
    for scope in ("row", "matrix"):
        for relation in ("cosine", "euclidean"):
            leaf = same.clone().requires_grad_()
            loss = relation_kl_loss(leaf, same, **TAUS, scope=scope, relation=relation, impl=impl)
            loss.backward()
            assert loss.abs() <= 1e-7 and leaf.grad.abs().max() <= 1e-6
    for metric in ("mae", "mse", "wasserstein"):
        assert relation_match_loss(same, [same], temperature=0.1, metric=metric, impl=impl).abs() <= 1e-7
    above, tied, level = retrieval_ranks(same, same, ID[:, None], impl=impl)
    assert not above.any() and (tied == 5).all() and (level == 1).all()
    assert topk_neighbors(same, same, 6, impl=impl)[1].tolist() == [list(range(6))] * 6


OTHERS = {
    "a sparse tensor": (
        "contrastive",
        (X.to_sparse(), Y),
        {},
        "image_emb: expected a dense tensor, got torch.sparse_coo",
    ),
    "an array of scopes": ("relation_kl", (X, Y), {"scope": np.array(["row"])}, "scope: expected one of row, matrix"),
    "no float holds it": (
        "contrastive",
        (X, Y),
        {"logit_scale": 10**400},
        "logit_scale: expected a finite .* got 1000",
    ),
    "true as a weight": ("relation_match", (X, Y), {"teacher_weights": [True]}, r"teacher_weights: .* got \[True\]"),
    "a large weight": ("relation_match", (X, Y), {"teacher_weights": [10**400]}, "teacher_weights: .* got list"),
}


@pytest.mark.parametrize(("name", "given", "settings", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_what_else_is_refused(name, given, settings, message):
    refused(message, FUNCTIONS[name][0], *given, **settings)


@pytest.mark.parametrize("teachers", [{"a": X}, X.numpy()], ids=["dict", "array"])
def test_teachers_that_are_no_list_are_named(teachers):
    got = type(teachers).__name__
    refused(
        f"teacher_embs: expected a tensor or a non-empty list of tensors, got {got}",
        relation_kl_loss,
        X,
        teachers,
        **TAUS,
    )


def test_numbers_of_numpy_are_numbers():
    for kind in (np.float32, np.float64, np.int64):
        assert torch.equal(contrastive_loss(X, Y, kind(10)), contrastive_loss(X, Y, 10.0))
        weighted = (relation_match_loss(X, [Y], [w], temperature=0.1) for w in (kind(2), 2.0))
        torch.testing.assert_close(*weighted)
