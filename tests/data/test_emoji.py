"""The emoji import, on a small source tree made here."""

import io

import numpy as np
import pytest
from PIL import Image

from vlscale.data.emoji import concept_of, import_emoji, key_of
from vlscale.data.samples import decode_eval, read_samples

EMOJI_TEST = """# group: Smileys & Emotion
# subgroup: face-smiling
1F600                  ; fully-qualified     # 😀 E1.0 grinning face
# group: People & Body
# subgroup: person-role
1F46E 1F3FD 200D 2642 FE0F ; fully-qualified     # E4.0 man police officer: medium skin tone
1F46E 1F3FD 200D 2642  ; minimally-qualified     # E4.0 man police officer: medium skin tone
1F46E                  ; fully-qualified     # E0.6 police officer
# subgroup: keycap
0023 FE0F 20E3         ; fully-qualified     # keycap: #
# subgroup: nameless
1F4A9                  ; fully-qualified     # pile
"""
ANNOTATIONS = {
    "en": {"😀": ("grinning face", "face | grin"), "👮": ("police officer", "cop | police"), "💩": ("", "pile")},
    "de": {"😀": ("grinsendes Gesicht", "Gesicht")},
}
DERIVED = {
    "en": {"👮🏽‍♂": ("man police officer: medium skin tone", "cop | man"), "#⃣": ("keycap: #", "")},
    "fr": {"👮🏽‍♂": ("policier : peau légèrement mate", "police")},
}


def write_annotations(folder, tables):
    folder.mkdir(parents=True)
    for language, entries in tables.items():
        lines = [
            '<?xml version="1.0" encoding="UTF-8" ?>',
            "<!DOCTYPE ldml SYSTEM '../../common/dtd/ldml.dtd'>",
            "<ldml><annotations>",
        ]
        for points, (name, keywords) in entries.items():
            lines.append(f'<annotation cp="{points}">{keywords}</annotation>')
            if name:
                lines.append(f'<annotation cp="{points}" type="tts">{name}</annotation>')
        (folder / f"{language}.xml").write_text("\n".join([*lines, "</annotations></ldml>"]), encoding="utf-8")


@pytest.fixture
def sources(tmp_path):
    pictures, cldr = tmp_path / "noto" / "png" / "128", tmp_path / "cldr"
    pictures.mkdir(parents=True)
    for number, name in enumerate(["1f600", "1f46e_1f3fd_200d_2642", "1f46e", "0023_20e3", "1f4a9", "1f999", "zz"]):
        Image.new("RGBA", (128, 128), (200, 10 * number, 0, 255 if number else 0)).save(pictures / f"emoji_u{name}.png")
    write_annotations(cldr / "common" / "annotations", ANNOTATIONS)
    write_annotations(cldr / "common" / "annotationsDerived", DERIVED)
    (cldr / "emoji").mkdir()
    (cldr / "emoji" / "emoji-test.txt").write_text(EMOJI_TEST, encoding="utf-8")
    return tmp_path / "noto", cldr


def test_shards_look_as_they_should(sources, tmp_path, make_config):
    count = import_emoji(*sources, tmp_path / "out", progress=False)
    assert (count.train + count.val, count.unknown) == (4, 2)
    samples = {sample.key: sample for sample in read_samples(str(tmp_path / "out" / "*.tar"), make_config(tmp_path))}
    assert sorted(samples) == ["1f46e", "1f46e_1f3fd_200d_2642", "1f600", "23_20e3"]
    officer = samples["1f46e_1f3fd_200d_2642"]
    assert officer.meta == {
        "captions": ["man police officer: medium skin tone", "cop, man"],
        "names": {"fr": "policier : peau légèrement mate"},
        "group": "People & Body",
        "subgroup": "person-role",
        "concept": "1f46e_200d_2642",
    }
    assert samples["23_20e3"].captions == ["keycap: #"]
    assert samples["1f600"].meta["names"] == {"de": "grinsendes Gesicht"}


def test_pictures_are_on_white(sources, tmp_path, make_config, spec):
    import_emoji(*sources, tmp_path / "out", progress=False)
    samples = {sample.key: sample for sample in read_samples(str(tmp_path / "out" / "*.tar"), make_config(tmp_path))}
    assert Image.open(io.BytesIO(samples["1f600"].image)).size == (128, 128)
    assert decode_eval(samples["1f600"].image, spec).min() > 250
    assert np.abs(decode_eval(samples["1f46e"].image, spec)[8, 8].astype(int) - (200, 20, 0)).max() < 6


def test_concepts_equal_those_of_the_real_corpus(emoji_folder, make_config, tmp_path):
    data = make_config(emoji_folder, manifest_dir=str(tmp_path))
    for sample in read_samples(str(emoji_folder / "emoji-val-*.tar"), data):
        points = tuple(int(part, 16) for part in sample.key.split("_"))
        assert key_of(points) == sample.key and concept_of(points) == sample.meta["concept"]


@pytest.mark.parametrize(
    "lost, message",
    [
        ("noto/png", "holds no emoji_u"),
        ("cldr/emoji", "emoji-test.txt"),
        ("cldr/common", "holds no annotations/en.xml"),
    ],
)
def test_missing_sources_are_one_clear_line(sources, tmp_path, lost, message):
    import shutil

    shutil.rmtree(tmp_path / lost)
    with pytest.raises(ValueError, match=message):
        import_emoji(*sources, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
