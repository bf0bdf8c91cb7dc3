"""A training by two ranks, which all tests of a file look at."""

from pathlib import Path

import pytest

from tests.train.forked_ranks import Group, run_groups, said


@pytest.fixture(scope="module")
def launched(recipe, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("launched")
    (codes,) = run_groups(place, [Group([str(recipe), "--out", str(place / "out")], 2)])
    assert codes == [0, 0], said(place, 0)[-4000:] + said(place, 0, 1)[-4000:]
    return place / "out"
