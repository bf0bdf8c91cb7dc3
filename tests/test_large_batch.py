"""The benchmark of batches larger than memory: what a pair adds to a step by chunks, and that the command runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import large_batch

CHUNK = 64
BATCHES = (2048, 4096)  # beyond which the loss's tiles grow no more


def test_a_pair_adds_its_embeddings_and_its_part_of_a_graph():
    """Beside these half a copy of both embeddings; a whole one more, the pixels as floats or a layer's activations of
    all pairs (32 KB of the tiny towers') would show."""
    points = []
    environment = os.environ | large_batch.RETURNED | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for batch in BATCHES:
        command = [sys.executable, large_batch.__file__, "--small", "--memory", str(batch), str(CHUNK)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        points.append({"batch": batch, "chunk": CHUNK} | json.loads(done.stdout.splitlines()[-1]))
    embeddings, graphs = 4 * large_batch.DIM * 4, large_batch.slope(points, "graphs")
    assert 500 < graphs < 4000
    assert embeddings < large_batch.slope(points, "megabytes") < embeddings + graphs + 2000


def test_the_command_writes_page_numbers_and_plot(monkeypatch, tmp_path):
    """All but the memory, which processes of their own measure."""

    def measured(command, **kwargs):
        if "--memory" not in command:  # git's, of the provenance
            return run(command, **kwargs)
        batch, chunk = map(int, command[command.index("--memory") + 1 :][:2])
        found = {"megabytes": 10 + batch / 4, "graphs": batch / 16} if chunk else {"megabytes": 80.0}
        return subprocess.CompletedProcess(command, 0, json.dumps(found) + "\n", "")

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", measured)
    monkeypatch.setattr(large_batch, "ENOUGH", 24)
    given = ["--small", "--batches", "8", "24", "--chunk", "4", "--rounds", "2", "--write", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["large_batch.py", *given])
    large_batch.main()
    page, numbers, picture = (next(tmp_path.glob(f"*-large-batch.{kind}")) for kind in ("md", "json", "png"))
    points = json.loads(numbers.read_text())
    assert [(p["batch"], p["chunk"]) for p in points] == [(8, 0), (8, 4), (24, 4)]
    assert all(p["rounds"] >= 2 and p["range"][0] <= p["ratio"] <= p["range"][1] for p in points[1:])
    assert "A pair adds 250.0 KB: 4.1 of embeddings and 62.5 of the graph" in page.read_text()
    assert "--chunk 4 --rounds 2 --write --small`" in page.read_text()
    assert Path(picture).stat().st_size > 20_000
