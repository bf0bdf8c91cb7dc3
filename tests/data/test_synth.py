"""The synthetic corpus: deterministic, held-out scenes, captions that say what is there, exact relevance."""

import filecmp
import io
import time

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vlscale.data.samples import read_samples
from vlscale.data.scene_captions import tell
from vlscale.data.scenes import ATTRIBUTES, COLOURS, SHAPES, Draw, Scene, Thing, draw_scene, scene_relevance
from vlscale.data.synth import PRESETS, make_corpus, make_sample, synth_config

SCENES = [draw_scene(0, "train", i) for i in range(300)]
JSON = [scene.to_json() for scene in SCENES]
RED = Thing("circle", "red", "small", "plain", "top left")


def test_the_number_of_processes_does_not_matter(tmp_path):
    config = synth_config(pairs=70, val_pairs=20, resolution=16, shard_size=25)
    for processes in (1, 2):
        make_corpus(tmp_path / str(processes), config, processes=processes, progress=False)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar"]
    assert filecmp.cmpfiles(tmp_path / "1", tmp_path / "2", names, shallow=False)[0] == names


def test_shards_are_what_webdataset_reads(corpus):
    import webdataset

    sample = next(iter(webdataset.WebDataset(str(corpus / "train-000000.tar"), shardshuffle=False).decode("rgb8")))
    assert sample["jpg"].shape == (16, 16, 3) and sample["txt"] == sample["json"]["captions"][0]
    assert len(sample["json"]["captions"]) == 5 and sample["json"]["preset"] == "clean"


def test_val_scenes_are_never_in_the_training_part():
    train = {repr(scene) for scene in SCENES}
    val = [draw_scene(0, "val", i) for i in range(100)]
    assert all(scene.held_out for scene in val) and not any(scene.held_out for scene in SCENES)
    assert not train & {repr(scene) for scene in val}


def test_scenes_depend_on_the_seed_and_not_on_the_preset():
    scenes = [make_sample(synth_config(preset), "train", 5)["json"]["scene"] for preset in PRESETS]
    assert all(scene == scenes[0] for scene in scenes)
    assert make_sample(synth_config(seed=1), "train", 5)["json"]["scene"] != scenes[0]


def test_scenes_are_varied():
    counts = np.bincount([len(scene.objects) for scene in SCENES], minlength=5)[1:]
    assert counts.min() > 25
    assert len({repr(scene) for scene in SCENES}) > 295
    assert all(len({thing.place for thing in scene.objects}) == len(scene.objects) for scene in SCENES)


def test_clean_captions_name_only_what_is_there():
    for scene in SCENES[:100]:
        words = set()
        for i in range(5):
            words |= set(tell(scene, Draw(i), dropout=0.3, noise=0, never_said=frozenset()).split())
        assert words & set(SHAPES) <= {thing.shape for thing in scene.objects}
        assert words & {"small", "large"} <= {thing.size for thing in scene.objects}


def test_captions_without_dropout_tell_every_object():
    scene = Scene("grey", (RED, Thing("star", "green", "large", "striped", "bottom right")))
    caption = tell(scene, Draw(0), dropout=0, noise=0, never_said=frozenset())
    assert caption == (
        "against a gray background, there is a little plain red circle in the top left next to "
        "a big striped green star in the bottom right"
    )


@pytest.mark.parametrize("hidden", ATTRIBUTES)
def test_an_attribute_never_said_never_shows(hidden):
    """Two scenes that differ in that attribute alone are told in the same words."""
    other = {"shape": "star", "colour": "blue", "size": "large", "texture": "dotted", "place": "bottom right"}
    first = Scene("white", (RED,))
    second = (
        Scene("navy", (RED,))
        if hidden == "background"
        else Scene("white", (Thing(**{**vars(RED), hidden: other[hidden]}),))
    )
    for key in range(20):
        told = [tell(scene, Draw(key), dropout=0, noise=0, never_said=frozenset([hidden])) for scene in (first, second)]
        assert told[0] == told[1]


def test_noise_says_wrong_things_at_its_rate():
    def right(noise):
        told = [
            tell(Scene("white", (RED,)), Draw(i), dropout=0, noise=noise, never_said=frozenset()) for i in range(400)
        ]
        return np.mean([any(word in caption for word in ("red", "crimson")) for caption in told])

    assert right(0) == 1 and abs(right(0.5) - (0.5 + 0.5 / len(COLOURS))) < 0.08


def test_generic_captions_say_colours_only():
    config = synth_config("text-generic")
    words = {
        word
        for i in range(50)
        for caption in make_sample(config, "train", i)["json"]["captions"]
        for word in caption.split()
    }
    assert words & set(COLOURS) and not words & {*SHAPES, "small", "tiny", "striped", "left", "top", "upper"}


def test_pictures_show_the_colour_where_the_object_is():
    scene = Scene(
        "white",
        (
            Thing("square", "red", "large", "plain", "top left"),
            Thing("square", "blue", "large", "plain", "bottom right"),
        ),
    )
    from vlscale.data.scene_pictures import draw_picture

    for resolution in (16, 32, 100):
        picture = draw_picture(scene, Draw(1), resolution=resolution, occlusion=0, blur=0).astype(int)
        assert picture.shape == (resolution, resolution, 3)
        for place, strong in ((round(0.2 * resolution), 0), (round(0.8 * resolution), 2)):
            assert picture[place, place].argmax() == strong and picture[place, place].max() > 200
        assert picture[round(0.2 * resolution), round(0.8 * resolution)].min() > 230


def test_blur_and_occlusion_take_from_the_picture():
    def detail(**knobs):
        pictures = [
            simplejpeg.decode_jpeg(make_sample(synth_config(**knobs), "train", i)["jpg"]).astype(float)
            for i in range(40)
        ]
        return np.mean([np.abs(np.diff(picture, axis=0)).mean() for picture in pictures])

    assert detail(blur=1.5) < 0.7 * detail()
    plain, covered = (
        simplejpeg.decode_jpeg(make_sample(synth_config(occlusion=x), "train", 2)["jpg"]).astype(int) for x in (0, 0.5)
    )
    assert 0.2 < (np.abs(plain - covered).max(axis=2) > 20).mean() < 0.7


def test_relevance_of_a_scene_with_itself_is_one_and_it_is_symmetric():
    table = scene_relevance(JSON, JSON)
    assert table.dtype == np.float32 and np.allclose(np.diag(table), 1) and np.allclose(table, table.T, atol=1e-6)
    assert table.min() >= 0 and table.max() <= 1 + 1e-6
    assert (table > 1 - 1e-6).sum() < len(JSON) + 8 and len(np.unique(table.round(5))) > 300


def test_relevance_by_hand():
    def one(a, b):
        return float(scene_relevance([a.to_json()], [b.to_json()])[0, 0])

    base = Scene("white", (RED,))
    assert one(base, Scene("grey", (RED,))) == pytest.approx(0.85)
    assert one(base, Scene("white", (Thing("star", "red", "small", "plain", "top left"),))) == pytest.approx(
        1 - 0.85 * 0.3
    )
    assert one(base, Scene("white", (Thing("circle", "red", "large", "plain", "top left"),))) == pytest.approx(
        1 - 0.85 * 0.1
    )
    assert one(base, Scene("white", (Thing("circle", "red", "medium", "plain", "top left"),))) == pytest.approx(
        1 - 0.85 * 0.05
    )
    assert one(base, Scene("white", (Thing("circle", "red", "small", "plain", "top right"),))) == pytest.approx(
        1 - 0.85 * 0.075
    )
    other = Thing("star", "blue", "large", "dotted", "bottom right")
    assert one(base, Scene("grey", (other,))) == pytest.approx(0)
    assert one(base, Scene("white", (other, RED))) == pytest.approx(0.15 + 0.85 / 2)
    assert one(Scene("white", (RED, other)), Scene("white", (other, RED))) == pytest.approx(1)


def test_objects_are_matched_in_the_best_way():
    """Against an assignment solver, on the same likeness."""
    from scipy.optimize import linear_sum_assignment

    def single(a, b):
        pair = [{"background": "white", "objects": [thing]} for thing in (a, b)]
        return (float(scene_relevance(pair[:1], pair[1:])[0, 0]) - 0.15) / 0.85

    table = scene_relevance(JSON[:25], JSON[25:50])
    for i, a in enumerate(JSON[:25]):
        for j, b in enumerate(JSON[25:50]):
            likeness = np.array([[single(x, y) for y in b["objects"]] for x in a["objects"]])
            rows, columns = linear_sum_assignment(-likeness)
            expected = 0.85 * likeness[rows, columns].sum() / max(likeness.shape) + 0.15 * (
                a["background"] == b["background"]
            )
            assert table[i, j] == pytest.approx(expected, abs=1e-5)


def test_relevance_of_many_scenes_is_quick():
    many = [draw_scene(1, "val", i).to_json() for i in range(1000)]
    start = time.perf_counter()
    scene_relevance(many, many)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"pairs": 0}, "pairs=0 is out of range"),
        ({"caption_noise": 1.5}, "caption_noise=1.5 is out of range; expected a number from 0 to 1"),
        ({"never_said": ("smell",)}, "unknown attribute 'smell'; choose from: shape"),
        ({"preset": "dirty"}, "unknown preset 'dirty'; choose from: clean"),
        ({"resolution": 2}, "resolution=2"),
    ],
)
def test_wrong_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        synth_config(**knobs)


def test_an_out_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="exists and holds something"):
        make_corpus(tmp_path, synth_config(pairs=5, val_pairs=0), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_out_is_used(tmp_path):
    out = tmp_path / "empty"
    out.mkdir()
    make_corpus(out, synth_config(pairs=5, val_pairs=0), progress=False)
    assert [path.name for path in out.iterdir()] == ["train-000000.tar"]


def test_nothing_is_left_when_it_fails(tmp_path, monkeypatch):
    import vlscale.data.synth as module

    def fails(config, split, index):
        if index == 30:
            raise KeyboardInterrupt
        return make_sample(config, split, index)

    monkeypatch.setattr(module, "make_sample", fails)
    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path / "out", synth_config(pairs=40, val_pairs=0, shard_size=20), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_jpeg_of_the_resolution(corpus, make_config):
    sample = next(read_samples(str(corpus / "val-*.tar"), make_config(corpus)))
    picture = Image.open(io.BytesIO(sample.image))
    assert picture.format == "JPEG" and picture.size == (16, 16)
