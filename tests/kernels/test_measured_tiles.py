"""Tile sizes from a file: every launch takes its own and stays within the error budget, and what is wrong is said."""

import json

import pytest
import torch
from vlscale.kernels.measured_tiles import FUSED, LAUNCHES, device_name, given_tiles, measured_sizes, read_tiles

from tests.kernels import cases as k
from vlscale.kernels import retrieval_ranks, topk_neighbors

CPU = torch.device("cpu")
SIZES = {"block_m": 64, "block_n": 32, "block_k": 16, "warps": 4, "stages": 2}
SIZES |= {"wave_rows": 64, "wave_columns": 96, "splits": 3}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="names the interpreter's device")


def table(**launches) -> dict:
    return {"cpu": {"float32": launches, "bfloat16": launches}}


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, int, int]]:
    """(kernel, BLOCK_M, BLOCK_N) of every launch that has them."""
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    seen, run = [], interpreter.GridExecutor.__call__

    def recorded(self, *arguments, **named):
        if "BLOCK_N" in named:
            seen.append((self.fn.__name__, named.get("BLOCK_M"), named["BLOCK_N"]))
        return run(self, *arguments, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    return seen


def pairs(width: int = 40):
    return k.embeddings("random", 130, width)


def kl_case() -> k.Case:
    x, z = pairs()
    return k.kl_case(x, [z], [1.0], (0.1, 0.1))


LOSSES = {
    "contrastive_forward": ("statistics_kernel", lambda: k.contrastive_case(*pairs(), 14.3)),
    "contrastive_backward": ("weights_kernel", lambda: k.contrastive_case(*pairs(), 14.3)),
    "contrastive_fused_64": ("fused_gradient_kernel", lambda: k.contrastive_case(*pairs(24), 14.3)),
    "sigmoid": ("sigmoid_kernel", lambda: k.sigmoid_case(*pairs(), 14.3)),
    "relation_kl_forward": ("relation_statistics_kernel", kl_case),
    "relation_mae": ("relation_mae_kernel", lambda: k.match_case(pairs()[0], [pairs()[1]], [1.0], 0.1, "mae")),
}


@interpreted
@pytest.mark.usefixtures("watched_kernels")
@pytest.mark.parametrize("launch", LOSSES)
def test_a_loss_takes_the_measured_tiles(launched, launch):
    kernel, case = LOSSES[launch]
    sizes = SIZES | ({"block_k": 64} if launch == "contrastive_fused_64" else {})
    with given_tiles(table(**{launch: sizes})):
        k.check_budget(case(), "triton", torch.bfloat16, floor=1e-3 if launch == "relation_mae" else 4e-7)
    assert {name for name, *tile in launched if tile == [64, 32]} == {kernel}


@interpreted
@pytest.mark.usefixtures("watched_kernels")
def test_relations_to_a_frozen_teacher_take_the_measured_tiles(launched):
    """Where the teacher learns too, the tiles are others."""
    with given_tiles(table(relation_kl_backward=SIZES)):
        alone, among = k.gradients_of(kl_case(), ["x"], "triton", torch.float32)
    assert k.relative(alone[0], among[0]) < 1e-5
    assert {name for name, *tile in launched if tile == [64, 32]} == {"relation_weights_kernel"}
    assert ("relation_weights_kernel", 32, 64) in launched


@interpreted
@pytest.mark.parametrize(("launch", "kernel"), [("ranks", "rank_counts_kernel"), ("neighbours", "neighbours_kernel")])
def test_retrieval_takes_the_measured_tiles(launched, launch, kernel):
    """Small integers: products are exact, so ties are."""
    query, gallery = (torch.randint(-2, 3, (n, 20)).float() for n in (130, 200))
    with given_tiles(table(**{launch: SIZES})):
        for call in (
            lambda impl: retrieval_ranks(query, gallery, torch.arange(130)[:, None], impl=impl),
            lambda impl: topk_neighbors(query, gallery, 7, impl=impl),
        ):
            assert all(torch.equal(a, b) for a, b in zip(call("triton"), call("reference"), strict=True))
    assert (kernel, 64, 32) in launched


@interpreted
def test_narrow_embeddings_are_not_fused_where_that_was_measured_to_be_slower(launched):
    with given_tiles(table(contrastive_fused_64={})):
        k.check_budget(k.contrastive_case(*pairs(24), 14.3), "triton", torch.bfloat16)
    names = {name for name, *_ in launched}
    assert "weights_kernel" in names and "fused_gradient_kernel" not in names


@interpreted
@pytest.mark.parametrize("rows", [16, 128])
def test_both_references_fill_the_same_sums_whatever_the_tiles(launched, rows):
    """Logits that spread by 400: the weights over maxima run, in the rows that the measured tiles have."""
    sizes = SIZES | {"block_m": rows, "wave_rows": rows}
    case = k.contrastive_case(*(20 * v for v in k.embeddings("random", 130, 40)), 1.0)
    plain = case.run("triton", torch.float32)
    with given_tiles(table(contrastive_backward=sizes)):
        got = case.run("triton", torch.float32)
    assert all(k.relative(got[name], plain[name]) < 1e-5 for name in plain)
    assert ("weights_kernel", rows, 64) in launched or ("weights_kernel", rows, 32) in launched


def written(folder, content) -> str:
    path = folder / "tiles.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_file_serves_its_device_and_dtype_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VLSCALE_TILES", written(tmp_path, {"cpu": {"bfloat16": {"sigmoid": SIZES}}}))
    assert measured_sizes("sigmoid", torch.bfloat16, CPU) == SIZES
    assert measured_sizes("sigmoid", torch.float16, CPU) is None
    assert measured_sizes("ranks", torch.bfloat16, CPU) is None
    monkeypatch.delenv("VLSCALE_TILES")
    assert measured_sizes("sigmoid", torch.bfloat16, CPU) is None


def test_a_device_goes_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    device_name.cache_clear()
    with given_tiles({"a card": {"bfloat16": {"sigmoid": SIZES}}}):
        assert measured_sizes("sigmoid", torch.bfloat16, torch.device("cuda", 0)) == SIZES
    device_name.cache_clear()


def one(launch="sigmoid", **changed) -> dict:
    return {"cpu": {"bfloat16": {launch: SIZES | changed}}}


WRONG = {
    "no JSON": ("tiles: 3", "expected a file that `vlscale bench tune` wrote, got: no JSON"),
    "a list": ([1], "expected an object, got list"),
    "a device's list": ({"cpu": []}, "cpu: expected an object, got list"),
    "launch": (one("softmax"), "cpu: bfloat16: softmax: expected one of contrastive_forward, "),
    "no power of two": (one(block_m=100), "sigmoid: block_m: expected one of 16, 32, 64, 128, 256, got 100"),
    "a float": (one(block_n=64.0), "block_n: expected one of .* got 64.0"),
    "true": (one(stages=True), "stages: expected 1 to 8, got True"),
    "warps": (one(warps=3), "warps: expected one of 1, 2, 4, 8, 16, got 3"),
    "wave": (one(wave_rows=100), "wave_rows: expected a multiple of block_m = 64, got 100"),
    "a wave past 32 bits": (one(wave_rows=2**20, wave_columns=2**20), f"of at most {2**29}, got {2**40}"),
    "missing": ({"cpu": {"bfloat16": {"sigmoid": {"block_m": 64}}}}, "sigmoid: expected block_m, .* got block_m"),
    "null": ({"cpu": {"bfloat16": {"sigmoid": None}}}, "sigmoid: expected block_m, .* got None"),
    "fused": (one("contrastive_fused_128", block_k=64), "block_k: expected one of 128, got 64"),
}


@pytest.mark.parametrize(("content", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_refused_in_one_line(tmp_path, monkeypatch, content, said):
    monkeypatch.setenv("VLSCALE_TILES", written(tmp_path, content))
    with pytest.raises(ValueError, match=said) as refused:
        measured_sizes("sigmoid", torch.bfloat16, CPU)
    assert "VLSCALE_TILES=" in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("VLSCALE_TILES", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none.json: expected a file .* got: No such file"):
        measured_sizes("sigmoid", torch.bfloat16, CPU)


def test_null_is_kept_for_fused_launches(tmp_path):
    path = written(tmp_path, {"cpu": {"bfloat16": {"contrastive_fused_64": None}}})
    assert read_tiles(path) == {"cpu": {"bfloat16": {"contrastive_fused_64": {}}}}
    assert {name for name in LAUNCHES if "fused" in name} == {f"contrastive_fused_{width}" for width in (64, 128, 256)}


def test_every_launch_has_its_work():
    pytest.importorskip("triton")
    from vlscale.kernels.triton_tiles import WORK_OF

    assert sorted([*WORK_OF, *FUSED]) == sorted(LAUNCHES)
