"""Every page of docs/ is tried: its `tried` blocks run in order in a folder with the data that the page speaks of, and
every message that troubleshooting.md explains is one that its command gives.

The pages' bash blocks start real processes, so this file has a worker to itself. They are forked from one that has
imported the libraries, which would otherwise be most of the time (see `tests.forked`).
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.export.towers import save_clip, save_dinov2, save_minilm
from tests.forked import vlscale_command
from vlscale.cli import main
from vlscale.config import load_plan
from vlscale.data.samples import read_samples
from vlscale.data.tokens import train_tokenizer
from vlscale.export.embed import EmbedRequest, open_job
from vlscale.sections import DataConfig
from vlscale.train.plan import train_plan

DOCS = ROOT / "docs"
SCENES = DataConfig(caption_key="json:captions")


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (DOCS / page).read_text(), flags=re.S)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def scenes(corpus):
    return list(read_samples([f"{corpus}/train-*.tar"], SCENES))


@pytest.fixture(scope="module")
def tokenizer(scenes):
    return train_tokenizer((c for sample in scenes for c in sample.captions), vocab_size=200, max_length=77)


def img2dataset(folder: Path, scenes) -> None:
    """shards/ and val/ as img2dataset writes them, its statistics and table of failures beside each shard."""
    for name, start in (("shards/00000", 0), ("shards/00001", 64), ("shards/00002", 128), ("val/00003", 192)):
        files = {}
        for number, sample in enumerate(scenes[start : start + 64]):
            key, caption = f"{start // 64:05d}{number:04d}", sample.captions[0]
            facts = {"caption": caption, "url": "https://example.org/a.jpg", "key": key, "status": "success"}
            files |= {f"{key}.jpg": sample.image, f"{key}.txt": caption.encode()}
            files[f"{key}.json"] = json.dumps(facts | {"width": 32, "height": 32, "exif": "{}"}).encode()
        write_tar(folder / f"{name}.tar", files)
        (folder / f"{name}_stats.json").write_text('{"count": 64, "successes": 64}')


def karpathy(folder: Path, scenes) -> None:
    """flickr30k/: a split file and its pictures."""
    pictures = folder / "flickr30k" / "images"
    pictures.mkdir(parents=True)
    entries = []
    for number, sample in enumerate(scenes[:112]):
        name, split = f"{number + 1000}.jpg", "train" if number < 64 else "val" if number < 88 else "test"
        (pictures / name).write_bytes(sample.image)
        sentences = [{"raw": caption, "sentid": 5 * number + place} for place, caption in enumerate(sample.captions)]
        entries.append({"filename": name, "split": split, "imgid": number, "sentences": sentences})
        entries[-1]["sentids"] = [sentence["sentid"] for sentence in sentences]
    (folder / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))


@pytest.fixture
def place(tmp_path, monkeypatch, scenes, tokenizer) -> Path:
    """A folder with everything that a page may speak of, and the current one."""
    img2dataset(tmp_path, scenes)
    karpathy(tmp_path, scenes)
    save_clip(tmp_path / "clip-vit-base-patch32", tokenizer)
    save_dinov2(tmp_path / "dinov2-base")
    save_minilm(tmp_path / "all-MiniLM-L6-v2", tokenizer, initializer_range=0.3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A folder with a `vlscale` command, this checkout's."""
    with vlscale_command(tmp_path_factory.mktemp("tools")) as folder:
        yield folder


def run(script: str, tools: Path) -> str:
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_pretrain(place, tools):
    shown = run("\n".join(blocks("pretrain.md", "bash tried")), tools)
    assert '"step": 6' in shown and "rsum" in shown and shown.count("│ picture │") == 3
    assert json.loads((place / "eval.json").read_text())["metrics"]["rsum"]["low"] is not None
    made = ("check.json", "report.html", "val.npz", "hits.html", "my-model/README.md", "runs/pretrain/eval.jsonl")
    assert [name for name in made if not (place / name).is_file()] == []


def test_finetune(place, tools):
    shown = run("\n".join(blocks("finetune.md", "bash tried")), tools)
    assert "train-000000.tar" in shown and "i2i" in shown and "are not the benchmark's" in shown
    assert json.loads((place / "my-clip" / "config.json").read_text())["model_type"] == "clip"
    assert "i2i/ndcg@10_paper" in json.loads((place / "flickr30k.json").read_text())["metrics"]
    assert list((place / "rouge").iterdir())


def test_rerank(place, tools, scenes):
    shown = run("\n".join(blocks("rerank.md", "bash tried")), tools)
    assert "matching, re-ranked 16" in shown and "pairs scored, each once" in shown and shown.count("│ picture │") == 3
    assert "model.safetensors" in shown
    evaluated = [json.loads(line) for line in (place / "runs" / "matching" / "eval.jsonl").read_text().splitlines()]
    measured = json.loads((place / "matching.json").read_text())["metrics"]
    assert "reranked:rsum" in evaluated[-1] and "reranked:rsum" in measured
    (place / "picture.jpg").write_bytes(scenes[0].image)
    (code,) = blocks("rerank.md", "python tried")
    scope: dict = {}
    exec(code, scope)
    assert 0 < scope["probability"] < 1


def test_teachers(place, tools):
    run("\n".join(blocks("teachers.md", "bash tried")), tools)
    for name in ("at-every-step", "from-cache"):
        assert (place / "runs" / name / "final" / "model.safetensors").is_file()


def test_kernels():
    code = blocks("kernels.md", "python tried")
    assert len(code) == 6
    exec("\n".join(code), {})


TROUBLES = re.findall(
    r"### `([^`]+)`\n[^#]*?```bash fails\n(.*?)```", (DOCS / "troubleshooting.md").read_text(), flags=re.S
)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory, scenes, tokenizer, corpus, tiny_config) -> Path:
    """What troubleshooting.md's commands find: a recipe, shards, a finished run and an unfinished one."""
    place = tmp_path_factory.mktemp("troubled")
    img2dataset(place, scenes)
    karpathy(place, scenes)
    save_clip(place / "clip-vit-base-patch32", tokenizer)
    (place / "pickled").mkdir()
    (place / "pickled" / "pytorch_model.bin").touch()
    recipe = yaml.safe_load(tiny_config.read_text())
    del recipe["data"]["caption_key"]
    (place / "my.yaml").write_text(yaml.safe_dump(recipe | {"data": {"train": [f"{place}/shards/*.tar"]}}))
    quick = ["log.progress=false", "train.max_steps=1"]
    train_plan(load_plan(place / "my.yaml", quick), place / "runs" / "small", resume=False)
    (place / "runs" / "unfinished").mkdir()
    shutil.copy(place / "runs" / "small" / "config.yaml", place / "runs" / "unfinished")
    open_job(EmbedRequest(str(place / "runs" / "small"), [f"{place}/val/*.tar"], place / "old.npz")).run()
    sample = scenes[0]
    write_tar(place / "few.tar", {"a.jpg": sample.image, "a.txt": sample.captions[0].encode()})
    return place


def test_every_trouble_is_tried():
    headings = re.findall(r"^### ", (DOCS / "troubleshooting.md").read_text(), flags=re.M)
    assert len(TROUBLES) == len(headings) > 10


@pytest.mark.parametrize(("message", "command"), TROUBLES, ids=[message[:40] for message, _ in TROUBLES])
def test_a_message_is_what_its_command_says(troubled, monkeypatch, capsys, message, command):
    monkeypatch.chdir(troubled)
    for line in command.strip().splitlines():
        words = shlex.split(line)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            monkeypatch.setenv(name, value)
        assert words.pop(0) == "vlscale"
        with pytest.raises(SystemExit) as ended:
            main(words)
    error = capsys.readouterr().err.splitlines()[-1]
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert ended.value.code == 2 and re.search(pattern, error), error


def test_every_page_is_tried_and_its_links_exist():
    pages = {path.name: path.read_text() for path in DOCS.glob("*.md")}
    tried_here = {"pretrain.md", "finetune.md", "rerank.md", "teachers.md", "kernels.md", "troubleshooting.md"}
    tried_elsewhere = {"method.md", "scaling.md", "reliability.md"}  # test_method_resume, test_plan, tests they name
    assert tried_here | tried_elsewhere == pages.keys()
    for name in pages:
        links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", pages[name]) if "://" not in link]
        assert [link for link in links if link and not (DOCS / link).exists()] == [], name
