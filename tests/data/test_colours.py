"""Colour augmentation: each part is what Pillow's enhancers make, draws decide everything, off it costs nothing."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.data.test_images import MIDDLE, SPEC, encode, smooth
from vlscale.data.colours import NUM_DRAWS, colour_map
from vlscale.data.images import decode_train
from vlscale.sections import AugmentConfig, DataConfig

PICTURE = smooth(24, 24)
LUMA = np.array([0.299, 0.587, 0.114])
NEVER_GREY = 0.999


def draws(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5, grey=NEVER_GREY) -> np.ndarray:
    return np.array([brightness, contrast, saturation, hue, grey])


def changed(augment: AugmentConfig, given: np.ndarray, picture: np.ndarray = PICTURE) -> np.ndarray:
    return cv2.transform(picture, colour_map(augment, given))


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    ("name", "enhancer"), [("brightness", ImageEnhance.Brightness), ("saturation", ImageEnhance.Color)]
)
def test_factors_are_those_of_pillow(name, enhancer, draw):
    factor = 1 + 0.8 * (2 * draw - 1)
    expected = np.asarray(enhancer(Image.fromarray(PICTURE)).enhance(factor))
    got = changed(AugmentConfig(**{name: 0.8}), draws(**{name: draw}))
    assert np.abs(got.astype(int) - expected).max() <= 1  # Pillow cuts fractions off


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.9])
def test_contrast_moves_about_mid_grey(draw):
    factor = 1 + (2 * draw - 1)
    expected = np.clip(factor * (PICTURE - 127.5) + 127.5, 0, 255)
    assert np.abs(changed(AugmentConfig(contrast=1), draws(contrast=draw)) - expected).max() <= 0.51


def test_hue_turns_keep_luma_and_greys_and_come_around():
    augment = AugmentConfig(hue=0.5)
    soft = (PICTURE // 4 + 96).astype(np.uint8)  # far from the ends, where nothing is cut off
    turned = changed(augment, draws(hue=0.8), soft)
    assert np.abs(turned.astype(int) - soft).mean() > 5
    assert np.abs(turned @ LUMA - soft @ LUMA).max() < 1
    grey = np.full((2, 2, 3), 77, np.uint8)
    assert np.array_equal(changed(augment, draws(hue=0.8), grey), grey)
    half, back = (colour_map(augment, draws(hue=draw))[:, :3] for draw in (0.0, 1.0))
    np.testing.assert_allclose(half, back, atol=1e-5)  # half a circle either way
    np.testing.assert_allclose(half @ half, np.eye(3), atol=1e-5)


def test_grey_pictures_have_no_colour_whatever_else_is_drawn():
    augment = AugmentConfig(grayscale=0.3, saturation=0.5, hue=0.2)
    grey = changed(augment, draws(saturation=0.9, hue=0.1, grey=0.29))
    assert np.ptp(grey, axis=2).max() == 0
    assert np.abs(grey[..., 0].astype(int) - np.asarray(Image.fromarray(PICTURE).convert("L"))).max() <= 1
    assert np.ptp(changed(augment, draws(grey=0.31)), axis=2).max() > 20


def test_all_of_them_are_made_in_their_order():
    augment = AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25)
    given = np.random.default_rng(0).random(NUM_DRAWS)
    matrix = np.eye(4)
    for name in ("brightness", "contrast", "saturation", "hue"):
        part = colour_map(AugmentConfig(**{name: getattr(augment, name)}), given)
        matrix = np.vstack([part, [0, 0, 0, 1]]) @ matrix
    np.testing.assert_allclose(colour_map(augment, given), matrix[:3], atol=2e-5)


@pytest.mark.parametrize("mode", ["fast", "pil"])
def test_a_view_is_the_plain_view_with_its_colours_mapped(mode):
    augment = AugmentConfig(crop_scale=0.5, flip=True, shift=0.1, brightness=0.5, contrast=0.3, saturation=0.4)
    plain = augment.model_copy(update={"brightness": 0.0, "contrast": 0.0, "saturation": 0.0})
    given = np.random.default_rng(1).random(MIDDLE.size)
    data = encode(smooth(90, 70), "PNG")
    view, coloured = (decode_train(data, SPEC, own, mode, 10**7, given) for own in (plain, augment))
    assert np.array_equal(coloured, cv2.transform(view, colour_map(augment, given[-NUM_DRAWS:])))
    assert not np.array_equal(coloured, view)


def test_off_there_is_no_map():
    assert colour_map(AugmentConfig(crop_scale=0.5, flip=True), draws()) is None


def test_pictures_keep_their_first_views_when_colours_are_turned_on(run_stream, corpus, make_config):
    """Geometry is drawn from the same numbers."""
    crop = {"crop_scale": 0.5, "flip": True}
    plain, grey = (
        run_stream(2, data=make_config(corpus, augment=AugmentConfig(**crop, **more)))[0]
        for more in ({}, {"grayscale": 1.0})
    )
    for (before,), (after,) in zip(plain, grey, strict=True):
        assert after.keys == before.keys
        luma = np.tensordot(LUMA, before.images.numpy(), (0, 1))
        assert np.abs(after.images.numpy() - luma[:, None]).max() < 0.9  # 10 bits of a weight


@pytest.mark.parametrize("change", [{"brightness": 1.5}, {"hue": 0.6}, {"grayscale": -0.1}, {"colour": 1}])
def test_bad_values(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        DataConfig(augment=change)
