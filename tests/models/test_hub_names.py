"""Names of models that are not there: one line within seconds, by a hub of this machine; a slow hub is waited for."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from vlscale.cli import main
from vlscale.models import hub_names
from vlscale.models.hub_names import check_source

NAME = "facebok/dinov2-base"


class Hub(ThreadingHTTPServer):
    """Answers every question the same; `asked` is what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []
        self.status, self.error, self.seconds = 404, "RepoNotFound", 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked.append(self.path)
        time.sleep(self.server.seconds)
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", self.server.error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *given):
        pass


def at(url: str, monkeypatch) -> None:
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + path)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


def said(source: str = NAME) -> str:
    with pytest.raises(ValueError) as error:
        check_source("model.vision.source", source)
    line = str(error.value)
    assert "\n" not in line and line.startswith(f"model.vision.source={source}: ")
    return line


def test_a_name_that_the_hub_does_not_know_is_asked_for_once(hub):
    assert f"no folder of that name is here, and {hub.url} knows none; correct the name" in said()
    hub.status = 401  # what the hub says of private ones and of none alike
    assert "`hf auth login` for one that is not public" in said()
    hub.error = ""  # as mirrors answer
    hub.status = 404
    assert "knows none" in said()
    assert hub.asked == [f"/{NAME}/resolve/main/config.json"] * 3


def test_a_gated_one_is_told_where_its_terms_are(hub):
    hub.status, hub.error = 403, "GatedRepo"
    assert f"accept them at {hub.url}/{NAME}, and `hf auth login`" in said()


def test_a_hub_that_is_not_reached_is_told_after_three_tries(hub, monkeypatch):
    monkeypatch.setattr(hub_names, "PAUSE", 0.1)
    at("http://127.0.0.1:9", monkeypatch)
    started = time.monotonic()
    assert "http://127.0.0.1:9 cannot be reached (" in (line := said()) and f"`hf download {NAME}`" in line
    assert time.monotonic() - started < 5


def test_offline_nothing_is_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in said() and hub.asked == []


def test_what_cannot_be_a_name_is_no_question_either(hub):
    assert "correct the path" in said("runs/first/final") and hub.asked == []
    with pytest.raises(ValueError, match=r"model folder \./nowhere does not exist"):
        check_source("model.vision.source", "./nowhere")


@pytest.mark.parametrize(
    ("status", "error"), [(200, ""), (404, "EntryNotFound"), (503, ""), (429, "")], ids=["there", "no file", "5", "4"]
)
def test_what_is_there_or_in_trouble_is_left_to_loading(hub, status, error):
    hub.status, hub.error = status, error
    check_source("model.vision.source", NAME)
    assert len(hub.asked) == 1


def test_a_slow_hub_is_left_to_loading(hub, monkeypatch):
    hub.seconds = 3.0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    check_source("model.vision.source", NAME)


def test_folders_and_downloaded_models_are_not_asked_for(hub, tmp_path):
    check_source("model.vision.source", str(tmp_path))
    kept = tmp_path / "cache" / "models--facebok--dinov2-base"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (kept / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    check_source("model.vision.source", NAME)
    assert hub.asked == []


@pytest.mark.parametrize("key", ["model.vision", "model.text"])
@pytest.mark.parametrize("command", [["train", "--out"], ["train", "--plan"]], ids=["train", "plan"])
def test_the_command_says_it_before_anything_is_built(hub, tiny_config, tmp_path, capsys, command, key, monkeypatch):
    monkeypatch.setattr("vlscale.train.loop.open_run", lambda *given, **named: pytest.fail("a run was opened"))
    out = [str(tmp_path / "run")] * (command[1] == "--out")
    with pytest.raises(SystemExit) as ended:
        main([command[0], str(tiny_config), *command[1:], *out, f"{key}.source={NAME}", f"{key}.config=null"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert ended.value.code == 2 and f"{key}.source={NAME}: expected a folder or the name of a model" in line
    assert len(hub.asked) == 1 and not (tmp_path / "run").exists()
