"""What callers may rely on: accepted inputs, defined results at the edges, and one clear line for everything else."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from vlscale.kernels.checks import available_impls
from vlscale.kernels.preprocess import pack_pictures, preprocess_images

import vlscale.kernels as kernels
from tests.kernels import cases as k
from vlscale.kernels import contrastive_loss, relation_kl_loss, relation_match_loss, sigmoid_loss

IMPLS = available_impls(torch.device("cpu"))  # triton's interpreter among them, where triton is
BLOCKWISE = [impl for impl in IMPLS if impl != "reference"]
X, Y = (v.float() for v in k.embeddings("random", 6, 4))
ID = torch.arange(6)
PICTURE = torch.arange(8 * 9 * 3, dtype=torch.uint8).view(8, 9, 3)

LOSSES = {
    "contrastive": lambda x, y, impl: contrastive_loss(x, y, 10.0, impl=impl),
    "sigmoid": lambda x, y, impl: sigmoid_loss(x, y, 10.0, -5.0, impl=impl),
    "relation_kl_row": lambda x, y, impl: kl(x, y, impl=impl),
    "relation_kl_matrix": lambda x, y, impl: kl(x, y, scope="matrix", impl=impl),
    "relation_kl_euclidean": lambda x, y, impl: kl(x, y, relation="euclidean", impl=impl),
    "relation_mae": lambda x, y, impl: relation_match_loss(x, [y], [1.0], temperature=0.1, impl=impl),
    "relation_mse": lambda x, y, impl: relation_match_loss(x, [y], [1.0], temperature=0.1, metric="mse", impl=impl),
    "relation_wasserstein": lambda x, y, impl: relation_match_loss(
        x, [y], [1.0], temperature=0.1, metric="wasserstein", impl=impl
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
blockwise = pytest.mark.parametrize("impl", BLOCKWISE)


def kl(x, y, **settings):
    return relation_kl_loss(x, y, **{"student_temperature": 0.1, "teacher_temperature": 0.1} | settings)


def value_and_grads(loss, x, y, impl):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = loss(x, y, impl)
    return value, *torch.autograd.grad(value, (x, y), allow_unused=True)


@every_loss
@blockwise
def test_dtypes_shapes_and_input_left_alone(loss, impl):
    for dtype, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        x, y = X.to(dtype), Y.to(dtype)
        kept = x.clone()
        value, dx, dy = value_and_grads(loss, x, y, impl)
        assert value.shape == () and value.dtype == expected
        assert dx.dtype == dtype and dy.dtype == dtype
        assert torch.equal(x, kept)


@every_loss
@blockwise
def test_strided_inputs(loss, impl):
    wide = torch.randn(12, 8)
    x, y = wide[::2, ::2], wide.flip(0).T.contiguous().T[::2, 1::2]
    assert not x.is_contiguous() and not y.is_contiguous()
    strided = value_and_grads(loss, x, y, impl)
    packed = value_and_grads(loss, x.contiguous(), y.contiguous(), impl)
    for a, b in zip(strided, packed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


FORWARD = [(name, impl) for name in LOSSES for impl in IMPLS if impl == "reference" or name != "relation_mse"]


@pytest.mark.parametrize(("name", "impl"), FORWARD)
@pytest.mark.parametrize("transform", [torch.func.jvp, lambda f, x, t: torch.func.jacfwd(f)(*x)])
def test_forward_mode_is_made_or_refused_never_zero(name, impl, transform):
    """The ops have no forward-mode formula; torch would take their result for a constant."""

    def along(x):
        return LOSSES[name](x, Y, impl)

    if impl == "reference":
        found = transform(along, (X,), (Y,))
        assert (found[1] if isinstance(found, tuple) else found).abs().sum() > 0
        return
    with pytest.raises(ValueError, match=f"impl: expected reference for forward-mode derivatives.*got {impl!r}"):
        transform(along, (X,), (Y,))


@pytest.mark.parametrize(("name", "impl"), FORWARD)
def test_functional_gradients_are_right_or_refused(name, impl):
    def function(x):
        return LOSSES[name](x, Y, impl)

    if impl == "reference":
        truth = value_and_grads(LOSSES[name], X, Y, impl)[1]
        torch.testing.assert_close(torch.func.grad(function)(X), truth)
        return
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(function)(X)


@every_loss
@pytest.mark.parametrize("impl", ["reference", "chunked", "auto"])
def test_meta_tensors(loss, impl):
    """Shapes and dtypes without data, as tools that plan memory ask for them."""
    value, *gradients = value_and_grads(loss, X.to("meta"), Y.to("meta"), impl)
    assert value.is_meta and value.shape == () and value.dtype == torch.float32
    assert all(g.is_meta and g.shape == X.shape for g in gradients)


@every_loss
def test_export_of_any_number_of_pairs(loss):
    """Traced without dynamo, where len() of a tensor would fix its number."""

    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return loss(x, y, "auto")

    pairs = torch.export.Dim("pairs", min=3)
    exported = torch.export.export(Loss(), (X, Y), dynamic_shapes={"x": {0: pairs}, "y": {0: pairs}})
    for n in (3, 5):
        torch.testing.assert_close(exported.module()(X[:n], Y[:n]), loss(X[:n], Y[:n], "auto"))


def everything() -> list[torch.Tensor]:
    losses = [
        v for impl in ("reference", "chunked") for loss in LOSSES.values() for v in value_and_grads(loss, X, Y, impl)
    ]
    found = [
        part
        for impl in ("reference", "chunked")
        for part in (
            *kernels.retrieval_ranks(X, Y, ID[:, None], impl=impl),
            *kernels.topk_neighbors(X, Y, 3, exclude=ID[:, None], impl=impl),
        )
    ]
    packed = pack_pictures([PICTURE, PICTURE[:5]])
    colours = torch.tensor([[[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0]]] * 2, dtype=torch.float32, device="cpu")
    batch = preprocess_images(*packed, colours=colours, size=7, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    return [*losses, *found, *packed, batch]


def test_defaults_of_the_process_change_nothing():
    """Somebody's default dtype or device reaches no intermediate result."""
    plain = everything()
    for change, back in (
        (lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    ):
        change()
        try:
            changed = everything()
        finally:
            back()
        for a, b in zip(changed, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def under_checkpoint(loss, impl, reentrant):
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    value = checkpoint(lambda a, b: loss(a, b, impl), x, y, use_reentrant=reentrant)
    value.backward()
    return value, x.grad, y.grad


@every_loss
@blockwise
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(loss, impl, reentrant):
    """Without reentrance a backward may unpack what it saved only once."""
    plain = value_and_grads(loss, X, Y, impl)
    again = under_checkpoint(loss, impl, reentrant)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@blockwise
@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_strided_ids(loss, impl):
    """A column of a table, and one id for all: neither lies in memory as it reads."""

    def paired(ids):
        settings = {"pair_id": ids, "impl": impl}
        return lambda x, y, _: (
            contrastive_loss(x, y, 10.0, **settings)
            if loss == "contrastive"
            else sigmoid_loss(x, y, 10.0, -5.0, **settings)
        )

    column = torch.tensor([[0, 9], [1, 9], [0, 9], [2, 9], [1, 9], [3, 9]])[:, 0]
    for ids in (column, torch.zeros(1, dtype=torch.int64).expand(6)):
        assert not ids.is_contiguous()
        strided, packed = (value_and_grads(paired(v), X, Y, impl) for v in (ids, ids.clone().contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))


def narrow_rows(impl, rows):
    """In float64 Triton's kernels are not asked; the kernels' own precision is what is compared there."""
    return rows.float() if impl == "triton" else rows.double()


@every_loss
@blockwise
def test_permutation_of_pairs(loss, impl, small_tiles):
    x, y = (narrow_rows(impl, v) for v in k.embeddings("random", 50, 8))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    value, dx, dy = value_and_grads(loss, x, y, impl)
    moved, moved_dx, moved_dy = value_and_grads(loss, x[order], y[order], impl)
    near = {"rtol": 1e-4, "atol": 1e-6} if impl == "triton" else {}
    torch.testing.assert_close(moved, value, **near)
    torch.testing.assert_close(moved_dx, dx[order], **near)
    torch.testing.assert_close(moved_dy, dy[order], **near)


@every_loss
@blockwise
def test_duplicated_rows(loss, impl, small_tiles):
    x, y = (v.float()[torch.arange(40) // 2] for v in k.embeddings("random", 20, 8))
    given = narrow_rows(impl, x), narrow_rows(impl, y)
    truth = value_and_grads(loss, x.double(), y.double(), "reference")
    dense, tiled = (value_and_grads(loss, *given, by) for by in ("reference", impl))
    kinked = loss in (LOSSES["relation_mae"], LOSSES["relation_wasserstein"])  # copies sit on |s - t|'s kink
    for exact, yardstick, value in list(zip(truth, dense, tiled, strict=True))[: 1 if kinked else None]:
        least = 1e-5 if impl == "triton" else 1e-6
        assert k.relative(value, exact) <= max(2 * k.relative(yardstick, exact), least)


@every_loss
@blockwise
def test_same_answer_twice(loss, impl):
    first, second = (value_and_grads(loss, X, Y, impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_loss
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_propagates(loss, impl):
    x = X.clone()
    x[1, 2] = torch.nan
    assert value_and_grads(loss, x, Y, impl)[0].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_true_zeros(impl):
    for n, losses in ((1, ["contrastive", *(name for name in LOSSES if "relation" in name)]), (2, ["relation_kl_row"])):
        for name in losses:
            value, dx, _ = value_and_grads(LOSSES[name], X[:n], Y[:n], impl)
            assert value.abs() <= 1e-7 and dx.abs().max() <= 1e-7, (name, n)
    assert contrastive_loss(X[:1], Y[:1], 100.0, pair_id=torch.tensor([3]), impl=impl).abs() <= 1e-7
    for name in LOSSES:
        if "relation" in name:
            assert LOSSES[name](X, X, impl).abs() <= 1e-7, name


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ids_equal(impl):
    """Every pair is a positive of every other: targets are uniform, and identical rows reach their minimum, log N."""
    same = X[:1].expand(6, 4)
    loss = contrastive_loss(same, same, 10.0, pair_id=torch.zeros(6, dtype=torch.int64), impl=impl)
    torch.testing.assert_close(loss, torch.tensor(6.0).log())


def test_unit_ids_are_the_default():
    ids = torch.tensor([5, 3, 9, 1, 0, 7])
    for loss in (contrastive_loss, lambda x, y, s, **kw: sigmoid_loss(x, y, s, -3.0, **kw)):
        torch.testing.assert_close(loss(X, Y, 10.0, pair_id=ids), loss(X, Y, 10.0))


def in_autocast(loss, impl: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and x's gradient, both float32."""
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(x, Y, impl)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.dtype == gradient.dtype == torch.float32
    return value, gradient


TILED = [name for name in LOSSES if name not in ("relation_mse", "relation_wasserstein")]  # by Triton's kernels
ELSEWHERE = [(name, impl) for name in LOSSES for impl in [*IMPLS, "auto"] if impl != "triton" or name not in TILED]


@pytest.mark.parametrize(("name", "impl"), ELSEWHERE)
def test_autocast_changes_nothing_without_tensor_cores(name, impl):
    plain = value_and_grads(LOSSES[name], X, Y, "chunked")
    value, gradient = in_autocast(LOSSES[name], impl, torch.bfloat16)
    torch.testing.assert_close(value, plain[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, plain[1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("triton" not in IMPLS, reason="no triton for CPU tensors here")
@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_tensor_cores_its_dtype(name, dtype):
    x = X.clone().requires_grad_()
    given = LOSSES[name](x.to(dtype), Y.to(dtype), "triton")
    value, gradient = in_autocast(LOSSES[name], "triton", dtype)
    assert torch.equal(value, given) and torch.equal(gradient, torch.autograd.grad(given, x)[0])
    assert not torch.equal(value, LOSSES[name](x, Y, "triton"))


def test_one_teacher_as_tensor_or_list_and_learnable_scalars_as_floats():
    alone = kl(X, Y)
    torch.testing.assert_close(kl(X, [Y], teacher_weights=torch.tensor([1.0])), alone)
    torch.testing.assert_close(kl(X, Y, student_temperature=torch.tensor(0.1)), alone)
    torch.testing.assert_close(kl(X, Y.double(), teacher_temperature=torch.tensor([0.1])).float(), alone)


BAD = {
    "shape": (lambda: contrastive_loss(X, Y[:5], 1.0), r"text_emb: expected shape \(6, 4\).*got \(5, 4\)"),
    "dtype": (lambda: contrastive_loss(X, Y.double(), 1.0), "text_emb: expected dtype torch.float32.*torch.float64"),
    "device": (lambda: contrastive_loss(X, Y.to("meta"), 1.0), "text_emb: expected device cpu, got meta"),
    "integer": (lambda: contrastive_loss(X.long(), Y, 1.0), "image_emb: expected a floating dtype, got torch.int64"),
    "not a tensor": (lambda: contrastive_loss([1.0], Y, 1.0), "image_emb: expected a tensor .*got list"),
    "one dimension": (lambda: contrastive_loss(X[0], Y, 1.0), r"image_emb: expected shape \(N, D\), got \(4,\)"),
    "no rows": (lambda: sigmoid_loss(X[:0], Y[:0], 1.0, 0.0), "at least one row"),
    "no columns": (lambda: kl(X[:, :0], Y), "at least one row and one column"),
    "scale": (lambda: contrastive_loss(X, Y, -1.0), "logit_scale: expected a finite positive number, got -1.0"),
    "scale nan": (lambda: contrastive_loss(X, Y, float("nan")), "logit_scale: expected a finite positive number"),
    "scale shape": (lambda: contrastive_loss(X, Y, torch.ones(2)), r"logit_scale: expected one floating value.*\(2,\)"),
    "scale type": (lambda: contrastive_loss(X, Y, "10"), "logit_scale: expected a float or a 0-d tensor, got str"),
    "bias": (lambda: sigmoid_loss(X, Y, 1.0, float("inf")), "logit_bias: expected a finite number, got inf"),
    "ids length": (lambda: contrastive_loss(X, Y, 1.0, pair_id=ID[:5]), r"pair_id: expected shape \(6,\).*got \(5,\)"),
    "ids dtype": (lambda: sigmoid_loss(X, Y, 1.0, 0.0, pair_id=ID.float()), "pair_id: expected int64, got torch.float"),
    "impl name": (lambda: contrastive_loss(X, Y, 1.0, impl="cuda"), "impl: expected one of auto, triton, .*got 'cuda'"),
    "temperature": (lambda: kl(X, Y, student_temperature=0.0), "student_temperature: expected a finite positive"),
    "scope": (lambda: kl(X, Y, scope="all"), "scope: expected one of row, matrix, got 'all'"),
    "relation": (lambda: kl(X, Y, relation="dot"), "relation: expected one of cosine, euclidean, got 'dot'"),
    "teacher rows": (lambda: kl(X, Y[:4]), r"teacher_embs\[0\]: expected 6 rows as student_emb, got 4"),
    "no teacher": (lambda: kl(X, []), r"teacher_embs: expected a tensor or a non-empty list"),
    "no weights": (lambda: kl(X, [Y, Y]), "teacher_weights: expected 2 weights for as many teachers, got None"),
    "weights": (lambda: kl(X, [Y], teacher_weights=[0.5, 0.5]), r"teacher_weights: expected shape \(1,\), got \(2,\)"),
    "metric": (lambda: relation_match_loss(X, [Y], [1.0], temperature=1.0, metric="l3"), "metric: expected one of mae"),
    "match tau": (
        lambda: relation_match_loss(X, [Y], [1.0], temperature=-1),
        "temperature: expected a finite positive",
    ),
    "match weights": (
        lambda: relation_match_loss(X, [Y], ["a"], temperature=1.0),
        "teacher_weights: expected a tensor",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unavailable_impl_lists_what_is_available(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'triton' is not available for cpu.*available: auto, chunked, reference"):
        contrastive_loss(X, Y, 1.0, impl="triton")


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'clip_loss'; it offers contrastive_loss"):
        _ = kernels.clip_loss
    assert set(kernels.__all__) <= set(dir(kernels))


def test_import_costs_neither_torch_nor_triton():
    code = (
        "import sys, vlscale.kernels; assert 'torch' not in sys.modules, 'torch';"
        "from vlscale.kernels import (contrastive_loss, sigmoid_loss, relation_kl_loss, relation_match_loss,"
        " retrieval_ranks, topk_neighbors)"
    )
    root = kernels.__file__.rsplit("/vlscale/", 1)[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)


def test_import_from_an_installed_layout(tmp_path):
    """As in a wheel: no checkout two levels up, the sources in vlscale/_kernels, and a stray kernels/ beside it."""
    import shutil
    from pathlib import Path

    root = Path(kernels.__file__).parents[2]
    package = tmp_path / "site" / "vlscale"
    (package / "kernels").mkdir(parents=True)
    shutil.copy(root / "vlscale" / "kernels" / "__init__.py", package / "kernels")
    shutil.copytree(root / "kernels", package / "_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    (tmp_path / "site" / "kernels").mkdir()
    code = (
        "import sys; sys.path[0] = sys.argv[1]; import vlscale.kernels as kernels\n"
        "homes = {sys.modules[getattr(kernels, name).__module__].__file__ for name in kernels.__all__}\n"
        "assert all('_kernels' in home for home in homes), homes\n"
        "assert kernels.__path__[0].endswith('_kernels'), kernels.__path__"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "site")], check=True, cwd=tmp_path / "site", timeout=120)
