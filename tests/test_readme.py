"""What README.md says is true: its files exist, its numbers have a result behind them, its examples load and agree."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from vlscale.config import validate
from vlscale.evaluate.paired import seed_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def test_every_file_that_it_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_every_path_in_code_marks_exists():
    named = re.findall(r"`((?:vlscale|kernels|tests|launch|configs|benchmarks)/[\w./-]+)`", TEXT)
    assert named and [path for path in named if not (ROOT / path).exists()] == []


def test_before_and_after_give_the_same_loss():
    (code,) = blocks("python")
    torch.manual_seed(0)
    image_emb, text_emb = (F.normalize(torch.randn(9, 4, dtype=torch.float64), dim=1) for _ in range(2))
    before, after = code.split("# after")
    names = {"torch": torch, "F": F, "image_emb": image_emb, "text_emb": text_emb, "logit_scale": torch.tensor(14.0)}
    exec(before, names)
    dense = names["loss"]
    exec(after, names)
    torch.testing.assert_close(names["loss"], dense, rtol=1e-12, atol=0)


def test_the_disturbed_trainings_are_as_many_and_lost_nothing():
    (name,) = re.findall(r"benchmarks/results/(\d{4}-\d\d-\d\d-failures\.md)", TEXT)
    rows = re.findall(r"^\| (.+?) \| (\d+) \| .* \| (\d+) \| [\d.]+ \|$", (RESULTS / name).read_text(), flags=re.M)
    (kills, others) = map(int, re.search(r"(\d+) kills in a row.*?and (\d+) other", TEXT, flags=re.S).groups())
    trials = {fault: int(count) for fault, count, _ in rows}
    assert trials.pop("kill -9 of a rank, of all, of the launcher") == kills
    assert sum(trials.values()) == others and len(trials) == 10
    assert {lost for _, _, lost in rows} == {"0"}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_its_configs_are_valid(text):
    validate(yaml.safe_load(text), "README.md")


def test_the_demos_table_is_the_linked_result():
    (name,) = set(re.findall(r"benchmarks/results/(\d{4}-\d\d-\d\d-demo)\.md", TEXT))
    results = json.loads((RESULTS / f"{name}.json").read_text())
    columns = ["rsum", "i2t/r@1", "i2t/r@10", "t2i/r@1", "t2i/r@10"]
    columns += [f"{task}/ndcg@10_norm" for task in ("i2i", "t2t", "i2it", "t2it")]
    for run in ("contrastive only", "relations, jointly", "RVLR", "CoVLR, meta step"):
        (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| {run} |")]
        shown = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        assert shown == [f"{results[run]['metrics'][column]['value']:.1f}" for column in columns]


def test_the_kernels_table_is_the_linked_result():
    (name,) = set(re.findall(r"benchmarks/results/([\w-]+kernels-cpu[\w-]*)\.md", TEXT))
    rows = {r["variant"]: r for r in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}
    dense, chunked = rows["contrastive dense"], rows["contrastive chunked"]
    assert f"**{chunked['ratio']:.2f}** | **{chunked['extra_megabytes']:.0f} MB**" in TEXT
    assert f"1.00 | {dense['extra_megabytes']:,.0f} MB" in TEXT


def test_the_studys_table_is_the_linked_result():
    (name,) = set(re.findall(r"benchmarks/results/([\w-]+method-study)\.md", TEXT))
    rows = list(csv.DictReader((RESULTS / f"{name}.csv").open()))
    labels = {
        "scenes, clean": "clean",
        "captions often wrong": "text-noisy",
        "captions generic": "text-generic",
        "pictures blurred, occluded": "image-weak",
        "emoji and their names": "emoji",
    }
    for label, level in labels.items():
        (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| {label} |")]
        seeds = sorted({each["seed"] for each in rows if each["level"] == level})
        own = {(each["seed"], each["method"]): each for each in rows if each["level"] == level}
        assert len(seeds) == 5
        for cell, name in zip(row.split("|")[2:-1], ("rsum", "i2i", "t2t", "i2it", "t2it"), strict=True):
            differences = [float(own[seed, "joint"][name]) - float(own[seed, "contrastive"][name]) for seed in seeds]
            low, high = seed_interval(np.array(differences))
            shown = [float(number) for number in re.findall(r"[-+]?[\d.]+", cell)]
            assert shown == pytest.approx([sum(differences) / 5, low, high], abs=0.051)
