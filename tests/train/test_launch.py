"""The real launcher: two gloo ranks under `deepspeed`, every ZeRO stage in one launch, against one process; and on the
machines of a hostfile."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.train.launcher import launch
from tests.train.stand_ins import stand_in
from vlscale.cli.launcher import free_port
from vlscale.config import load_plan
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.resources import launch_folder
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan
from vlscale.train.rendezvous import join

RUNS = {
    "zero0": "engine: {zero_stage: 0}",
    "zero1": "engine: {zero_stage: 1}",
    "zero2": "engine: {zero_stage: 2}",
    "zero3": "engine: {zero_stage: 3}",
    "chunks": "engine: {zero_stage: 2}, train: {chunk_size: 4}",
    "chunks-zero3": "engine: {zero_stage: 3}, train: {chunk_size: 4}",
    "bf16": "engine: {zero_stage: 2, dtype: bf16}",
}


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory) -> Path:
    """Contrast and relations to a frozen copy of the start, from a single run of a teacher stage."""
    path = tmp_path_factory.mktemp("recipe") / "stages.yaml"
    variants = "".join(f"  {name}: {{{own}}}\n" for name, own in RUNS.items())
    path.write_text(
        f"base: {tiny_config}\n"
        "teacher: {source: frozen_copy}\n"
        "objective: {name: covlr, relation_weight: 0.5}\n"
        "train: {max_steps: 4, checkpoint_every: 4}\n"
        f"variants:\n{variants}"
    )
    return path


@pytest.fixture(scope="module")
def launched(recipe, corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("launched") / "out"
    done = launch(recipe, out, f"data.val=['{corpus}/val-*.tar']", "eval.batch_size=31")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    train_plan(load_plan(recipe, ["log.progress=false"]), out, resume=False)
    return out


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_follow_one_process(launched, alone, name):
    """The same batches in the same order, the same losses and gradient norms, the same distance moved."""
    two, one = (read_metrics(out / name / "metrics.jsonl") for out in (launched, alone))
    assert [line["keys"] for line in two] == [line["keys"] for line in one]
    loose = name == "bf16"
    for a, b in zip(two, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2 if loose else 1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.1 if loose else 1e-4)
    if loose:
        return
    weights = [load_file(out / name / "final" / "model.safetensors") for out in (launched, alone)]
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key].float(), weights[1][key].float(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_validation_over_ranks_equals_evaluation_of_the_final_model(launched, corpus, name):
    """63 samples by batches of 31: one rank has one batch and the other two."""
    during = json.loads((launched / name / "eval.json").read_text())
    _, alone = evaluate_model(EvalRequest(str(launched / name), [f"{corpus}/val-*.tar"]))
    assert during["images"] == alone.images == 63 and during["captions"] == alone.captions
    for measure in ("rsum", "i2i/ndcg@10", "t2t/ndcg@10", "t2it/ndcg@10_paper", "i2t/mean_rank"):
        assert during["metrics"][measure]["value"] == pytest.approx(alone[measure].value, rel=1e-4)


def test_a_wrong_config_is_said_once_and_ends_with_2(tiny_config, tmp_path):
    done = launch(tiny_config, tmp_path / "out", "train.global_batch_size=33")
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "33 cannot be divided by the world size 2" in said[0]
    assert not (tmp_path / "out").exists()


STEPS = ["train.max_steps=3", "train.checkpoint_every=3", "log.progress=false"]


DEEPSPEED = ["-m", "deepspeed.launcher.runner"]
TRYING_FIRST = [str(launch_folder() / "hosts.py")]


def launch_on(
    hosts: str, config: Path, folder: Path, *overrides: str, by: list[str] = DEEPSPEED
) -> subprocess.CompletedProcess:
    """As one types it: `deepspeed --hostfile FILE launch/train.py CONFIG --out DIR`, in `folder`, or `python
    launch/hosts.py` in place of its first word. What machines are to know beside the command stands in DeepSpeed's own
    file."""
    (folder / "hostfile").write_text(hosts)
    known = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in known.items()))
    command = [sys.executable, *by, "--quiet", "--hostfile", str(folder / "hostfile")]
    command += ["--master_port", str(free_port()), str(launch_folder() / "train.py"), str(config)]
    environment = os.environ | known | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    how = {"env": environment, "cwd": folder, "capture_output": True, "text": True, "timeout": 900}
    return subprocess.run([*command, "--out", str(folder / "two"), *STEPS, *overrides], **how)


def test_a_rank_on_each_machine_of_a_hostfile_follows_one_process(tiny_config, tmp_path):
    asked = stand_in(tmp_path / "bin")
    done = launch_on("near slots=1\nfar slots=1\n", tiny_config, tmp_path, by=TRYING_FIRST)
    assert done.returncode == 0, done.stderr[-4000:]
    assert asked.read_text().split().count("far") == 2  # to see that it is there, and to start the rank
    train_plan(load_plan(tiny_config, STEPS), tmp_path / "one", resume=False)
    two, one = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [line["keys"] for line in two] == [line["keys"] for line in one] and len(two) == 3
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)


@pytest.mark.parametrize("hosts", ["away slots=1\nnear slots=1\n", "near slots=1\naway slots=1\n", "away slots=1\n"])
def test_machines_are_tried_before_a_job_is_spent(hosts, tiny_config, tmp_path):
    asked = stand_in(tmp_path / "bin")
    done = launch_on(hosts, tiny_config, tmp_path, by=TRYING_FIRST)
    assert done.returncode == 2 and not (tmp_path / "two").exists()
    (said,) = done.stderr.splitlines()
    assert said.startswith(
        "error: hostfile: host away not reached: ssh: connect to host away port 22: No route to host;"
    )
    assert said.endswith("or take away out of the hostfile")
    assert sorted(asked.read_text().split()) == sorted(line.split()[0] for line in hosts.splitlines())


def test_only_machines_that_take_part_are_tried(monkeypatch, tmp_path):
    """By --exclude, --include and --num_nodes, at --ssh_port; by --no_ssh none is."""
    hosts = runpy.run_path(TRYING_FIRST[0])
    asked = []
    monkeypatch.setitem(hosts["check_machines"].__globals__, "check_hosts", lambda *given: asked.append(given))
    monkeypatch.setitem(hosts["check_machines"].__globals__, "check_pdsh", lambda names: asked.append(names))
    (tmp_path / "hostfile").write_text("a slots=2\nb slots=2\nc slots=2\n")
    tried = {
        "--exclude=b": [(["a", "c"], None), ["a", "c"]],
        "--include=c:0": [(["c"], None), ["c"]],
        "--num_nodes=2": [(["a", "b"], None), ["a", "b"]],
        "--ssh_port=2222": [(["a", "b", "c"], 2222), ["a", "b", "c"]],
        "--launcher=openmpi": [(["a", "b", "c"], None)],
        "--no_ssh": [],
    }
    for option, expected in tried.items():
        asked.clear()
        hosts["check_machines"]([f"--hostfile={tmp_path / 'hostfile'}", option, "launch/train.py", "x.yaml"])
        assert asked == expected, option
    for wrong, said in (("none", "none does not exist"), ("hostfile", "Hostname 'd' not found")):
        with pytest.raises(ValueError, match=said):
            hosts["check_machines"]([f"--hostfile={tmp_path / wrong}", "--include=d", "launch/train.py"])


def test_a_machine_that_is_not_reached_is_named_in_one_line(tiny_config, tmp_path):
    stand_in(tmp_path / "bin")
    done = launch_on("near slots=1\naway slots=1\n", tiny_config, tmp_path, "engine.timeout_seconds=5")
    assert done.returncode != 0 and not (tmp_path / "two").exists()
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: 1 of 2 ranks came to 127\.0\.0\.1:\d+ within 5 s; host away not reached: ssh: ", said)
    assert said.endswith("or take away out of the hostfile") and "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said_in_one_line(monkeypatch):
    """By the store's own error: this process has a group already, and gets no other."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        store = partial(dist.TCPStore, "127.0.0.1", port, 2, is_master=True)
        monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **how: store(timeout=timeout))
        with pytest.raises(ValueError, match=r"^ranks meet at 127\.0\.0\.1:\d+, which failed: .+; see that rank 0"):
            join("gloo", 0, 2, seconds=5)


def test_the_training_benchmark_runs_on_a_cpu(tmp_path):
    """Two runs under the launcher see the same batches: their curves are the same to rounding."""
    command = [sys.executable, "-m", "vlscale", "bench", "training", "--small", "--steps", "2", "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (apart,) = re.findall(r"at most (\S+) of the loss apart", done.stdout)
    assert float(apart) < 1e-5
    assert re.search(r"^\| chunked \| [\d,]+ \| [\d.]+ \| [\d.]+ ms \| [\d.]+% \|", done.stdout, flags=re.M)
    refused = subprocess.run([*command[:5], "--ranks", "64"], capture_output=True, text=True)
    assert refused.returncode == 2 and "give fewer ranks, or --small" in refused.stderr


def test_processes_on_the_cpu_see_no_gpu():
    """Else their ranks would meet over NCCL on a machine with GPUs, which may be fewer."""
    for path in (ROOT / "tests").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert ('"DS_ACCELERATOR": ' + '"cpu"' in line) <= ("CUDA_VISIBLE_DEVICES" in line), (path, line)
