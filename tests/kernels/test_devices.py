"""Which GPUs the Triton kernels serve, and with whose tiles; what the device says is set by hand."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from vlscale.kernels import checks

GPU = torch.device("cuda", 0)


@pytest.fixture
def device_is(monkeypatch):
    def set_device(major: int, hip: str | None = None) -> None:
        monkeypatch.setattr(checks, "_TRITON_FOUND", True)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))

    return set_device


@pytest.mark.parametrize(
    ("major", "hip", "chosen"),
    [(7, None, "chunked"), (8, None, "triton"), (9, None, "triton"), (12, None, "triton"), (9, "6.4", "chunked")],
)
def test_auto_takes_triton_where_its_kernels_run(device_is, major, hip, chosen):
    """Before 8.0 there are no tensor cores for bfloat16; AMD's devices say cuda too, and nothing was tried there."""
    device_is(major, hip)
    assert checks.choose_impl("auto", GPU) == chosen
    assert ("triton" in checks.available_impls(GPU)) == (chosen == "triton")


def test_triton_is_refused_where_it_does_not_run(device_is):
    device_is(7)
    with pytest.raises(
        ValueError, match=r"not available for cuda tensors here, available: auto, chunked, reference .*8\.0"
    ):
        checks.choose_impl("triton", GPU)


@pytest.mark.skipif(not find_spec("triton"), reason="no triton")
def test_cards_after_10_take_the_tiles_of_8():
    """They have no warp-group products, and 99 KB of shared memory a block."""
    from vlscale.kernels.triton_tiles import FUSED, Work, config_for, generation

    assert [generation(major) for major in (7, 8, 9, 10, 11, 12, 13)] == [8, 8, 9, 10, 10, 8, 8]
    for work in Work:
        assert config_for(torch.bfloat16, 12, work) == config_for(torch.bfloat16, 8, work)
    assert set(FUSED) == {8, 9, 10}
