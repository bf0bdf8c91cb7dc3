"""`vlscale data teach`: the cache holds what live teachers give, training from it is training from them, refusals."""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from tests.export.towers import TEXT, VISION
from vlscale.cli import app, main
from vlscale.config import load_plan
from vlscale.data.samples import open_corpus, read_manifest
from vlscale.data.teacher_cache import ShardFile, read_header
from vlscale.data.teacher_join import TeacherJoin
from vlscale.data.tokens import train_tokenizer
from vlscale.export.teach import TeachRequest, open_job
from vlscale.models.dual_encoder import build_dual_encoder
from vlscale.models.hf_folder import new_image_processor, save_folder
from vlscale.models.teachers import check_not_constant, judge
from vlscale.sections import DataConfig, ModelConfig, ObjectiveConfig
from vlscale.train.frozen_teachers import load_image_teacher, load_text_teacher
from vlscale.train.plan import train_plan

DATA = DataConfig(caption_key="json:captions")
LIVE = ["log.progress=false", "train.max_steps=3", "data.decode=pil", "objective.name=covlr", "engine.zero_stage=0"]


def shards(folder) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob("train-*.tar"))


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory) -> Path:
    """A dual encoder with fresh weights, large ones: what it says of two samples differs well."""
    data = DATA.model_copy(update={"train": shards(corpus)})
    captions = [c for sample in read_manifest(open_corpus(data.train, data), data) for c in sample.captions]
    tokenizer = train_tokenizer(captions, vocab_size=300, max_length=24)
    torch.manual_seed(0)
    text = TEXT | {"vocab_size": len(tokenizer), "model_type": "bert"}
    towers = {"vision": {"config": {"model_type": "vit", **VISION}}, "text": {"config": text}}
    encoder = build_dual_encoder(ModelConfig.model_validate({"embed_dim": 16, **towers}))
    with torch.no_grad():
        for weight in [w for tower in (encoder.vision_model, encoder.text_model) for w in tower.parameters()]:
            weight.mul_(8 if weight.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp("teacher") / "folder"
    save_folder(folder, encoder, dict(encoder.state_dict()), tokenizer, new_image_processor(32, (0.5,) * 3, (0.5,) * 3))
    return folder


def request(corpus, teacher, out, **changes) -> TeachRequest:
    given = {
        "urls": shards(corpus),
        "data": DATA,
        "out": out,
        "image": str(teacher),
        "text": str(teacher),
        "batch_size": 24,
    }
    return TeachRequest(**{**given, **changes})


@pytest.fixture(scope="module")
def cache(corpus, teacher, tmp_path_factory) -> Path:
    out, heard = tmp_path_factory.mktemp("teach") / "cache", []
    job = open_job(request(corpus, teacher, out))
    assert (job.total, job.done) == (256, 0) and not out.exists()
    job.run(heard.append)
    assert sum(heard) == 256 and len(list(out.iterdir())) == 5, "a header and four shards, nothing half-written"
    return out


@pytest.fixture
def own_cache(cache, tmp_path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "own"))


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 5e-4), ("bf16", 4e-3)])
def test_every_caption_of_every_sample_is_as_the_live_teachers_say(corpus, teacher, cache, tmp_path, dtype, error):
    if dtype == "bf16":
        cache = tmp_path / "cache"
        open_job(request(corpus, teacher, cache, dtype=dtype)).run()
    manifest = open_corpus(shards(corpus), DATA)
    join, image, text = TeacherJoin(cache, manifest), load_image_teacher(str(teacher)), load_text_teacher(str(teacher))
    cpu = torch.device("cpu")
    for number, sample in enumerate(read_manifest(manifest, DATA)):
        if number % 17:
            continue
        said = text.embed(sample.captions, cpu)
        shown = image.embed(_pictures(sample, image.spec), cpu)[0]
        for caption in range(len(sample.captions)):
            picture_row, text_row = map(torch.from_numpy, join.rows(number // 64, sample.key, sample.captions, caption))
            assert (picture_row - shown).abs().max() < error and (text_row - said[caption]).abs().max() < error


def _pictures(sample, spec):
    from vlscale.data.images import decode_eval

    return decode_eval(sample.image, spec)[None]


def test_files_are_plain_safetensors_with_a_header_that_says_what_they_are_of(corpus, teacher, cache):
    header = read_header(cache)
    assert header.image.source == str(teacher) and header.corpus == open_corpus(shards(corpus), DATA).hash
    assert (header.dtype, header.captions, header.caption_key) == ("fp16", "all", "json:captions")
    (first, *_) = sorted(cache.glob("*.safetensors"))
    with safe_open(first, "pt") as file:
        assert file.get_tensor("image").shape == (64, 16) and file.get_tensor("image").dtype == torch.float16
        assert file.get_tensor("text").shape == (len(file.get_tensor("caption_check")), 16)
        assert file.metadata()["stamp"] == header.stamp


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_from_the_cache_sees_the_loss_of_live_teachers(tiny_config, corpus, teacher, cache, tmp_path, workers):
    live = [*LIVE, "teacher.source=hf", f"teacher.image={teacher}", f"teacher.text={teacher}"]
    cached = [*LIVE, "teacher.source=cache", f"teacher.cache={cache}", f"data.workers={workers}"]
    for name, overrides in (("live", live), ("cached", cached)):
        train_plan(load_plan(tiny_config, overrides), tmp_path / name, resume=False)
    for ours, theirs in zip(losses(tmp_path / "cached"), losses(tmp_path / "live"), strict=True):
        assert ours["keys"] == theirs["keys"]
        for part in ("loss", "relation_image", "relation_text"):
            assert ours[part] == pytest.approx(theirs[part], abs=2e-4), part
        assert theirs["relation_image"] > 0.1 < theirs["relation_text"]


def test_a_teacher_s_resize_that_the_device_does_not_know_is_refused_at_the_start(tiny_config, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "teacher")
    processor = other / "processor_config.json"
    processor.write_text(re.sub('"resample": [23]', '"resample": 1', processor.read_text()))  # Lanczos
    live = [*LIVE, "teacher.source=hf", f"teacher.image={other}", f"teacher.text={other}", "data.decode=device"]
    with pytest.raises(ValueError, match=r"data\.decode=device.*the image teacher's processor says resample=1"):
        train_plan(load_plan(tiny_config, live), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_the_same_command_goes_on_and_makes_damaged_files_again(corpus, teacher, cache, own_cache, caplog):
    first, second, *_ = sorted(own_cache.glob("*.safetensors"))
    left = {path: path.stat().st_mtime_ns for path in own_cache.iterdir()}
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    job = open_job(request(corpus, teacher, own_cache))
    assert (job.total, job.done) == (256, 128) and "made again" in caplog.text
    job.run()
    for path in (first, second):
        assert path.read_bytes() == (cache / path.name).read_bytes()
        left.pop(path)
    left.pop(own_cache / "header.json")
    assert {path: path.stat().st_mtime_ns for path in left} == left


def test_ranks_share_the_shards(corpus, teacher, cache, tmp_path):
    for rank in (1, 0):
        job = open_job(request(corpus, teacher, tmp_path / "out", rank=rank, ranks=2))
        assert job.total == 128
        job.run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} == {
        path.name: path.read_bytes() for path in cache.glob("*.safetensors")
    }


def test_another_corpus_joins_a_cache_of_the_same_teachers(corpus, teacher, tmp_path):
    for some in (shards(corpus)[:1], shards(corpus)[1:3]):
        open_job(request(corpus, teacher, tmp_path / "out", urls=some)).run()
    found = open_job(request(corpus, teacher, tmp_path / "out", urls=shards(corpus)))
    assert (found.total, found.done) == (256, 192)


def test_a_cache_of_another_request_is_left_alone(corpus, teacher, cache):
    with pytest.raises(ValueError, match=r"holds a cache of other teachers or settings .*fp16, captions all"):
        open_job(request(corpus, teacher, cache, dtype="bf16"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int8"}, "--dtype int8: expected fp16 or bf16"),
        ({"compute": "fp8"}, "--compute fp8: expected fp32 or bf16"),
        ({"captions": "last"}, "--captions last: expected all or first"),
        ({"image": "/nowhere"}, "model folder /nowhere does not exist"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(corpus, teacher, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        open_job(request(corpus, teacher, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_constant_teacher_is_refused_and_leaves_nothing(corpus, teacher, tmp_path):
    job = open_job(request(corpus, teacher, tmp_path / "out"))
    job.text.teacher.projection.weight.copy_(torch.zeros_like(job.text.teacher.projection.weight))
    job.text.teacher.projection.bias = torch.nn.Parameter(torch.ones(16), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"text teacher .* is constant: all relations among 256 samples .* 1\.0000000 and 1\.0"
    ):
        job.run()
    assert not (tmp_path / "out").exists()


def test_a_teacher_is_judged_by_the_entropy_of_its_relations():
    rows, objective = torch.nn.functional.normalize(torch.randn(16, 8, generator=torch.manual_seed(0)), dim=1), of()
    assert not check_not_constant(rows, "teacher", objective).weak
    assert check_not_constant(rows[:1].expand(7, -1), "teacher", objective) is None  # too few to judge
    for constant in (rows[:1].expand(8, -1), rows[:1].expand(8, -1).bfloat16(), torch.eye(8), rows * torch.nan):
        with pytest.raises(ValueError, match=r"teacher is constant: all relations among (8|16) samples"):
            check_not_constant(constant, "teacher", objective)


def of(**objective) -> ObjectiveConfig:
    return ObjectiveConfig(name="covlr", **objective)


def near(spread: float) -> torch.Tensor:
    """(16, 17) rows whose cosines are 1 / (1 + spread), of two of them 1: their largest difference is `spread`."""
    rows = torch.cat([torch.ones(16, 1), spread**0.5 * torch.eye(16)], 1).double()
    rows[1] = rows[0]
    return torch.nn.functional.normalize(rows, dim=1)


def test_relations_of_nearly_maximal_entropy_are_refused_and_weak_ones_told():
    """By hand: in 2 rows of 16 one relation of 15 is larger than the others, which are alike."""

    def lack(spread: float, temperature: float) -> float:
        weights = [math.exp((1 - 1 / (1 + spread)) / temperature)] + [1.0] * 14
        shares = [weight / sum(weights) for weight in weights]
        return (1 + sum(share * math.log(share) for share in shares) / math.log(15)) * 2 / 16

    with pytest.raises(ValueError, match=r"entropy at temperature 0\.1 is 0\.99999999\d\d of its maximum"):
        check_not_constant(near(1.4e-4), "teacher", of())
    for spread, temperature, weak in ((0.01, 0.1, True), (0.01, 0.01, False), (0.0014, 0.01, True)):
        found = check_not_constant(near(spread), "teacher", of(teacher_temperature=temperature))
        assert found.lack == pytest.approx(lack(spread, temperature), rel=1e-6) and found.weak == weak
        assert found.most - found.least == pytest.approx(spread, rel=0.02)


def test_relations_are_judged_as_the_objective_looks_at_them():
    """RVLR by mae has one temperature, the student's; distances tell near rows apart by the root of what cosines do."""
    with pytest.raises(ValueError, match=r"at temperature 5 "):
        check_not_constant(near(0.01), "teacher", ObjectiveConfig(name="rvlr", student_temperature=5.0))
    kl = ObjectiveConfig(name="rvlr", student_temperature=5.0, relation_distance="kl")
    assert check_not_constant(near(0.01), "teacher", kl).temperature == 0.1
    lacks = [judge(near(0.01), of(relation=kind)).lack for kind in ("cosine", "euclidean")]
    assert lacks[1] > 50 * lacks[0]
    with pytest.raises(ValueError, match="is constant"):
        check_not_constant(near(0.0), "teacher", of(relation="euclidean"))


def test_pictures_that_cannot_be_read_are_left_out_and_told(corpus, teacher, tmp_path, caplog):
    job = open_job(request(corpus, teacher, tmp_path / "out", data=DATA.model_copy(update={"max_pixels": 10})))
    job.run()
    assert job.left_out == {"too many pixels": 256} and "left out sample" in caplog.text
    file = ShardFile(tmp_path / "out", job.header, job.manifest.digests[0])
    assert (len(file), file.left_out) == (0, 64)


def train(tiny_config, out, *overrides, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tiny_config), "--out", str(out), *LIVE, "teacher.source=cache", *overrides])
    assert ended.value.code == 2 and not out.exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_training_refuses_what_is_not_its_cache(
    tiny_config, corpus, teacher, clip_towers, cache, own_cache, capsys, tmp_path
):
    logging.getLogger("vlscale").setLevel(logging.ERROR)
    out, place = tmp_path / "run", f"teacher.cache={cache}"

    def refused(*overrides: str) -> str:
        return train(tiny_config, out, *overrides, capsys=capsys)

    assert "teacher.source=cache needs teacher.cache" in refused()
    assert "holds no teacher cache: expected header.json" in refused(f"teacher.cache={tmp_path}")
    assert "made with caption_key 'json:captions', got data.caption_key='json:preset'" in refused(
        place, "data.caption_key=json:preset"
    )
    assert f"teacher.image={clip_towers} is another teacher than the cache was made with (weights hash" in refused(
        place, f"teacher.image={clip_towers}"
    )
    other = tmp_path / "other"
    CliRunner().invoke(app, ["data", "synth", str(other), "--pairs", "64", "--val-pairs", "0", "--seed", "9"])
    assert "has no embeddings of 1 of 1 shards" in (line := refused(place, f"data.train={other}"))
    assert "another corpus (manifest" in line
    header = json.loads((own_cache / "header.json").read_text())
    (own_cache / "header.json").write_text(json.dumps(header | {"text": header["text"] | {"width": 0}}))
    assert "widths 16 (image) and 0 (text): expected above 0" in refused(f"teacher.cache={own_cache}")


def test_changed_preprocessing_is_a_changed_teacher(tiny_config, teacher, cache, capsys, tmp_path):
    changed = shutil.copytree(teacher, tmp_path / "changed")
    settings = changed / "processor_config.json"
    if not settings.is_file():
        settings = changed / "preprocessor_config.json"
    text = settings.read_text()
    assert text.count("0.5") >= 3
    settings.write_text(text.replace("0.5", "0.25"))
    line = train(tiny_config, tmp_path / "run", f"teacher.cache={cache}", f"teacher.image={changed}", capsys=capsys)
    assert "is another teacher than the cache was made with (preprocessing hash" in line


def test_unfinished_and_damaged_caches_are_told_apart(tiny_config, own_cache, capsys, tmp_path):
    first, second, *_ = sorted(own_cache.glob("*.safetensors"))
    first.unlink()
    line = train(tiny_config, tmp_path / "run", f"teacher.cache={own_cache}", capsys=capsys)
    assert "has no embeddings of 1 of 4 shards" in line and "has not finished; run the same command again" in line
    second.write_bytes(second.read_bytes()[:-100])
    line = train(tiny_config, tmp_path / "run", f"teacher.cache={own_cache}", capsys=capsys)
    assert f"{second} is damaged" in line and "delete it and run the same `vlscale data teach` again" in line


def test_the_command_says_what_it_made(corpus, teacher, tmp_path):
    arguments = ["--teacher-image", str(teacher), "--teacher-text", str(teacher), "--caption-key", "json:captions"]
    done = CliRunner().invoke(app, ["data", "teach", *shards(corpus)[:2], str(tmp_path / "out"), *arguments])
    assert done.exit_code == 0, done.output
    assert "128 samples, widths 16 and 16, fp16" in done.output
    told = " ".join(CliRunner().invoke(app, ["data", "teach", "--help"]).output.split())
    assert "The teachers see every picture unaugmented" in told


def test_an_objective_without_teachers_leaves_the_cache_alone(tiny_config):
    for name, used in (("contrastive", None), ("covlr", "/nowhere"), ("rvlr", "/nowhere")):
        overrides = ["teacher.source=cache", "teacher.cache=/nowhere", f"objective.name={name}"]
        (run,) = load_plan(tiny_config, overrides)
        assert run.config.teacher_cache == used
