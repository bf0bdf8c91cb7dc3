"""`vlscale bench kernels` on a CPU at small sizes: rows, resuming, what is missing and why, and the accuracy mode."""

import csv
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import kernels_bench as bench
import kernels_bench_accuracy as accuracy
import kernels_bench_entries as entries
import kernels_bench_measure as measure
import kernels_bench_report as report

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--device",
    "cpu",
    "--pairs",
    "64",
    "130",
    "--widths",
    "16",
    "--scales",
    "100",
    "--without",
    "compiled",
    "--rounds",
    "5",
]


def run(out: Path, *more: str) -> int:
    return bench.main(["--out", str(out), *SMALL, *more])


def rows_of(out: Path, name: str = "kernels.csv") -> list[dict]:
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A finished benchmark of every family."""
    folder = tmp_path_factory.mktemp("bench")
    assert run(folder, "--minutes", "1") == 0
    return folder


def test_every_family_and_pass_has_a_row(out):
    rows = rows_of(out)
    done = {(r["family"], r["entry"], r["pairs"], r["pass"]) for r in rows if r["status"] == "ok"}
    for family, found in entries.FAMILIES.items():
        for which in measure.PASSES if found.both else ("forward",):
            for entry in ("vlscale chunked", "dense eager"):
                assert {(family, entry, n, which) for n in ("64", "130")} <= done
    for row in rows:
        if row["status"] == "ok":
            assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
            assert int(row["rounds"]) >= 3 and float(row["square_tflops"]) > 0


def test_rates_count_the_fewest_operations(out):
    """4 u for the contrastive loss with its gradients, 3 u for relation KL, u = 2 N^2 D; the share is of the square."""
    counts = {("contrastive", "both"): 4, ("contrastive", "forward"): 1, ("relation_kl", "backward"): 2}
    seen = 0
    for row in rows_of(out):
        count = counts.get((row["family"], row["pass"]))
        if row["status"] == "ok" and count:
            rate = count * 2 * int(row["pairs"]) ** 2 * 16 / float(row["median_ms"]) * 1e3 / 1e12
            assert float(row["tflops"]) == pytest.approx(rate, rel=1e-2)
            assert float(row["fraction"]) == pytest.approx(rate / float(row["square_tflops"]), rel=1e-2)
            seen += 1
        if row["status"] == "ok" and row["family"] == "sigmoid" and row["pass"] == "backward":
            assert row["tflops"] == ""  # the gradient was made in the forward pass
    assert seen >= 16


def test_what_cannot_run_here_says_why(out):
    missing = {(row["entry"], row["detail"]) for row in rows_of(out) if row["status"] == "missing"}
    assert ("vlscale triton", "Triton kernels need a CUDA device") in missing
    assert ("Inf-CL", "Inf-CL needs a CUDA device") in missing
    page = (out / "kernels.md").read_text()
    assert "- vlscale triton: Triton kernels need a CUDA device" in page
    assert "## contrastive, both, float32" in page


def test_plots_are_pictures(out):
    for family in entries.FAMILIES:
        assert (out / f"{family}-16.png").read_bytes().startswith(b"\x89PNG")


def test_finished_rows_are_kept_and_others_tried_again(out, tmp_path, capsys):
    before = rows_of(out)
    assert run(out, "--minutes", "1", "--families", "contrastive", "relation_kl") == 0
    after = rows_of(out)
    ok = [row for row in before if row["status"] == "ok"]
    assert [row for row in after if row["status"] == "ok"] == ok
    kept = [row for row in ok if row["entry"] != "dense eager" or row["family"] != "ranks"]
    with (tmp_path / "kernels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, report.COLUMNS)
        table.writeheader()
        table.writerows(kept)
    capsys.readouterr()
    assert run(tmp_path, "--minutes", "1", "--families", "ranks") == 0
    names = {(row["family"], row["entry"], row["pairs"], row["status"]) for row in rows_of(tmp_path)}
    assert ("ranks", "dense eager", "64", "ok") in names
    assert [row for row in rows_of(tmp_path) if row in kept] == kept


def test_rows_of_another_machine_are_refused(out, tmp_path):
    text = (out / "kernels.csv").read_text()
    (tmp_path / "kernels.csv").write_text(text.replace(",CPU,", ",NVIDIA H100,"))
    with pytest.raises(ValueError, match="expected rows of device CPU, got NVIDIA H100; choose another --out"):
        run(tmp_path)


def statuses(out: Path) -> dict[tuple[str, str], tuple[str, str]]:
    return {(row["entry"], row["pairs"]): (row["status"], row["detail"]) for row in rows_of(out)}


def test_a_dense_entry_that_does_not_fit_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.Device, "free_bytes", lambda self: 5 * 4 * 100**2)
    assert run(tmp_path, "--families", "contrastive") == 0
    found = statuses(tmp_path)
    assert found["dense eager", "64"][0] == "ok"
    assert found["dense eager", "130"][0] == "out of memory" and "needs about" in found["dense eager", "130"][1]
    assert found["vlscale chunked", "130"][0] == "ok"
    assert "out of memory" in (tmp_path / "kernels.md").read_text()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (AssertionError("D must be 64"), "failed"),
    ],
    ids=["cuda memory", "cpu memory", "assertion"],
)
def test_a_peer_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, error, status):
    def broken(problem):
        raise error

    monkeypatch.setitem(entries.DENSE, "ranks", (broken, 0))
    assert run(tmp_path, "--families", "ranks") == 0
    found = statuses(tmp_path)
    assert found["dense eager", "64"][0] == status and str(error) in found["dense eager", "64"][1]
    assert found["vlscale chunked", "64"][0] == "ok"


def test_our_own_failure_is_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "retrieval_ranks", lambda *_, **__: 1 / 0)
    assert run(tmp_path, "--families", "ranks") == 1
    assert statuses(tmp_path)["vlscale chunked", "64"] == ("failed", "ZeroDivisionError: division by zero")


def test_a_run_that_is_stopped_writes_what_it_has(tmp_path, monkeypatch):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(bench.Device, "clear", stop)  # after the first point
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--families", "ranks")
    assert "| 64 | 16 | 100.0 | vlscale chunked |" in (tmp_path / "kernels.md").read_text()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_broken_context_stops_and_the_next_run_goes_on(tmp_path, monkeypatch):
    def broken(problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(entries.DENSE, "ranks", (broken, 0))
    for pairs in ("64", "130"):
        with pytest.raises(RuntimeError, match="dense eager broke the GPU's context"):
            run(tmp_path, "--families", "ranks")
        assert statuses(tmp_path)["dense eager", pairs][0] == "failed"
    assert run(tmp_path, "--families", "ranks") == 0


def test_what_would_take_too_long_is_skipped():
    point = bench.Point("contrastive", 1000, 16, 100.0, "float32")
    entry = entries.entries(["contrastive"], [])[0]
    clock = bench.Clock(time.monotonic() + 100, rate=1e12)
    clock.learn(entry, point, 0.5)
    larger = bench.Point("contrastive", 10_000, 16, 100.0, "float32")
    assert clock.predict(entry, larger) == pytest.approx(50)
    other_width = bench.Point("contrastive", 10**6, 32, 100.0, "float32")
    assert clock.predict(entry, other_width) == pytest.approx(9 * 2 * 1e12 * 32 / 1e12)  # 1 u, and twice 4 u


def test_a_long_entry_is_a_row_that_names_the_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.Clock, "predict", lambda self, entry, point: 1e3 * (entry.name == "dense eager"))
    assert run(tmp_path, "--families", "ranks") == 0
    found = statuses(tmp_path)
    assert found["dense eager", "64"][0] == "skipped" and "predicted 8000 s" in found["dense eager", "64"][1]
    assert found["vlscale chunked", "64"][0] == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="--device: expected cpu where torch sees no CUDA device"):
        run(tmp_path, "--device", "cuda")


def test_no_time_leaves_rows_that_say_so_and_the_next_run_measures_them(tmp_path):
    assert run(tmp_path, "--families", "ranks", "--minutes", "1e-9") == 0
    assert set(statuses(tmp_path).values()) == {("skipped", "the minutes were over")}
    assert "rows did not fit the time" in (tmp_path / "kernels.md").read_text()
    assert run(tmp_path, "--families", "ranks") == 0
    assert statuses(tmp_path)["vlscale chunked", "130"] == ("ok", "")


def test_rounds_and_quantiles():
    assert measure.rounds_for(10, [0.5, 0.5], 50) == 10
    assert measure.rounds_for(0.1, [0.5], 50) == 3 and measure.rounds_for(1e6, [0.5], 50) == 50
    assert measure.Timing([float(v) for v in (5, 1, 2, 4, 3, 6)], 0).quantiles() == (2, 3.5, 5)


@pytest.mark.parametrize("wrong", [["--pairs", "1"], ["--widths", "0"], ["--rounds", "0"], ["--batch", "0"]])
def test_bad_sizes(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected"):
        run(tmp_path, *wrong)


def test_dense_forms_are_the_losses(tmp_path):
    """In float64 the dense peers agree with the definitions, so that an error in the table is rounding."""
    for family, found in entries.FAMILIES.items():
        if found.truth is None:
            continue
        problem = entries.make_problem(family, 40, 16, 14.0, torch.float32, torch.device("cpu")).double()
        exact = accuracy.outputs(found.truth, problem)
        losses = [entries.DENSE[family][0]] + [entries.two_products] * (family == "contrastive")
        for loss in losses:
            for name, value in accuracy.outputs(loss, problem).items():
                assert accuracy.relative(value, exact[name]) < 1e-10, (family, name)


def test_accuracy_compares_all_entries_with_float64(tmp_path):
    assert bench.main(["--accuracy", "--out", str(tmp_path), *SMALL, "--pairs", "65"]) == 0
    rows = [row for row in rows_of(tmp_path, "accuracy.csv") if row["error"]]
    seen = {(row["family"], row["regime"], row["quantity"], row["entry"]) for row in rows}
    for regime in accuracy.REGIMES:
        for quantity in ("loss", "d image", "d text", "d scale"):
            assert ("contrastive", regime, quantity, "vlscale chunked") in seen
        assert ("relation_kl", regime, "d image", "dense eager") in seen
    for row in rows:
        if row["entry"] == "vlscale chunked":  # converged at scale 100, dense float32 is wrong altogether
            assert float(row["error"]) < 1e-3
    assert "missing: Triton kernels need a CUDA device" in (tmp_path / "accuracy.md").read_text()


def test_what_the_definition_itself_loses_is_not_compared(tmp_path):
    """At scale 100 the other pairs of converged ones weigh 1e-20 of their own, and 1 - p is 0 in float64."""
    given = [*SMALL, "--pairs", "300", "--widths", "64", "--families", "contrastive"]
    assert bench.main(["--accuracy", "--out", str(tmp_path), *given]) == 0
    compared = {row["regime"] for row in rows_of(tmp_path, "accuracy.csv") if row["error"]}
    assert compared == {"random", "cone"}
    assert "converged, scale 100: the definition is rounding in float64" in (tmp_path / "accuracy.md").read_text()


def test_pictures_are_compared_with_torch_s_own_resize(tmp_path):
    assert bench.main(["--pictures", "--out", str(tmp_path), "--device", "cpu", "--batch", "2", "--rounds", "2"]) == 0
    (row,) = (row for row in rows_of(tmp_path, "pictures.csv") if row["entry"] == "vlscale reference")
    assert float(row["pictures_s"]) == pytest.approx(2e3 / float(row["median_ms"]), rel=1e-3)
    assert float(row["error"]) < 1e-4
    page = (tmp_path / "pictures.md").read_text()
    assert "- vlscale cuda: needs a CUDA device" in page and "F.interpolate" in page


def test_a_wrong_gradient_is_seen():
    problem = entries.make_problem("contrastive", 40, 16, 14.0, torch.float32, torch.device("cpu"))
    wrong = entries.Entry("contrastive", "wrong", lambda device: lambda p: entries.dense_contrastive(p) * 1.01)
    found = accuracy.errors(wrong, problem, entries.FAMILIES["contrastive"].truth, torch.device("cpu"))
    assert all(error == pytest.approx(0.01, rel=0.1) for error in found.values())


def test_gpu_all_reports_parts_that_fail_and_goes_on(tmp_path):
    """With a python that only fails: every part is tried, named in the summary, and counted in the exit code."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\nexit 3\n')
    stub.chmod(0o755)
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    command = ["bash", ROOT / "benchmarks" / "gpu_all.sh", "--cpu-smoke", out]
    environment = os.environ | {"PYTHON": str(stub), "OUT": str(kept)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    summary = (out / "summary.txt").read_text()
    parts = ("tests", "errors", "times", "times_narrow", "times_rest", "pictures", "memcheck")
    assert [line.split()[:3] for line in summary.splitlines()[2:]] == [[part, "failed", "(3)"] for part in parts]
    assert len((tmp_path / "python.calls").read_text().splitlines()) >= len(parts)
    assert summary in done.stdout
    assert sorted(path.name for path in kept.iterdir()) == ["gpu_all.tar.gz", "summary.txt", "tests.log"]
    with tarfile.open(kept / "gpu_all.tar.gz") as files:
        assert {f"./{part}.log" for part in parts} <= set(files.getnames())


@pytest.mark.parametrize("argument", ["--gpu", "--help"])
def test_gpu_all_explains_itself(argument):
    command = ["bash", ROOT / "benchmarks" / "gpu_all.sh", argument]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if argument == "--help" else 2)
    assert "FOLDER" in done.stdout + done.stderr


def test_the_parts_of_gpu_all_fit_nine_minutes():
    text = (ROOT / "benchmarks" / "gpu_all.sh").read_text()
    on_gpu = text.replace("part memcheck 60", "")  # of the smoke run
    assert sum(int(limit) for limit in re.findall(r"^ *part \w+ (\d+) ", on_gpu, re.MULTILINE)) <= 540
