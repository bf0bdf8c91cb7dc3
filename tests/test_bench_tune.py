"""`vlscale bench tune`, its way tried in the interpreter: what is slower or wrong is not chosen, what is refused."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import kernels_tune as tune  # noqa: E402
import kernels_tune_choices as choices  # noqa: E402
from vlscale.kernels.measured_tiles import read_tiles  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tries the interpreter's way")
SMALL = ["--device", "cpu", "--pairs", "70", "--widths", "20", "--most", "2", "--minutes", "1"]


@pytest.fixture
def here(monkeypatch):
    """Without processes that compile: each would import torch and Triton for a minute of tests."""
    monkeypatch.setattr(tune.Tuner, "prepare", lambda self, launch, tiles, *_: [tune.Trial(tile) for tile in tiles])


@pytest.fixture
def seconds(monkeypatch):
    """Gives every choice a time by its tile's rows: {rows: seconds}, in use 1."""
    of_rows: dict[int, float] = {}
    taking, now = choices.Place.taking, [1.0]

    def recorded(self, launch, choice, others):
        now[0] = of_rows.get(getattr(choice, "block_m", 0), 1.0)
        return taking(self, launch, choice, others)

    monkeypatch.setattr(choices.Place, "taking", recorded)
    monkeypatch.setattr(tune.Calls, "seconds", lambda self, which, device: now[0])
    return of_rows


def rows_of(folder: Path) -> list[dict]:
    with (folder / "tune.csv").open() as file:
        return list(csv.DictReader(file))


def written(folder: Path) -> dict:
    return read_tiles.__wrapped__(str(folder / "tiles.json"))["cpu"]["bfloat16"]


def tuned(folder: Path, *more: str) -> dict:
    assert tune.main(["--out", str(folder), *SMALL, *more]) == 0
    return written(folder)


def test_processes_compile_and_the_kernels_take_what_was_written(tmp_path):
    found = tuned(tmp_path, "--launches", "ranks")
    assert set(found) == {"ranks"} and {row["status"] for row in rows_of(tmp_path)} >= {"in use", "ok"}
    page = (tmp_path / "tune.md").read_text()
    assert "| launch | width |" in page and "N = 70, bfloat16" in page and "`vlscale bench tune --out" in page
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("fast", "chosen"), [(0.5, 64), (0.99, 32)])
def test_a_faster_tile_is_chosen_and_one_that_hardly_is_not(tmp_path, here, seconds, fast, chosen):
    seconds[64] = fast
    found = tuned(tmp_path, "--launches", "contrastive_forward", "--most", "8")
    assert found["contrastive_forward"]["block_m"] == chosen
    ratios = {row["tile"].split("x")[0]: row["times_in_use"] for row in rows_of(tmp_path)}
    assert float(ratios["64"]) == fast and float(ratios["32"]) == 1


def test_a_tile_that_gives_other_values_is_not_chosen_however_fast(tmp_path, here, seconds, monkeypatch, capsys):
    seconds[64] = 0.1
    values, taking, rows = tune.values, choices.Place.taking, [0]

    def recorded(self, launch, choice, others):
        rows[0] = getattr(choice, "block_m", 0)
        return taking(self, launch, choice, others)

    monkeypatch.setattr(choices.Place, "taking", recorded)
    monkeypatch.setattr(tune, "values", lambda calls: [v * (1.1 if rows[0] == 64 else 1) for v in values(calls)])
    given = ["--out", str(tmp_path), *SMALL, "--most", "8", "--launches", "contrastive_forward"]
    assert tune.main(given) == 1
    assert (
        read_tiles.__wrapped__(str(tmp_path / "tiles.json"))["cpu"]["bfloat16"]["contrastive_forward"]["block_m"] == 32
    )
    wrong = [row for row in rows_of(tmp_path) if row["tile"].startswith("64x")]
    assert wrong and all(row["status"] == "other values: 1.0e-01 apart" for row in wrong)


def test_a_tile_that_does_not_compile_is_left_out_and_said(tmp_path, here, monkeypatch):
    taking = choices.Place.taking

    def fails(self, launch, choice, others):
        if choice.block_m == 64:
            raise RuntimeError("out of resource: shared memory\nReducing block sizes may help.")
        return taking(self, launch, choice, others)

    monkeypatch.setattr(choices.Place, "taking", fails)
    found = tuned(tmp_path, "--launches", "ranks", "--most", "8")
    assert found["ranks"]["block_m"] == 32
    said = {row["status"] for row in rows_of(tmp_path) if row["tile"].startswith("64x")}
    assert said == {"RuntimeError: out of resource: shared memory"}


def test_what_an_earlier_call_found_is_kept_unless_it_is_asked_for_again(tmp_path, here, seconds):
    seconds[64] = 0.5
    first = tuned(tmp_path, "--launches", "ranks", "--most", "8")
    seconds[64] = 2.0
    second = tuned(tmp_path, "--launches", "neighbours", "--most", "8")
    assert second["ranks"] == first["ranks"] and second["ranks"]["block_m"] == 64
    assert second["neighbours"]["block_m"] == 32
    assert tuned(tmp_path, "--launches", "ranks", "--most", "8")["ranks"]["block_m"] == 32


def test_waves_are_tried_of_the_fastest_tile(tmp_path, here, seconds):
    found = tuned(tmp_path, "--launches", "sigmoid")
    assert {row["waves"] for row in rows_of(tmp_path)} == {"96x128", "64x128"} and found["sigmoid"]["wave_rows"] == 96


def test_not_fused_is_null_and_read_as_that(tmp_path, here, seconds):
    found = tuned(tmp_path, "--launches", "contrastive_fused_128")
    assert (
        found == {"contrastive_fused_128": {}}
        and '"contrastive_fused_128": null' in (tmp_path / "tiles.json").read_text()
    )


def test_no_tile_is_tried_that_cannot_fit():
    place = choices.Place("cpu", "bfloat16", 70)
    for launch in choices.BY_NAME:
        for choice in choices.tiles_for(launch, choices.in_use(place, launch, 40), place):
            if choice is not choices.NOT_FUSED:
                products = choices.BY_NAME[launch].products * choice.block_m * choice.block_n
                assert products <= choices.REGISTERS * 32 * choice.warps
                assert choice.wave_rows % choice.block_m == 0 and choice.wave_columns % choice.block_n == 0


REFUSED = {
    "no GPU": ([], "error: --device: expected a CUDA device, got TRITON_INTERPRET=1"),
    "pairs": ([*SMALL, "--pairs", "1"], "error: --pairs: expected at least 2, got 1"),
    "widths": ([*SMALL, "--widths", "0"], "error: --widths: expected at least 1, got [0]"),
    "minutes": ([*SMALL, "--minutes", "-1"], "error: --minutes: expected at least 0, got -1"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        tune.end_with(tune.main, given)
    assert ended.value.code == 2 and capsys.readouterr().err.strip().startswith(said)


def test_the_benchmarks_end_wrong_input_in_one_line():
    import subprocess

    command = [sys.executable, str(ROOT / "benchmarks" / "kernels_bench.py"), "--device", "cpu", "--pairs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --pairs: expected at least 2, got 1\n"


def test_the_command_is_there():
    from vlscale.cli import app

    assert "tune" in CliRunner().invoke(app, ["bench"]).output
