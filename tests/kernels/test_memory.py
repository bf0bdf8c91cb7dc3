"""Linear memory, measured by the benchmark's own command in a fresh process: one matrix of logits is 400 MB here."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("variant", ["contrastive chunked", "relation_kl chunked"])
def test_no_matrix_of_pairs_is_stored(variant):
    command = [sys.executable, "benchmarks/kernels_cpu.py", "--memory-of", variant, "--pairs", "10240"]
    command += ["--width", "16", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 100
