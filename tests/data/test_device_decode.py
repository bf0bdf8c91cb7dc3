"""data.decode=device: workers decode, and the device makes what `pil` would have made, whoever reads the stream."""

import numpy as np
import pytest
import torch
from vlscale.kernels.preprocess import preprocess_images

from tests.data.test_images import KINDS, SPEC, encode, smooth
from vlscale.data.batch import PackedPictures
from vlscale.data.images import NUM_DRAWS, decode_piece, decode_train
from vlscale.sections import AugmentConfig, DataConfig

CROPPED = AugmentConfig(crop_scale=0.3, flip=True)
COLOURED = AugmentConfig(
    crop_scale=0.3, flip=True, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2
)


def on_device(pieces, spec=SPEC) -> np.ndarray:
    """(B, S, S, 3) in levels of a picture."""
    packed = PackedPictures.of(pieces)
    out = preprocess_images(
        packed.pictures,
        packed.offsets,
        packed.sizes,
        packed.boxes,
        packed.flips,
        packed.colours,
        size=spec.size,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        resample=spec.resample,
    )
    return 255 * out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("seed", range(8))
def test_a_random_crop_is_that_of_the_processors_resize(seed):
    """But for the edge, where Pillow's filter also reaches for what lies outside the crop."""
    draws = np.random.default_rng(seed).random(NUM_DRAWS)
    data = encode(smooth(45, 40), "PNG")
    expected = decode_train(data, SPEC, CROPPED, "pil", 10**7, draws)
    difference = np.abs(on_device([decode_piece(data, SPEC, CROPPED, 10**7, draws)])[0] - expected)
    assert difference[2:-2, 2:-2].max() < 1.01  # one level: Pillow rounds between its two passes
    assert difference.max() < 4


@pytest.mark.parametrize("seed", range(8))
def test_colours_are_those_of_the_workers(seed):
    draws, data = np.random.default_rng(seed).random(NUM_DRAWS), encode(smooth(45, 40), "PNG")
    plain, expected = (decode_train(data, SPEC, augment, "pil", 10**7, draws) for augment in (CROPPED, COLOURED))
    difference = np.abs(on_device([decode_piece(data, SPEC, COLOURED, 10**7, draws)])[0] - expected)[2:-2, 2:-2]
    assert difference.max() < 1 + 3 * 1.01  # a level of the resize, brightened and saturated by at most 1.4 each
    assert difference.mean() < 1 < np.abs(plain.astype(int) - expected)[2:-2, 2:-2].mean()


def test_only_what_the_crop_touches_is_sent():
    draws = np.full(NUM_DRAWS, 0.5)
    whole, part = (
        decode_piece(encode(smooth(60, 90), "PNG"), SPEC, augment, 10**7, draws)
        for augment in (AugmentConfig(), AugmentConfig(crop_scale=0.05))
    )
    assert whole.pixels.shape == (60, 90, 3) and whole.box == (0, 0, 90, 60)
    assert part.pixels.size < 0.65 * whole.pixels.size
    height, width = part.pixels.shape[:2]
    left, top, wide, high = part.box
    assert 0 <= left < 1 and 0 <= top < 1 and left + wide <= width and top + high <= height


def test_pictures_of_all_kinds_go_in_one_batch():
    draws = np.random.default_rng(0).random((len(KINDS), NUM_DRAWS))
    pieces = [decode_piece(data, SPEC, CROPPED, 10**7, own) for data, own in zip(KINDS.values(), draws, strict=True)]
    expected = [
        decode_train(data, SPEC, CROPPED, "pil", 10**7, own) for data, own in zip(KINDS.values(), draws, strict=True)
    ]
    difference = np.abs(on_device(pieces) - np.stack(expected)).mean(axis=(1, 2, 3))
    for kind, own in zip(KINDS, difference, strict=True):
        assert own < (5 if kind == "progressive" else 1.5), kind  # that one is decoded at less than its size


def test_a_large_jpeg_is_decoded_no_larger_than_needed():
    piece = decode_piece(encode(smooth(400, 600)), SPEC, AugmentConfig(), 10**7, np.full(NUM_DRAWS, 0.5))
    assert piece.pixels.shape[0] < 100
    expected = decode_train(encode(smooth(400, 600)), SPEC, AugmentConfig(), "pil", 10**7, np.full(NUM_DRAWS, 0.5))
    assert np.abs(on_device([piece])[0] - expected).mean() < 3


def test_the_stream_is_the_same_over_ranks_and_workers(run_stream, keys_of, corpus, make_config):
    def run(world_size: int, **options):
        data = make_config(corpus, decode="device", augment=COLOURED, **options)
        return run_stream(2, world_size, data=data, second_view=True)[0]

    reference = [row[0] for row in run(1)]
    for row, whole in zip(run(2, workers=2), reference, strict=True):
        assert [key for batch in row for key in batch.keys] == whole.keys
        for name in ("images", "second_images"):
            first, second = (getattr(batch, name) for batch in row)
            expected = getattr(whole, name)
            for part in ("pictures", "sizes", "boxes", "flips", "colours"):
                assert torch.equal(torch.cat([getattr(first, part), getattr(second, part)]), getattr(expected, part))
            assert torch.equal(first.offsets, expected.offsets[: len(first.offsets)])
    by_pil = run_stream(1, data=make_config(corpus, augment=CROPPED), second_view=True)[0][0][0]
    assert by_pil.keys == reference[0].keys
    assert not torch.equal(reference[0].images.pictures, reference[0].second_images.pictures)


@pytest.mark.parametrize("change", [{"shift": 0.1}, {"noise": 0.05}])
def test_what_the_device_does_not_do_is_refused(change):
    with pytest.raises(
        ValueError, match=r"data\.decode=device crops, flips and colours.*set both to 0 or data\.decode=fast"
    ):
        DataConfig(decode="device", augment=AugmentConfig(**change))
