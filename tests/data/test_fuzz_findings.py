"""What fuzzing (benchmarks/fuzz.py) found, kept: every reader takes its seeds, and refuses these in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fuzz_targets as targets

from vlscale.config import dump, load_plan
from vlscale.data.importers import karpathy_items, list_items, write_items
from vlscale.data.manifest import build_manifest
from vlscale.data.shard_index import ShardSummary
from vlscale.sections import DataConfig

ROOT = Path(__file__).resolve().parents[2]
ENTRY = {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "x"}]}
SCENE = {"background": "white", "objects": [{"shape": "circle", "colour": "red", "size": "small", "texture": "plain"}]}
GROWING = b"a: &a [1, 1]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (98 + n, 98 + n, 97 + n, 97 + n) for n in range(20))

REFUSED = {
    "config": [
        (b"train: {max_steps: 2024-99-99}", "month must be in"),
        (b"!!timestamp x", "fuzz.yaml is not valid YAML"),
        (b"train: {seed: !!int x}", "fuzz.yaml is not valid YAML"),
        (b"a: " + b"[" * 3000, "recursion"),
        (b"&a {train: *a}", "an alias that holds itself"),
        (GROWING, "an alias that holds itself"),
        (b'base: "a\\0b"', "the name of another file"),
        (b"base: " + b"a" * 5000, "does not exist"),
        (b"base: [1]", "the name of another file, got \\[1\\]"),
        (b"model: {vision: {config: {model_type: vit, a: 2024-01-01}}}", "model.vision.config.a is a date"),
        (b"engine: {deepspeed: {a: .nan}}", "engine.deepspeed.a is nan; expected a finite number"),
        (b'log: {wandb_project: "\\ud800"}', "no Unicode text"),
        (b"data: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        (b"\0train.seed=2024-01-01", "override 'train.seed=2024-01-01': train.seed is a date"),
        (b"\0a\nb=2024-01-01", r"override 'a\\nb=2024-01-01': 'a\\nb' is a date"),
        (b"\0m.unlockafter={vision", "fuzz.yaml: unknown key 'm'"),
    ],
    "karpathy": [
        (json.dumps({"images": [ENTRY | {"split": ["test"]}]}).encode(), r"images\[0\] lacks filename, split"),
        (json.dumps({"images": [ENTRY | {"split": "../../x"}]}).encode(), r"split \(a plain word\)"),
        (json.dumps({"images": [ENTRY | {"filename": 3}]}).encode(), r"images\[0\] lacks filename"),
        (json.dumps({"images": [ENTRY | {"filepath": {}, "filename": None}]}).encode(), r"images\[0\] lacks filename"),
    ],
    "cxc": [
        (b"a,b,agg_score\nx1,y2,nan\n", "expected CxC's columns"),
        (b"a,b,agg_score\nx1,y2,1e999\n", "expected CxC's columns"),
        (b"a,b,agg_score\nx1,y2," + b"1" * 200_000 + b"\n", "expected CxC's columns"),
    ],
    "manifest": [],
    "tar": [(b"", "is empty")],
    "captions": [(b"[" * 50_000, "broken json")],
    "lists": [(b'[{"image": 3, "caption": "x"}]', "entry 0 is no")],
    "relevance": [],
}
SURVIVED = {  # a refusal inside, in one line
    "relevance": [
        json.dumps([{"scene": SCENE}]).encode(),
        json.dumps([{"scene": {"background": "white", "objects": []}}]).encode(),
        json.dumps([{"scene": {"objects": []}}]).encode(),
        json.dumps([{"scene": {"background": "white"}}]).encode(),
        json.dumps([{"scene": [1]}, {"scene": None}]).encode(),
        json.dumps([{"scene": SCENE | {"objects": SCENE["objects"] * 9}}]).encode(),
        json.dumps([{"cocoid": [1]}]).encode(),
        json.dumps([{"a\nb": 1}]).encode(),
        json.dumps([{"cocoid": 1, "sentids": 3}]).encode(),
        json.dumps([{"cocoid": 1, "sentids": ["x"]}]).encode(),
    ],
    "manifest": [b"\1[[1, 2, 3]]", b"\1{}", b"\0", b"\0vlscale-index-3\n" + bytes(40)],
}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_and_findings(name):
    for seed in targets.TARGETS[name].seeds():
        targets.check(name, seed)
    for data in SURVIVED.get(name, []):
        targets.check(name, data)
    for data, said in REFUSED[name]:
        targets.check(name, data)
        with pytest.raises(ValueError, match=said):
            targets.TARGETS[name].run(data)


def test_an_index_of_the_right_checksum_and_wrong_content_is_made_again():
    (head, *_) = (seed for seed in targets.manifest_seeds() if seed[:1] == b"\0")
    spoiled = bytes(targets.repair_index(bytearray(head.replace(b'"count": 1', b'"count": []'))))
    assert spoiled != head
    targets.check("manifest", spoiled)
    whole = {"size": 1, "version": 1, "count": 1, "digest": "", "skipped": {}, "named": []}
    assert ShardSummary.parse(whole) is not None
    for values in ([], {}, whole | {"more": 1}, whole | {"count": -1}, whole | {"skipped": []}):
        assert ShardSummary.parse(values) is None


def test_a_flipped_bit_in_the_manifests_file_changes_no_corpus(tmp_path):
    for name in ("one", "two"):
        sample = [(f"{name}.jpg", b"\xff"), (f"{name}.json", b'{"captions": ["x"]}')]
        (tmp_path / f"{name}.tar").write_bytes(targets.make_tar(sample))
    shards, data = [str(tmp_path / "one.tar"), str(tmp_path / "two.tar")], DataConfig(caption_key="json:captions")
    truth = build_manifest(shards, data).hash
    (kept,) = (tmp_path / ".vlscale-index").glob("manifest-*.json")
    whole = kept.read_bytes()
    for at in range(0, len(whole), 7):
        kept.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert build_manifest(shards, data).hash == truth
    assert kept.read_bytes() == whole, "the damaged file is written anew"


def test_pictures_outside_of_their_folder_are_refused(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"picture")
    for image in ("../secret.jpg", str(tmp_path / "secret.jpg"), "deep/../../secret.jpg"):
        (tmp_path / "list.json").write_text(json.dumps([{"image": image, "caption": "x"}]))
        with pytest.raises(ValueError, match="lies outside of the picture folder"):
            write_items({"all": list_items(tmp_path / "list.json")}, tmp_path / "pictures", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "k.json").write_text(json.dumps({"images": [ENTRY | {"filepath": "deep/.."}]}))
    found = write_items(karpathy_items(tmp_path / "k.json"), tmp_path / "pictures", tmp_path / "out", progress=False)
    assert found.samples == {"test": 1}


def test_what_loads_is_kept_and_loads_again(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {seed: 1_0}\ndata: {train: ['a: b', '1', 'ünï']}\n")
    (run,) = load_plan(tmp_path / "a.yaml")
    (tmp_path / "kept.yaml").write_text(dump(run.config))
    assert load_plan(tmp_path / "kept.yaml")[0].config == run.config and run.config.train.seed == 10


def test_the_fuzzer_says_what_it_needs_and_which_targets_there_are(tmp_path):
    script = str(ROOT / "benchmarks" / "fuzz.py")
    (tmp_path / "atheris.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script, "tat"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "choose from: all, tar, manifest, config" in done.stderr
