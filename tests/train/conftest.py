"""A launch of two ranks by the real launcher, which all tests of a file look at."""

from pathlib import Path

import pytest

from tests.train.launcher import launch


@pytest.fixture(scope="module")
def launched(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("launched") / "out"
    done = launch(recipe, out)
    assert done.returncode == 0, done.stderr[-4000:]
    return out
