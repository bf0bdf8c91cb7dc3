"""`vlscale doctor`: what it says alone, with a config, with a hostfile, and between two ranks."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from vlscale.cli import app
from vlscale.config import load_plan
from vlscale.resources import launch_folder
from vlscale.train import doctor
from vlscale.train.doctor_config import examine_config
from vlscale.train.doctor_ranks import examine_hostfile, read_hostfile


def test_it_names_versions_limits_and_decoders_and_ends_well():
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for name in (
        "python",
        "torch",
        "deepspeed",
        "open files",
        "/dev/shm",
        "decode (fast)",
        "free memory",
        "nvcc",
        "bf16",
    ):
        assert f"  {name} " in done.output or f"! {name} " in done.output
    assert done.output.rstrip().endswith("usable")


def test_json_holds_the_same_findings():
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    by_name = {finding["name"]: finding for finding in told["findings"]}
    assert told["usable"] is True and by_name["ranks"]["value"].startswith("1, alone")
    speed = by_name["decode (fast)"]["value"].split()[0].replace(",", "")
    assert int(speed) > 10


def levels(findings) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


def test_what_is_too_little_comes_with_what_to_change(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "OPEN_FILES", 1 << 62)
    monkeypatch.setattr(doctor, "DISK", 1 << 62)
    found = {finding.name: finding for finding in doctor.limits(str(tmp_path))}
    assert found["open files"].level == "warn" and "ulimit -n" in found["open files"].change
    assert found[f"disk at {tmp_path}"].level == "warn"
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    missing = doctor.versions()[-1]
    assert (missing.level, missing.value) == ("fail", "not installed") and "pip install" in missing.change
    monkeypatch.setenv("PATH", str(tmp_path))
    assert levels(doctor.tools())["g++"] == "warn"


@pytest.mark.parametrize(("major", "losses"), [(9, "ok"), (7, "warn")])
def test_what_a_gpu_serves_is_said(monkeypatch, major, losses):
    """A device that is made up: 30 of 80 GiB free."""
    says = {
        "is_available": True,
        "device_count": 1,
        "mem_get_info": (30 << 30, 80 << 30),
        "get_device_name": "a card",
        "get_device_capability": (major, 0),
        "get_device_properties": SimpleNamespace(major=major),
        "is_bf16_supported": major >= 8,
    }
    for name, value in says.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    found = {finding.name: finding for finding in doctor.accelerator()}
    assert found["GPU 0"].level == "warn" and found["GPU 0"].value == "a card, 30.0 of 80.0 GiB free"
    assert (found["losses"].level, found["bf16"].level) == (losses, losses)
    assert losses == "ok" or "compute capability 8.0" in found["losses"].change


def test_a_good_config_is_usable(tiny_config):
    findings = examine_config(load_plan(tiny_config), 4)
    assert set(levels(findings).values()) == {"ok"}
    said = {finding.name: finding.value for finding in findings}
    assert said["batch"] == "32 pairs, 8 a rank of 4, 32 lanes" and said["data.train"] == "4 shards, 3 opened"


@pytest.mark.parametrize(
    ("override", "world_size", "name", "said"),
    [
        ("train.global_batch_size=33", 2, "batch", "cannot be divided by the world size 2"),
        ("train.chunk_size=5", 2, "batch", "chunk_size=5 does not divide a rank's 16 pairs"),
        ("data.train=nowhere/*.tar", 1, "data.train", "no shard matches"),
        ("data.train={short}", 1, "data.train", "has 3 bytes, expected a tar file"),
        ("teacher={{source: hf, image: ./gone, text: ./gone}}", 1, "teacher.image", "./gone does not exist"),
        ("engine.deepspeed={{train_batch_size: 3}}", 1, "DeepSpeed", "derived from other keys"),
        ("objective.impl=triton", 1, "objective.impl", "there is no GPU here"),
    ],
)
def test_what_a_config_lacks_is_found_before_it_runs(
    tiny_config, tmp_path, override, world_size, name, said, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    short = tmp_path / "short.tar"
    short.write_bytes(b"tar")
    plan = load_plan(tiny_config, [override.format(short=short)])
    bad = [finding for finding in examine_config(plan, world_size) if finding.level == "fail"]
    assert [finding.name for finding in bad][:1] == [name] and said in bad[0].value


def test_a_config_that_cannot_run_ends_with_2(tiny_config):
    done = CliRunner().invoke(app, ["doctor", "--config", str(tiny_config), "--world-size", "5"])
    assert done.exit_code == 2
    assert "X batch" in done.output and "not usable as it is" in done.output


def test_overrides_without_a_config_are_refused():
    assert "give it with --config" in str(CliRunner().invoke(app, ["doctor", "train.seed=1"]).exception)


def test_models_of_earlier_stages_are_not_looked_for(tiny_config, tmp_path):
    path = tmp_path / "stages.yaml"
    own = {"model": {"init_from": None}, "teacher": {"source": "none"}, "objective": {"name": "contrastive"}}
    body = {"base": str(tiny_config), "stages": {"first": own}, "model": {"init_from": "stage:first"}}
    path.write_text(yaml.safe_dump(body | {"teacher": {"source": "hf", "image": "stage:first", "text": "stage:first"}}))
    assert set(levels(examine_config(load_plan(path), 1)).values()) == {"ok"}


SSH = """#!/bin/sh
for word in "$@"; do
    case $word in
        good) exit 0;;
        bad) echo "ssh: connect to host bad port 22: No route to host" >&2; exit 255;;
    esac
done
"""


def test_every_machine_of_a_hostfile_is_tried(tmp_path, monkeypatch):
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    hosts = tmp_path / "hostfile"
    hosts.write_text("# two machines\ngood slots=8\nbad slots=8\n")
    good, bad, pdsh = examine_hostfile(hosts)
    assert (good.name, good.level) == ("host good", "ok") and (bad.name, bad.level) == ("host bad", "fail")
    assert (pdsh.name, pdsh.level) == ("pdsh", "fail") and "install pdsh" in pdsh.change
    (tmp_path / "pdsh").symlink_to(tmp_path / "ssh")
    assert [finding.name for finding in examine_hostfile(hosts)] == ["host good", "host bad"]
    assert "No route to host" in bad.value and "take bad out of the hostfile" in bad.change
    done = CliRunner().invoke(app, ["doctor", "--hostfile", str(hosts)])
    assert done.exit_code == 2 and "X host bad" in done.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node slots\n", "line 1: expected `NAME slots=N`, got 'node slots'"),
        ("a slots=1\na slots=2\n", "line 2: a is named twice"),
        ("# none\n", "names no machine"),
    ],
)
def test_a_hostfile_that_deepspeed_would_not_read_is_said_by_line(tmp_path, text, said):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_hostfile(path)


def test_the_example_hostfile_is_read():
    assert read_hostfile(launch_folder() / "hostfile.example") == ["node-01", "node-02"]


def test_two_ranks_measure_what_is_between_them():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlscale"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "doctor", "--json"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    by_name = {finding["name"]: finding["value"] for finding in json.loads(done.stdout)["findings"]}
    assert by_name["ranks"].startswith("2 on 1 machines") and by_name["backend"] == "gloo"
    assert float(by_name["bandwidth between ranks"].split()[0]) > 0
    assert float(by_name["latency between ranks"].split()[0]) > 0
