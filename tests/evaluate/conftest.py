import pytest

from tests.evaluate.corpora import make_corpus
from vlscale.data.scenes import draw_scene
from vlscale.evaluate import EmbeddedCorpus


@pytest.fixture(scope="session")
def scene_meta() -> list[dict]:
    return [{"scene": draw_scene(0, "val", index).to_json()} for index in range(60)]


@pytest.fixture(scope="session")
def synthetic(scene_meta) -> EmbeddedCorpus:
    return make_corpus(60, 2, meta=scene_meta)
