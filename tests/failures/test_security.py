"""Hostile input and secrets: what may not be in the code, in logs, in what a run keeps and in what it shows."""

import ast
import io
import json
import logging
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlscale.cli import main
from vlscale.config import dump, validate
from vlscale.data.urls import expand
from vlscale.export.card import _data
from vlscale.export.gallery import write_gallery
from vlscale.export.search import Hit, Query
from vlscale.logging import get_logger, setup_logging, without_secrets
from vlscale.report.write import _config

ROOT = Path(__file__).resolve().parents[2]
SECRETS = ("hunter2", "AKIAIOSFODNN7EXAMPLE", "c0ffee5ig")
URLS = [
    "https://me:hunter2@data.example.org/train-{000..003}.tar",
    "s3://bucket/b.tar?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE&X-Amz-Signature=c0ffee5ig",
    "pipe:curl -H 'Authorization: Bearer hunter2hunter2' https://data.example.org/c.tar",
    "pipe:fetch --token=c0ffee5ig --api-key AKIAIOSFODNN7EXAMPLE d.tar",
]
FORBIDDEN = {"eval", "exec", "compile", "__import__"}
# Pickles of our own: what a worker process sends, and a run's own checkpoints, which DeepSpeed makes pickles anyway.
PICKLES = {"vlscale/data/worker.py", "vlscale/train/checkpoint.py", "vlscale/train/checkpoint_files.py"}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a file, by the dotted name that is called."""
    return [
        (ast.unparse(node.func), node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]


def test_no_code_that_runs_what_it_reads():
    faults = []
    for path in [*(ROOT / "vlscale").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        for called, node in calls(path):
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            unpickles = called.startswith(("pickle.", "cloudpickle.")) and called.endswith(
                ("load", "loads", "Unpickler")
            )
            bad = (
                called in FORBIDDEN
                or called in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "Markup")
                or words.get("shell") == "True"
                or words.get("allow_pickle") == "True"
                or (called == "torch.load" and words.get("weights_only") != "True" and name not in PICKLES)
                or (unpickles and name not in PICKLES)
                or (called.split(".")[-1] == "Environment" and words.get("autoescape") != "True")
                or (called == "np.load" and words.get("allow_pickle") != "False")
            )
            faults += [f"{name}:{node.lineno}: {called}"] * bad
    assert faults == []
    for template in (ROOT / "vlscale").rglob("*.html"):
        assert not re.search(r"\|\s*safe\b|autoescape\s+false", template.read_text()), template


class Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("hostile", ['" onerror="alert(1)', "' onload='x", "<script>alert(1)</script>", "{{ 7 * 7 }}"])
def test_a_gallery_shows_hostile_captions_as_text(tmp_path, hostile):
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "PNG")
    hits = [Hit(key=hostile, score=1.0, caption=hostile, is_picture=picture, place=0) for picture in (True, False)]
    pictures = {hostile: encoded.getvalue()}
    write_gallery(tmp_path / "g.html", Query(hostile, encoded.getvalue()), hits, pictures, hostile, hostile)
    html = (tmp_path / "g.html").read_text()
    for tag, attrs in Tags(html).tags:
        assert tag != "script" and not [name for name in attrs if name.startswith("on")]
        assert attrs.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert "49" not in re.sub(r"base64,[^\"]*|<style>.*</style>", "", html, flags=re.S)


def test_what_a_run_keeps_and_shows_holds_no_secret(tmp_path):
    config = validate({"data": {"train": URLS, "allow_pipe": True, "cache_dir": "c"}, "engine": {"deepspeed": {
        "monitor": {"api_key": "hunter2", "auth_token": "c0ffee5ig"}}}}, "test")  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump(config))
    shown = [dump(config), _config(tmp_path), _data(config), without_secrets(str(ValueError(f"got {URLS}")))]
    for text in shown:
        assert not [secret for secret in SECRETS if secret in text], text
    assert "data.example.org/train-{000..003}.tar" in dump(config) and "s3://bucket/b.tar" in dump(config)


def test_ordinary_text_is_left_as_it_is():
    for text in ("tokenizer: ./tok", "max_tokens: 3", "caption_key: json:captions", "/data/train-?.tar", "a@b.c",
                 "file:///data/a?.tar", "http://host:80/a.tar", "sep_token_id: 102", "a secret garden"):  # fmt: skip
        assert without_secrets(text) == text
    config = validate({"data": {"train": "s3://bucket/a-{0..3}.tar"}, "model": {"text": {"config": {
        "model_type": "bert", "pad_token": "[PAD]"}}}}, "test")  # fmt: skip
    assert "pad_token: '[PAD]'" in dump(config)


def test_logs_and_errors_hold_no_secret(capsys, monkeypatch, tmp_path):
    logger = get_logger()
    monkeypatch.setattr(logger, "handlers", [])
    setup_logging()
    logger.warning("shard %s: %s", URLS[0], OSError("no answer from s3://b?sig=c0ffee5ig"))
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", f"ftp://me:hunter2@host/a.tar?sig={SECRETS[2]}"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "ftp://***@host/a.tar" in said and "data.example.org" in said
    assert not [secret for secret in SECRETS if secret in said], said


def test_an_address_without_its_credentials_is_not_asked_for():
    with pytest.raises(
        ValueError, match=r"the credentials in https://\*\*\*@host/a.tar were left out when it was kept"
    ):
        expand(["https://***@host/a.tar"])


sys.path.append(str(ROOT / "benchmarks"))


def test_every_pinned_package_has_a_licence_that_is_allowed(capsys):
    import audit

    assert audit.main(["--offline"]) == 0
    said = capsys.readouterr().out
    assert "0 not allowed" in said and "vulnerabilities: NOT CHECKED (--offline)" in said
    assert audit.main(["--offline", "--strict"]) == 1
    assert audit.is_allowed("MIT AND (Apache-2.0)") and audit.is_allowed("GPL-3.0-only OR MIT")
    for refused in ("GPL-3.0-only", "MIT AND AGPL-3.0-only", "", "Proprietary", "Apache-2.0 WITH Commons-Clause"):
        assert not audit.is_allowed(refused)


AUDITOR = """
import json, sys
assert "--no-deps" in sys.argv
found = [{"name": "Jinja2", "version": "3.1.6", "vulns": VULNS}, {"name": "torch", "skip_reason": "not asked"}]
print(json.dumps({"dependencies": found, "fixes": []}))
"""


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (AUDITOR.replace("VULNS", "[]"), 0, "1 of 74 packages asked for, 0 known, NOT CHECKED for 73"),
        (
            AUDITOR.replace("VULNS", '[{"id": "CVE-1", "fix_versions": ["3.2"]}]'),
            1,
            "Jinja2 3.1.6: CVE-1, fixed in 3.2",
        ),
        ("print('no network')", 0, "0 of 74 packages asked for, 0 known, NOT CHECKED for 74"),
    ],
)
def test_what_was_not_asked_is_said(tmp_path, answer, code, said):
    pins = len([line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line])
    (tmp_path / "pip_audit.py").write_text(answer)
    command = [sys.executable, str(ROOT / "benchmarks" / "audit.py")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    assert said.replace("74", str(pins)).replace("73", str(pins - 1)) in done.stdout
    assert subprocess.run([*command, "--strict"], capture_output=True, env=environment).returncode == 1


def test_logging_json_is_what_it_says():
    """A record's arguments are hidden as well as its text."""
    record = logging.LogRecord("vlscale", logging.INFO, "x", 1, "%s", (json.dumps({"password": "hunter2"}),), None)
    setup_logging()
    assert "hunter2" not in get_logger().handlers[0].format(record)
