"""Decoding: evaluation equals the Hugging Face processors bit for bit; training copes with every kind of picture."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from vlscale.data.faults import BadSample
from vlscale.data.images import NUM_DRAWS, ImageSpec, decode_eval, decode_train, normalise
from vlscale.sections import AugmentConfig

SPEC = ImageSpec(24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MIDDLE = np.full(NUM_DRAWS, 0.5)
PLAIN = AugmentConfig()


def smooth(height, width, channels=3):
    seedling = np.random.default_rng(0).integers(0, 255, (5, 7, channels), dtype=np.uint8)
    return cv2.resize(seedling, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def encode(picture, format="JPEG", **options):
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, format, **options)
    return out.getvalue()


def train(data, augment=PLAIN, mode="fast", draws=MIDDLE, spec=SPEC, max_pixels=10**7):
    return decode_train(data, spec, augment, mode, max_pixels, draws)


PROCESSORS = [
    ViTImageProcessorPil(size={"height": 40, "width": 40}, resample=3),
    ViTImageProcessorPil(
        size={"height": 64, "width": 64}, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ),
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32}),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("size", [(90, 133), (133, 90), (20, 20), (50, 50)])
def test_evaluation_equals_the_processor(processor, size):
    data = encode(smooth(*size), quality=90)
    spec = ImageSpec.from_processor(processor)
    theirs = processor(Image.open(io.BytesIO(data)), return_tensors="pt").pixel_values
    ours = normalise(torch.from_numpy(decode_eval(data, spec)).permute(2, 0, 1)[None], spec)
    assert torch.equal(ours, theirs)


def test_normalise_equals_the_processor_for_every_value():
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    values = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 4, 3))
    spec = ImageSpec(256, tuple(processor.image_mean), tuple(processor.image_std))
    ours = normalise(torch.from_numpy(values.copy()).permute(2, 0, 1)[None], spec)
    assert torch.equal(ours, processor(values.copy(), return_tensors="pt").pixel_values)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 40, "width": 50}),
        ViTImageProcessorPil(size={"shortest_edge": 40}),
        ViTImageProcessorPil(do_normalize=False),
        ViTImageProcessorPil(rescale_factor=1.0),
        CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 32, "width": 32}),
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused(processor):
    with pytest.raises(ValueError, match="image processor"):
        ImageSpec.from_processor(processor)


@pytest.mark.parametrize("mode", ["fast", "pil"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_training_without_changes_is_near_evaluation(mode, format):
    data = encode(smooth(300, 420), format)
    difference = np.abs(train(data, mode=mode).astype(int) - decode_eval(data, SPEC))
    assert difference.mean() < 5
    if mode == "pil":
        assert difference.max() == 0


def test_a_picture_of_the_right_size_is_not_resampled():
    data = encode(smooth(24, 24))
    assert np.array_equal(train(data), decode_eval(data, SPEC))


@pytest.mark.parametrize("mode", ["fast", "pil"])
def test_central_crop_when_the_processor_crops(mode):
    picture = np.zeros((60, 180, 3), np.uint8)
    picture[:, 60:120] = 200
    spec = ImageSpec(24, (0.5,) * 3, (0.5,) * 3, crop=True, resize_to=24)
    assert train(encode(picture, "PNG"), mode=mode, spec=spec)[:, 4:-4].min() > 190


KINDS = {
    "grey": encode(smooth(40, 60, 1)[..., 0]),
    "grey png": encode(smooth(40, 60, 1)[..., 0], "PNG"),
    "cmyk": encode(Image.fromarray(smooth(40, 60)).convert("CMYK")),
    "alpha": encode(Image.fromarray(smooth(40, 60)).convert("RGBA"), "PNG"),
    "palette": encode(Image.fromarray(smooth(40, 60)).quantize(16), "PNG"),
    "16 bit": encode(Image.fromarray(smooth(40, 60, 1)[..., 0].astype(np.uint16) * 257), "PNG"),
    "one bit": encode(Image.fromarray(smooth(40, 60, 1)[..., 0]).convert("1"), "PNG"),
    "animated": encode(
        Image.fromarray(smooth(40, 60)),
        "WEBP",
        save_all=True,
        lossless=True,
        append_images=[Image.new("RGB", (60, 40))],
    ),
    "progressive": encode(smooth(40, 60), progressive=True),
    "one pixel": encode(smooth(1, 1)),
    "thin": encode(smooth(1, 400)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["fast", "pil"])
def test_every_kind_of_picture_decodes(kind, mode):
    picture = train(KINDS[kind], AugmentConfig(crop_scale=0.5, shift=0.2, noise=0.1, flip=True), mode)
    assert picture.shape == (24, 24, 3) and picture.dtype == np.uint8 and picture.flags.c_contiguous


@pytest.mark.parametrize("kind", ["grey", "cmyk", "alpha", "16 bit", "animated", "progressive"])
def test_kinds_look_as_they_should(kind):
    expected = smooth(40, 60, 1 if kind in ("grey", "16 bit") else 3)
    expected = cv2.resize(np.broadcast_to(expected, (40, 60, 3)).copy(), (24, 24), interpolation=cv2.INTER_AREA)
    assert np.abs(train(KINDS[kind]).astype(int) - expected).mean() < 8


@pytest.mark.parametrize("mode", ["fast", "pil"])
def test_orientation_is_followed(mode):
    upright = smooth(48, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(np.ascontiguousarray(np.rot90(upright)), exif=exif, quality=95)
    for picture in (train(data, mode=mode), decode_eval(data, SPEC)):
        assert np.abs(picture.astype(int) - decode_eval(encode(upright, quality=95), SPEC)).mean() < 4


def test_exif_of_an_upright_picture_costs_no_speed(monkeypatch):
    import vlscale.data.images as module

    exif = Image.Exif()
    exif[0x0112] = 1
    data = encode(smooth(48, 48), exif=exif)
    monkeypatch.setattr(module, "open_picture", lambda *arguments: pytest.fail("decoded by Pillow"))
    assert train(data).shape == (24, 24, 3)


@pytest.mark.parametrize("mode", ["fast", "pil"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"\xff\xd8\xff",
        encode(smooth(90, 90))[:-700],
        encode(smooth(90, 90), "PNG")[:-900],
        b"\xff\xd8" + b"\0" * 9000,
    ],
    ids=["empty", "text", "start only", "cut jpeg", "cut png", "zeros"],
)
def test_what_is_broken_is_a_bad_sample(data, mode):
    with pytest.raises(BadSample) as caught:
        train(data, mode=mode)
    assert caught.value.kind == "broken picture"


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_they_are_unpacked(format):
    with pytest.raises(BadSample, match="400 x 300") as caught:
        train(encode(smooth(300, 400), format), max_pixels=100_000)
    assert caught.value.kind == "too many pixels"


def test_shift_moves_and_repeats_the_edge():
    picture = np.zeros((24, 24, 3), np.uint8)
    picture[10, 12] = 255
    draws = MIDDLE.copy()
    draws[4], draws[5] = 0.0, 0.999
    moved = train(encode(picture, "PNG"), AugmentConfig(shift=0.125), draws=draws)
    assert np.argwhere(moved[..., 0] == 255).tolist() == [[13, 9]]


def test_draws_decide_everything_and_noise_has_its_size():
    data = encode(np.full((24, 24, 3), 128, np.uint8), "PNG")
    augment = AugmentConfig(noise=0.1)
    first, again = (train(data, augment, draws=np.linspace(0, 0.9, NUM_DRAWS)) for _ in range(2))
    other = train(data, augment, draws=MIDDLE)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert abs((first.astype(float) - 128).std() - 25.5) < 2


def test_crops_take_at_least_their_area():
    ramp = np.broadcast_to(np.linspace(0, 255, 240).astype(np.uint8)[None, :, None], (240, 240, 3))
    data = encode(np.ascontiguousarray(ramp), quality=95)
    spans = [
        np.ptp(
            train(data, AugmentConfig(crop_scale=0.4), draws=np.random.default_rng(i).random(NUM_DRAWS))[
                12, :, 0
            ].astype(int)
        )
        for i in range(30)
    ]
    assert min(spans) > 0.5 * 240 and max(spans) > 0.85 * 240 and max(spans) - min(spans) > 30
