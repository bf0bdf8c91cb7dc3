"""The model of the kernels' times: minimal counts, how products grow, every family and kernel, and the comparison."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import kernels_bench_entries as entries
import kernels_bench_report as report
import kernels_model as model
import kernels_model_pictures as pictures
import kernels_model_price as pricing
import kernels_model_rates as rates
import kernels_model_sass as sass
import kernels_model_trace as tracing
import torch

N, D = 8192, 512
ASSUMED = rates.Rates()


def test_the_fewest_operations_are_those_of_the_design():
    u = 2 * N**2 * D
    wanted = {
        ("contrastive", "forward"): u,
        ("contrastive", "backward"): 3 * u,
        ("contrastive", "both"): 8 * N**2 * D,
        ("contrastive_ids", "both"): 8 * N**2 * D,
        ("sigmoid", "both"): 6 * N**2 * D,
        ("relation_kl", "both"): 6 * N**2 * D,
        ("relation_kl_euclidean", "both"): 6 * N**2 * D,
        ("relation_mae", "both"): 4 * N**2 * D,
        ("ranks", "forward"): 2 * entries.QUERIES * N * D,
        ("sigmoid", "backward"): 0,
    }
    for place, count in wanted.items():
        assert model.least(*place, N, D) == count, place


def products(family: str, which: str, pairs: int, width: int = D) -> float:
    """Operations of all products that a pass launches."""
    count = 0
    for event, times in model.events(family, pairs, width, which).items():
        if isinstance(event, tracing.Op) and event.product:
            count += times * 2 * torch.Size(event.product).numel()
        elif isinstance(event, tracing.Launch) and not event.idle:
            tiles = pricing.tiles_of(event, event.grid[0] * event.grid[1])
            count += times * 2 * tiles * event.block[0] * event.block[1] * event.multiplied
    return count


@pytest.mark.parametrize(
    ("family", "which", "width", "units"),
    [
        ("contrastive", "forward", 512, 1),
        ("contrastive", "both", 512, 4),
        ("contrastive", "both", 256, 5),  # fused: S again for each side
        ("contrastive_ids", "both", 512, 4),
        ("sigmoid", "both", 512, 3),
        # the upper triangle, and the second halves of the squares on the diagonal: 1/8 more of S and T each
        ("relation_kl", "forward", 512, 1 + 1 / 8),
        ("relation_kl", "both", 512, 3 + 2 / 8),
        ("relation_mae", "both", 512, 2 + 1 / 8),
        ("contrastive_twice", "forward", 512, 4),
    ],
)
def test_launched_products_are_the_units_that_the_kernels_promise(family, which, width, units):
    pairs = 32768
    assert products(family, which, pairs, width) / (2 * pairs**2 * width) == pytest.approx(units, rel=1e-2)


@pytest.mark.parametrize("family", ["contrastive", "relation_kl", "sigmoid"])
def test_twice_the_pairs_take_four_times_the_products(family):
    small, large = (model.predict(family, "both", n, D, ASSUMED) for n in (65536, 131072))
    assert large.found.cost.parts["products"] / small.found.cost.parts["products"] == pytest.approx(4, rel=0.03)
    assert 3.5 < large.ms / small.ms < 4.1


@pytest.mark.parametrize("family", entries.FAMILIES)
def test_every_family_of_the_benchmark_has_a_prediction(family):
    """Ours run and are found in the instruction table, whose tiles are those that the launchers choose."""
    assert any(entry.name == model.OURS for entry in entries.entries([family], []))
    for which in model.passes(family):
        found = model.predict(family, which, N, D, ASSUMED)
        assert 0 < found.ms < 1e5 and found.found.limit
        assert found.fraction < 1
        assert sum(found.found.cost.parts.values()) == pytest.approx(found.found.device_s)


def test_instructions_are_of_the_kernels_that_the_compile_table_holds():
    """Where this fails a kernel has changed: `python benchmarks/kernels_model_sass.py --only NAME` counts it again."""
    compiled = csv.DictReader((pricing.TABLE.parent / "compile_table.csv").read_text().splitlines())
    compiled = {(row["kernel"], row["variant"], row["dtype"]): row for row in compiled if row["arch"] == "sm_90"}
    counted = csv.DictReader(pricing.TABLE.read_text().splitlines())
    counted = {(row["kernel"], row["variant"], row["dtype"]): row for row in counted}
    assert {place for place in compiled if place[2] != "fp16"} == {place for place in counted if place in compiled}
    assert all("no gradient" in variant for _, variant, _ in set(counted) - set(compiled))
    for place in set(counted) & set(compiled):
        for name in ("tile", "warps", "shared_bytes"):
            assert counted[place][name] == compiled[place][name], place
        # ptxas by itself trades a spill for a register here and there
        assert abs(int(counted[place]["registers"]) - int(compiled[place]["registers"])) <= 8, place


def test_a_kernel_that_was_not_counted_is_an_error(monkeypatch):
    monkeypatch.setattr(pricing, "instructions", lambda: {})
    with pytest.raises(
        ValueError, match=r"statistics_kernel \(shared, bf16, 128x256x64\): not in instruction_table.csv"
    ):
        model.predict("contrastive", "forward", N, D, ASSUMED)


def test_kernels_for_vector_references_are_idle_and_the_others_are_not():
    found = {
        (event.kernel, "shared" in event.variant): event.idle
        for event in model.events("relation_kl", N, D, "both")
        if isinstance(event, tracing.Launch)
    }
    assert found == {
        ("relation_statistics_kernel", True): False,
        ("relation_statistics_kernel", False): True,
        ("relation_maxima_kernel", False): True,
        ("relation_weights_kernel", True): False,
        ("relation_weights_kernel", False): True,
    }
    matrix = [e for e in model.events("relation_kl_matrix", N, D, "forward") if isinstance(e, tracing.Launch)]
    assert {e.idle for e in matrix if e.kernel == "relation_statistics_kernel"} == {True, False}


def test_small_batches_wait_for_the_host_and_large_ones_do_not():
    assert model.predict("contrastive", "both", 256, D, ASSUMED).found.limit == "launches"
    large = model.predict("contrastive", "both", 131072, D, ASSUMED)
    assert large.found.device_s > 5 * large.found.host_s


def test_rates_are_what_the_prediction_follows():
    place = "contrastive", "both", 131072, D
    slower = model.predict(*place, rates.Rates({"product_tflops": 395.0}))
    assert slower.found.cost.parts["products"] == pytest.approx(
        2 * model.predict(*place, ASSUMED).found.cost.parts["products"], rel=0.2
    )
    with pytest.raises(ValueError, match="--set speed: no such rate, expected one of multiprocessors"):
        rates.Rates({"speed": 1.0})


def test_instructions_of_a_disassembly():
    """Two loops over features in one over tiles, and a round without products."""
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R2, R2, R3 ;
.L_x_1:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0030*/               @P5 BRA `(.L_x_1) ;
        /*0040*/              @!P0 MUFU.EX2 R5, R5 ;
.L_x_2:
        /*0050*/                   SHFL.BFLY PT, R6, R5, 0x1, 0x1f ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""
    found = sass.counts(text, over_tiles=True, teachers=1)
    assert found == {"issued": 3, "fp32": 1, "special": 1, "memory": 0, "step": 2, "round": 2}
    assert sass.counts(text, over_tiles=False, teachers=1)["issued"] == 9 - 2


def test_the_picture_kernel_by_its_own_constants():
    assert pictures.constants() == {"kThreads": 64, "kRows": 8, "kChunk": 8}
    found = pictures.predict(ASSUMED)
    assert 0 < found["bytes_ms"] < found["ms"] < 10


def results(path: Path, rows: list[dict], columns: list[str] = report.COLUMNS) -> Path:
    place = {"scale": 100.0, "dtype": "bfloat16", "status": "ok", "entry": model.OURS, "device": "NVIDIA H200"}
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(place | {"pairs": N, "width": D, "square_tflops": 700} | row for row in rows)
    return path


def test_against_gives_the_ratio_of_every_measured_row(tmp_path, capsys):
    places = [("contrastive", "both"), ("ranks", "forward")]
    expected = [model.predict(*place, N, D, ASSUMED).ms for place in places]
    rows = [
        {"family": places[0][0], "pass": places[0][1], "median_ms": 2 * expected[0]},
        {"family": places[1][0], "pass": places[1][1], "median_ms": expected[1] / 4},
        {"family": "contrastive", "pass": "forward", "median_ms": 1, "entry": "dense eager"},
        {"family": "contrastive", "pass": "forward", "status": "skipped"},
    ]
    assert model.main(["--against", str(results(tmp_path / "kernels.csv", rows))]) == 0
    with (tmp_path / "predicted.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["family"], row["pass"]) for row in found] == places
    assert [float(row["ratio"]) for row in found] == pytest.approx([2, 0.25], rel=1e-3)
    assert float(found[0]["predicted_ms"]) == pytest.approx(expected[0], rel=1e-3)
    page = (tmp_path / "predicted.md").read_text()
    assert page in capsys.readouterr().out
    assert "measured on NVIDIA H200" in page and "at 700 TFLOP/s" in page
    assert "0.25 to 2.00" in page


@pytest.mark.parametrize(
    ("columns", "rows", "said"),
    [
        ([c for c in report.COLUMNS if c not in ("median_ms", "pass")], [{}], "missing: pass, median_ms"),
        (report.COLUMNS, [{"entry": "dense eager"}], "expected rows of 'vlscale triton' that ran, found none"),
        (report.COLUMNS, [{"family": "triplet", "pass": "both"}], "no prediction for the family triplet"),
    ],
)
def test_against_refuses_in_one_line(tmp_path, capsys, columns, rows, said):
    path = results(tmp_path / "kernels.csv", rows, columns)
    assert model.main(["--against", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --against {path}: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "predicted.csv").exists()


def test_against_names_a_file_that_is_not_there(tmp_path, capsys):
    assert model.main(["--against", str(tmp_path / "none.csv")]) == 2
    assert "found no such file" in capsys.readouterr().err


def test_the_page_says_first_that_nothing_was_measured(tmp_path):
    small = ["--families", "contrastive", "ranks", "--widths", "512", "--pairs", "32768", "131072"]
    assert model.main(["--write", "--out", str(tmp_path), *small]) == 0
    (path,) = tmp_path.glob("*-kernels-model.md")
    text = path.read_text()
    assert "nothing here was measured" in text.splitlines()[0]
    assert "| contrastive | both | 512 | 131,072 |" in text and "0.60, then 0.70" in text
    for name in rates.RATES:
        assert f"| {name} |" in text
    with path.with_suffix(".csv").open(newline="") as file:
        rows = {(row["family"], row["pass"], row["pairs"]) for row in csv.DictReader(file)}
    assert rows == {(f, w, n) for f in ("contrastive", "ranks") for w in model.passes(f) for n in ("32768", "131072")}
