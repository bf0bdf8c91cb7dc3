"""`vlscale bench checkpoint` at its smallest: every kind of save is measured, beside what was predicted."""

import json
import sys

from tests.conftest import ROOT


def test_every_save_is_measured_and_predicted(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import checkpoint_cost

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(checkpoint_cost, "VISION", checkpoint_cost.VISION | small)
    monkeypatch.setattr(checkpoint_cost, "TEXT", checkpoint_cost.TEXT | small)
    monkeypatch.setattr(checkpoint_cost, "RESULTS", tmp_path)
    arguments = ["--saves", "1", "--block", "2", "--batch", "2", "--folder", str(tmp_path), "--write"]
    monkeypatch.setattr(sys, "argv", ["checkpoint_cost.py", *arguments])
    checkpoint_cost.main()
    (file,) = tmp_path.glob("*-checkpoint-cost.json")
    rows = json.loads(file.read_text())
    assert rows["step_seconds"] > 0 and rows["bytes"] > 12 * 30_522 * 32, "weights and two moments"
    for kind in ("async", "sync"):
        assert rows[kind]["predicted_seconds"] > 0 and rows[kind]["stood_still"] > 0
    assert capsys.readouterr().out.count("| async |") == 1 and len(list(tmp_path.iterdir())) == 2
