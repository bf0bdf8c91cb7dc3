"""`preprocess_images` against F.interpolate, Pillow and arithmetic; the CUDA kernel's program run on a CPU against it.

The kernel's body is `__host__ __device__`: g++ builds the same blocks, threads and chunks, so indices, halos, ragged
tails and weights are proved here; a GPU adds the launch and the narrow types.
"""

import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlscale.kernels import build
from vlscale.kernels import preprocess as p

MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)
MODES = {p.BILINEAR: "bilinear", p.BICUBIC: "bicubic"}
SHAPES = ((30, 41), (100, 7), (5, 300), (64, 64), (1, 1), (333, 200))


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


PICTURES = [picture(*shape, seed) for seed, shape in enumerate(SHAPES)]
PACKED = p.pack_pictures(PICTURES)
BOXES = torch.tensor(
    [
        [0, 0, 41, 30],
        [1, 20, 5, 33],
        [0, 0, 300, 5],
        [10.25, 7.5, 20.125, 50.75],
        [0.25, 0.5, 0.5, 0.25],
        [3, 1, 197, 332],
    ]
)
FLIPS = torch.tensor([False, True, True, False, True, True])
COLOURS = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 0.5, 0.5, 60])


def plain(levels: Tensor) -> Tensor:
    """(..., 3, S, S) in grey levels -> normalised, float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return (levels.double().clamp(0, 255) / 255 - mean) / std


def levels(normalised: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return (normalised.double() * std + mean) * 255


def run(*arguments, **settings) -> Tensor:
    return p.preprocess_images(*arguments, **{"size": 16, "mean": MEAN, "std": STD} | settings)


@pytest.mark.parametrize("resample", MODES)
@pytest.mark.parametrize("size", [1, 37, 80])
def test_whole_pictures_and_crops_of_whole_pixels_are_interpolate(resample, size):
    def truth(piece: Tensor) -> Tensor:
        piece = piece.permute(2, 0, 1)[None].double()
        return plain(F.interpolate(piece, (size, size), mode=MODES[resample], antialias=True))[0]

    whole = run(*PACKED, size=size, resample=resample)
    for got, source in zip(whole, PICTURES, strict=True):
        torch.testing.assert_close(got.double(), truth(source), rtol=0, atol=1e-5)
    boxes = BOXES.round().clamp_min(1) - torch.tensor([1.0, 1, 0, 0])
    boxes[4] = torch.tensor([0.0, 0, 1, 1])
    cut = run(*PACKED, boxes, FLIPS, size=size, resample=resample)
    for got, source, box, flip in zip(cut, PICTURES, boxes.int().tolist(), FLIPS, strict=True):
        left, top, width, height = box
        expected = truth(source[top : top + height, left : left + width])
        torch.testing.assert_close(got.double(), expected.flip(2) if flip else expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resample", MODES)
def test_fractional_boxes_reproduce_a_ramp(resample):
    """Both filters keep straight lines: magnified, an output is the ramp at its own centre in the source."""
    ramp = (2 * torch.arange(100))[None, :, None].expand(60, 100, 3).to(torch.uint8)
    left, width, size = 10.25, 40.5, 64
    got = levels(run(*p.pack_pictures([ramp]), torch.tensor([[left, 5.5, width, 30.25]]), size=size, resample=resample))
    centres = left + (torch.arange(size, dtype=torch.float64) + 0.5) * width / size
    inside = slice(4, -4)  # away from the box's edges, where taps are cut
    expected = (2 * (centres - 0.5)).expand(1, 3, size, size)
    torch.testing.assert_close(got[..., inside], expected[..., inside], rtol=0, atol=2e-3)


@pytest.mark.parametrize("resample", MODES)
def test_within_a_grey_level_of_pillow(resample):
    source = picture(333, 200)
    pillow = np.asarray(Image.fromarray(source.numpy()).resize((64, 64), resample))
    got = levels(run(*p.pack_pictures([source]), size=64, resample=resample))[0]
    assert (got - torch.tensor(pillow).permute(2, 0, 1)).abs().max() < 1.01  # Pillow rounds after each direction


def test_pictures_of_the_model_s_size_are_only_normalised():
    images = pytest.importorskip("vlscale.data.images")  # a machine for kernels alone may lack what it needs
    source = picture(16, 16)
    expected = images.normalise(source.permute(2, 0, 1)[None], images.ImageSpec(16, MEAN, STD))
    for resample in MODES:
        torch.testing.assert_close(run(*p.pack_pictures([source]), resample=resample), expected, rtol=0, atol=1e-6)


def test_colours_are_mapped_after_the_resize_and_cut_off_before_and_after():
    source = torch.tensor([[[0, 128, 255], [255, 0, 10]]], dtype=torch.uint8).expand(2, 2, 3)
    flat = p.pack_pictures([source, source])
    swap = torch.tensor([[0.0, 0, 1, 20], [1, 0, 0, -5], [0, 0.5, 0, 0]])
    got = levels(run(*flat, None, None, torch.stack([swap, 2 * swap]), size=2))
    once = torch.tensor([[[275, 30], [-5, 250], [64, 0]]], dtype=torch.float64).expand(2, 3, 2).clone()
    for place, factor in ((0, 1), (1, 2)):
        expected = (factor * once[0]).clamp(0, 255)[:, None].expand(3, 2, 2)
        torch.testing.assert_close(got[place], expected, rtol=0, atol=1e-3)


def test_the_map_that_changes_nothing_changes_nothing():
    same = torch.eye(3, 4).expand(6, 3, 4)
    torch.testing.assert_close(run(*PACKED, BOXES, FLIPS, same), run(*PACKED, BOXES, FLIPS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_the_rounded_result(dtype):
    assert torch.equal(run(*PACKED, dtype=dtype), run(*PACKED).to(dtype))


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    """The kernel's program built for this CPU."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    out = tmp_path_factory.mktemp("host") / "preprocess_host.so"
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", out, build.CSRC / "preprocess_host.cpp"], check=True)
    return p.load_library(out)


def packed(boxes: Tensor, flips: Tensor, colours: Tensor | None = None) -> p.Packed:
    return p.Packed(*PACKED, boxes.double(), flips, colours)


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN: an output that the kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("colours", [None, COLOURS], ids=["as they are", "mapped"])
@pytest.mark.parametrize("resample", MODES)
@pytest.mark.parametrize("size", [1, 8, 37, 80, 130])
def test_the_kernel_s_program_is_the_reference(host_library, poisoned, resample, size, colours):
    """Sizes: less than a block, exactly one row of blocks, ragged, two and three blocks across."""
    target = p.Target(size, MEAN, STD, resample, torch.float32)
    given = packed(BOXES, FLIPS, colours)
    torch.testing.assert_close(p.launch(host_library, given, target), p.reference(given, target), rtol=0, atol=1e-5)


@pytest.mark.parametrize("resample", MODES)
def test_the_kernel_s_program_shrinks_a_large_picture(host_library, resample):
    """A ratio of 300: windows of up to 1200 taps, far more source rows than a chunk; positions keep their precision."""
    source = picture(2400, 30)
    given = p.Packed(
        *p.pack_pictures([source]), torch.tensor([[0.0, 0, 30, 2400]]).double(), torch.tensor([True]), None
    )
    target = p.Target(8, MEAN, STD, resample, torch.float32)
    torch.testing.assert_close(p.launch(host_library, given, target), p.reference(given, target), rtol=0, atol=1e-5)


WRONG = {  # of picture 1, 100 x 7: what the launcher cannot see when descriptions live on the device
    "offset": {"offsets": -1},
    "beyond": {"offsets": int(PACKED[0].numel()) - 100},
    "height": {"sizes": [10**12, 7]},
    "no width": {"sizes": [100, 0]},
    "box": {"boxes": [3.0, 0, 5, 100]},
    "empty box": {"boxes": [0.0, 0, 0, 100]},
    "NaN box": {"boxes": [float("nan"), 0, 5, 5]},
    "endless colour": {
        "colours": COLOURS[1].clone().index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(torch.inf))
    },
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_description_is_refused_and_harms_no_other_picture(host_library, poisoned, wrong):
    parts = {
        "offsets": PACKED[1].clone(),
        "sizes": PACKED[2].clone(),
        "boxes": BOXES.double(),
        "colours": COLOURS.clone(),
    }
    for name, value in wrong.items():
        parts[name][1] = torch.as_tensor(value)
    with pytest.raises(ValueError, match=r"(sizes|boxes|colours)\[1\]: expected"):
        run(PACKED[0], parts["offsets"], parts["sizes"], parts["boxes"], FLIPS, parts["colours"])
    target = p.Target(16, MEAN, STD, p.BICUBIC, torch.float32)
    got = p.launch(host_library, p.Packed(PACKED[0], **parts, flips=FLIPS), target)
    right = p.reference(packed(BOXES, FLIPS, COLOURS), target)
    assert got[1].isnan().all()
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(got[others], right[others], rtol=0, atol=1e-5)


def test_an_error_of_the_library_is_raised(host_library):
    target = p.Target(16, MEAN, STD, p.BICUBIC, torch.float16)
    with pytest.raises(RuntimeError, match="only float32 is built"):
        p.launch(host_library, packed(BOXES, FLIPS), target)


BAD = {
    "pictures: expected .bytes,. of torch.uint8": {"pictures": PACKED[0].float()},
    r"offsets: expected a tensor \(6\) of int64, got \(5,\)": {"offsets": PACKED[1][:5]},
    r"sizes: expected a tensor \(B, 2\)": {"sizes": PACKED[2].flatten()},
    r"boxes: expected a tensor \(6, 4\) of a floating dtype": {"boxes": BOXES.long()},
    r"flips: expected a tensor \(6\) of bool": {"flips": FLIPS.int()},
    r"colours: expected a tensor \(6, 3, 4\) of a floating dtype": {"colours": COLOURS[:, :, :3]},
    "size: expected an output side": {"size": 0},
    "mean: expected three finite": {"mean": (0.5, 0.5)},
    "std: expected three positive": {"std": (0.5, 0.5, 0)},
    "resample: expected 2 .bilinear. or 3": {"resample": 1},
    "dtype: expected one of": {"dtype": torch.float64},
    "impl: expected one of auto, cuda, reference": {"impl": "triton"},
    "'cuda' is not available for cpu tensors, available: auto, reference": {"impl": "cuda"},
}


@pytest.mark.parametrize(("message", "changed"), BAD.items(), ids=[next(iter(v)) for v in BAD.values()])
def test_bad_input(message, changed):
    given = dict(zip(("pictures", "offsets", "sizes"), PACKED, strict=True)) | {"boxes": BOXES, "flips": FLIPS}
    with pytest.raises(ValueError, match=message):
        run(**given | changed)


def test_no_pictures():
    with pytest.raises(ValueError, match="pictures: expected at least one"):
        p.pack_pictures([])
    with pytest.raises(ValueError, match=r"pictures\[0\]: expected \(H, W, 3\)"):
        p.pack_pictures([torch.zeros(4, 4, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="sizes: expected at least one picture"):
        run(PACKED[0], PACKED[1][:0], PACKED[2][:0])


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or build.find_nvcc() is None, reason="no GPU with a CUDA compiler here"
)


@needs_cuda
@pytest.mark.parametrize("dtype", p.DTYPES)
@pytest.mark.parametrize("resample", MODES)
@pytest.mark.parametrize("size", [1, 37, 130, 224])
def test_on_a_gpu(poisoned, dtype, resample, size):
    settings = {"size": size, "resample": resample}
    pictures, *rest = PACKED
    for colours in (None, COLOURS):
        got = run(pictures.cuda(), *rest, BOXES, FLIPS, colours, dtype=dtype, impl="cuda", **settings)
        expected = run(pictures, *rest, BOXES, FLIPS, colours, **settings)
        assert got.dtype == dtype
        precision = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        torch.testing.assert_close(got.float().cpu(), expected, rtol=0, atol=precision)


@needs_cuda
def test_on_a_gpu_nothing_waits_for_descriptions_that_live_there():
    given = [part.cuda() for part in (*PACKED, BOXES, FLIPS)]
    expected = run(*given, impl="cuda")
    given[3][1] = torch.nan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(*given, impl="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got[1].isnan().all()
    assert torch.equal(got[2:], expected[2:])
