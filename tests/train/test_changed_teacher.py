"""Which teachers a run began with is kept beside it: it goes on with them and with no others; and teachers whose
relations say nothing, or little, are told by the global batch."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from tests.conftest import TINY
from tests.train.forked_ranks import Group, run_groups, said
from vlscale.cli import main
from vlscale.config import load_plan
from vlscale.data.teacher_cache import read_header
from vlscale.data.tokens import train_tokenizer
from vlscale.distributed import Ranks
from vlscale.export.teach import TeachRequest, open_job
from vlscale.models.dual_encoder import build_dual_encoder
from vlscale.models.hf_folder import new_image_processor, save_folder
from vlscale.sections import DataConfig, ModelConfig, ObjectiveConfig
from vlscale.train.frozen_teachers import load_image_teacher, load_text_teacher
from vlscale.train.plan import train_plan
from vlscale.train.setup import check_teachers

COVLR = ["log.progress=false", "objective.name=covlr", "train.max_steps=3", "train.checkpoint_every=2"]
COPY = [*COVLR, "teacher.source=frozen_copy"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A dual encoder with fresh weights."""
    tokenizer = train_tokenizer(["a red disc on blue", "two small green stars"] * 8, vocab_size=200, max_length=24)
    text = TINY["model"]["text"]["config"] | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(1)
    encoder = build_dual_encoder(ModelConfig.model_validate(TINY["model"] | {"text": {"config": text}}))
    folder = tmp_path_factory.mktemp("teacher") / "folder"
    save_folder(folder, encoder, dict(encoder.state_dict()), tokenizer, new_image_processor(32, (0.5,) * 3, (0.5,) * 3))
    return folder


def hf(folder: Path) -> list[str]:
    return [*COVLR, "teacher.source=hf", f"teacher.image={folder}", f"teacher.text={folder}"]


def cached(folder: Path) -> list[str]:
    return [*COVLR, "teacher.source=cache", f"teacher.cache={folder}"]


def teach(corpus: Path, teacher: Path, out: Path) -> Path:
    shards = sorted(str(path) for path in corpus.glob("train-*.tar"))
    open_job(TeachRequest(shards, DataConfig(caption_key="json:captions"), out, str(teacher), str(teacher))).run()
    return out


@pytest.fixture(scope="module")
def cache(corpus, teacher, tmp_path_factory) -> Path:
    return teach(corpus, teacher, tmp_path_factory.mktemp("teach") / "cache")


def train(config: Path, out: Path, *overrides: str) -> None:
    train_plan(load_plan(config, list(overrides)), out, resume=True)


@pytest.fixture(scope="module")
def whole(tiny_config, teacher, tmp_path_factory) -> Path:
    """A run by teachers from a folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_config, out, *hf(teacher))
    return out


def interrupted(run: Path, out: Path, *, after: int | None) -> Path:
    """The run as it was when it was killed: after that step, or before its first checkpoint."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-3" if after else out / "checkpoints")
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def model(run: Path) -> bytes:
    return (run / "final" / WEIGHTS).read_bytes()


def stamp(run: Path) -> dict:
    return json.loads((run / "teachers.json").read_text())


@contextmanager
def scaled(folder: Path, *names: str) -> Iterator[None]:
    """While open, the named weights of the model in `folder` are others."""
    before, weights = (folder / WEIGHTS).read_bytes(), load_file(folder / WEIGHTS)
    save_file(weights | {name: 1.5 * weights[name] for name in names}, folder / WEIGHTS, {"format": "pt"})
    yield
    (folder / WEIGHTS).write_bytes(before)


def refused(capsys, config: Path, out: Path, *overrides: str) -> str:
    """The one line that the command says before it ends with 2 and leaves the folder as it was."""
    before = files(out)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(config), "--out", str(out), "--resume", *overrides])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and files(out) == before
    return line


def test_a_run_keeps_which_teachers_it_began_with(whole, teacher):
    facts = load_image_teacher(str(teacher)).facts, load_text_teacher(str(teacher)).facts
    assert stamp(whole) == {
        name: vars(each) | {"width": 16} for name, each in zip(("image", "text"), facts, strict=True)
    }


@pytest.mark.parametrize("after", [2, None])
def test_unchanged_teachers_go_on_to_the_same_weights(whole, tiny_config, teacher, tmp_path, after):
    out = interrupted(whole, tmp_path / "run", after=after)
    train(tiny_config, out, *hf(teacher))
    assert model(out) == model(whole) and files(out)["teachers.json"] == files(whole)["teachers.json"]


CHANGES = {
    "image": "vision_model.pooler.dense.weight",
    "text": "text_projection.weight",
}


@pytest.mark.parametrize("after", [2, None])
@pytest.mark.parametrize("name", CHANGES)
def test_a_teacher_that_changed_on_disk_is_refused(capsys, whole, tiny_config, teacher, tmp_path, name, after):
    out, began = interrupted(whole, tmp_path / "run", after=after), stamp(whole)[name]["weights"]
    with scaled(teacher, CHANGES[name]):
        line = refused(capsys, tiny_config, out, *hf(teacher))
    assert f"teacher.source=hf: the {name} teacher changed, {out} began with {teacher} (weights hash {began})" in line
    assert line.endswith(f"start a new run in another folder, or delete {out}/teachers.json to go on with this one")


def test_a_checkpoint_that_came_alone_tells_its_teachers(capsys, whole, tiny_config, teacher, tmp_path):
    """As `train.checkpoint_remote` brings one to another machine, where the run's folder was not."""
    out = tmp_path / "run"
    shutil.copytree(whole / "checkpoints" / "step-2", out / "checkpoints" / "step-2")
    with scaled(teacher, CHANGES["text"]):
        line = refused(capsys, tiny_config, out, *hf(teacher))
    assert "the text teacher changed" in line and line.endswith("or start a new run in another folder")
    train(tiny_config, out, *hf(teacher))
    assert model(out) == model(whole) and stamp(out) == stamp(whole)


def test_changed_preprocessing_is_a_changed_teacher(capsys, whole, tiny_config, teacher, tmp_path):
    out, other = interrupted(whole, tmp_path / "run", after=2), Path(shutil.copytree(teacher, tmp_path / "other"))
    settings = other / "processor_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.25"))
    line = refused(capsys, tiny_config, out, *hf(other))
    assert "the image teacher changed" in line and "(preprocessing hash" in line and f"this run has {other}" in line


@pytest.mark.parametrize("kept", [None, '{"image": {"sou'])
def test_a_run_without_its_stamp_goes_on_and_has_one_from_then(whole, tiny_config, teacher, tmp_path, kept):
    out = interrupted(whole, tmp_path / "run", after=2)
    (out / "teachers.json").unlink() if kept is None else (out / "teachers.json").write_text(kept)
    with scaled(teacher, CHANGES["text"]):
        train(tiny_config, out, *hf(teacher))
        assert stamp(out)["text"]["weights"] == load_text_teacher(str(teacher)).facts.weights
    assert (out / "final").is_dir() and stamp(out)["image"] == stamp(whole)["image"]


def test_a_run_without_teachers_has_no_stamp_and_keeps_one_that_it_has(whole, tiny_config, tmp_path):
    out = interrupted(whole, tmp_path / "run", after=2)
    train(tiny_config, out, *COVLR, "objective.name=contrastive")
    assert stamp(out) == stamp(whole)
    train(tiny_config, tmp_path / "none", *COVLR, "objective.name=contrastive")
    assert not (tmp_path / "none" / "teachers.json").exists()


def test_a_teacher_without_a_pooling_layer_is_the_same_whatever_the_seed(tiny_config, teacher, tmp_path):
    text = TINY["model"]["text"]["config"] | {"vocab_size": 300}
    shutil.copytree(teacher, tmp_path / "text", ignore=lambda *_: [WEIGHTS, "config.json"])
    BertModel(BertConfig(**text), add_pooling_layer=False).save_pretrained(tmp_path / "text")
    given = [*hf(teacher), f"teacher.text={tmp_path / 'text'}", "train.max_steps=1"]
    for seed in (0, 5):
        train(tiny_config, tmp_path / f"run-{seed}", *given, f"train.seed={seed}")
    assert stamp(tmp_path / "run-0") == stamp(tmp_path / "run-5")


@pytest.fixture(scope="module")
def copied(tiny_config, teacher, tmp_path_factory) -> Path:
    """A run by a copy of the student as it starts, at ZeRO 2 in fp32."""
    out = tmp_path_factory.mktemp("runs") / "copied"
    train(tiny_config, out, *COPY)
    return out


def test_a_frozen_copy_is_made_again_and_is_the_same(copied, tiny_config, tmp_path):
    out = interrupted(copied, tmp_path / "run", after=2)
    train(tiny_config, out, *COPY)
    assert model(out) == model(copied) and stamp(out) == stamp(copied)


@pytest.mark.parametrize("given", [["engine.zero_stage=3"], ["engine.zero_stage=0", "engine.dtype=bf16"]])
def test_the_stamp_of_a_copy_is_of_the_weights_whatever_the_engine(copied, tiny_config, tmp_path, given):
    train(tiny_config, tmp_path / "run", *COPY, "train.max_steps=1", "engine.activation_checkpointing=true", *given)
    assert stamp(tmp_path / "run") == stamp(copied)


def test_a_copy_of_another_start_is_refused(capsys, copied, tiny_config, tmp_path):
    line = refused(capsys, tiny_config, interrupted(copied, tmp_path / "run", after=2), *COPY, "train.seed=5")
    assert "teacher.source=frozen_copy: the image teacher changed" in line
    assert "put back model.init_from, the towers and train.seed, which the copy is made of" in line


def test_a_copy_of_a_folder_that_changed_is_refused(capsys, copied, tiny_config, tmp_path):
    start = Path(shutil.copytree(copied / "final", tmp_path / "start"))
    given = [*COPY, f"model.init_from={start}"]
    train(tiny_config, tmp_path / "whole", *given)
    out = interrupted(tmp_path / "whole", tmp_path / "run", after=2)
    with scaled(start, "text_projection.weight"):
        assert "the text teacher changed" in refused(capsys, tiny_config, out, *given)
    train(tiny_config, out, *given)
    assert model(out) == model(tmp_path / "whole")


def test_a_cache_of_the_same_teachers_goes_on_and_one_made_anew_of_others_does_not(
    capsys, whole, corpus, tiny_config, teacher, cache, tmp_path
):
    """The cache's own check looks at teachers that are named beside it; what the run began with it does not know."""
    header = read_header(cache)
    assert stamp(whole) == {"image": vars(header.image), "text": vars(header.text)}
    out = interrupted(whole, tmp_path / "run", after=2)
    train(tiny_config, out, *cached(cache))
    out = interrupted(out, tmp_path / "again", after=2)
    with scaled(teacher, CHANGES["text"]):
        other = teach(corpus, teacher, tmp_path / "other")
        line = refused(capsys, tiny_config, out, *cached(other))
        assert (
            "teacher.source=cache: the text teacher changed" in line and "give a cache of the teacher of then" in line
        )
        named = [f"teacher.image={teacher}", f"teacher.text={teacher}"]
        assert "the text teacher changed" in refused(capsys, tiny_config, out, *cached(other), *named)
        assert "another teacher than the cache was made with" in refused(
            capsys, tiny_config, out, *cached(cache), *named
        )


@pytest.fixture(scope="module")
def two_ranks(tiny_config, teacher, copied, tmp_path_factory) -> Path:
    """Trainings by two ranks: with four rows each and a constant text teacher; and by a frozen copy, in the folder of a
    run of one rank at ZeRO 2 in fp32, the same copy and another."""
    place = tmp_path_factory.mktemp("ranks")
    constant = Path(shutil.copytree(teacher, place / "constant"))
    weights = load_file(constant / WEIGHTS)
    none = {"text_projection.weight": torch.zeros_like(weights["text_projection.weight"])}
    save_file(weights | none, constant / WEIGHTS, {"format": "pt"})
    run = interrupted(copied, place / "copy", after=None)
    few = [str(tiny_config), "--out", str(place / "few"), *hf(constant), "train.global_batch_size=8"]
    anew = [str(tiny_config), "--out", str(run), "--resume", *COPY, "engine.zero_stage=3", "engine.dtype=bf16"]
    groups = [Group(few, 2), Group([*anew, "train.seed=5"], 2), Group([*anew, "train.max_steps=1"], 2)]
    (place / "codes.json").write_text(json.dumps(run_groups(place, groups)))
    return place


def test_a_constant_teacher_is_seen_by_the_global_batch_where_no_rank_has_enough_rows(two_ranks):
    assert json.loads((two_ranks / "codes.json").read_text())[0] == [2, 2]
    for rank in range(2):
        assert "teacher.text is constant: all relations among 8 samples lie between" in said(two_ranks, 0, rank)
    assert not (two_ranks / "few").exists()


def test_two_ranks_at_zero_3_in_bf16_have_the_copy_of_one_and_both_refuse_another(two_ranks, copied):
    assert json.loads((two_ranks / "codes.json").read_text())[1:] == [[2, 2], [0, 0]]
    for rank in range(2):
        assert "teacher.source=frozen_copy: the image teacher changed" in said(two_ranks, 1, rank)
    assert stamp(two_ranks / "copy") == stamp(copied)


def judged(image: torch.Tensor, text: torch.Tensor, **objective) -> None:
    def rows(batch: None, seen: tuple[bool, bool]) -> list[torch.Tensor | None]:
        return [own if asked else None for own, asked in zip((image, text), seen, strict=True)]

    parts = SimpleNamespace(inputs=SimpleNamespace(teacher_rows=rows))
    check_teachers(parts, ObjectiveConfig(**objective), None, Ranks())


def test_a_teacher_that_hardly_tells_samples_apart_is_told_in_one_line(caplog):
    draw = torch.randn(2, 16, 8, generator=torch.manual_seed(0))
    fine, weak = F.normalize(draw[0], dim=1), F.normalize(torch.ones(8) + 0.05 * draw[1], dim=1)
    judged(fine, fine, name="covlr")
    judged(weak[:7], weak[:7], name="covlr")  # too few to judge
    judged(weak, fine, name="covlr", relation_weight_image=0)
    judged(weak[:1].expand(16, -1), fine, name="covlr", relation_weight_image=0)  # constant, and nobody asks it
    assert not caplog.records
    judged(fine, weak, name="covlr")
    judged(weak, fine, name="rvlr")
    text, image = (record.getMessage() for record in caplog.records)
    assert text.startswith("teacher.text hardly tells samples apart: all relations among 16 samples lie between 0.99")
    assert text.endswith("preprocessing, or set objective.relation_weight_text=0") and "\n" not in text
    assert image.startswith("teacher.image hardly") and image.endswith(
        "give a trained teacher with its own preprocessing"
    )
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    with pytest.raises(ValueError, match=r"teacher\.image is constant"):
        judged(weak[:1].expand(16, -1), fine)
