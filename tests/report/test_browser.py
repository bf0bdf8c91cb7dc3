"""The page in a real browser, where one is installed: it renders, wide and narrow, light and dark."""

import io
import shutil
import subprocess

import pytest
from PIL import Image

from vlscale.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("page") / "report.html", runs, "In a browser")


def browse(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=True)


def screenshot(page, tmp_path, *flags: str) -> Image.Image:
    browse(tmp_path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1280,1600", *flags, page.as_uri())
    return Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("L")


def test_it_renders_in_light_and_dark(page, tmp_path):
    light = screenshot(page, tmp_path, "--blink-settings=preferredColorScheme=1")
    dark = screenshot(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light.getpixel((5, 5)) > 230 and dark.getpixel((5, 5)) < 40
    for shown in (light, dark):
        assert len(set(shown.crop((100, 500, 1180, 1500)).tobytes())) > 50  # a page with content, not an empty one


def test_a_narrow_window_does_not_scroll_sideways(page, tmp_path):
    """A frame 400 pixels wide reports through the document's title how wide its content is."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="{page.as_uri()}" width="400" height="900"></iframe>'
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument.documentElement;"
        " document.title = 'content ' + d.scrollWidth; };</script>"
    )
    printed = browse(tmp_path, "--allow-file-access-from-files", "--dump-dom", frame.as_uri()).stdout.decode()
    assert "<title>content 400</title>" in printed
