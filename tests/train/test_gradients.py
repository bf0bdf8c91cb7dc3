"""Moves by less than the spacing of bf16."""

import pytest
import torch

from vlscale.train.gradients import Gradients, Held, dithered, moving


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("value", [1.0, -1.25, 3.0e-5, -200.0])
def test_as_many_elements_go_up_as_the_share_of_the_way(value, share):
    low = torch.tensor(value).bfloat16().float()
    spacing = torch.exp2(torch.frexp(low)[1] - 8.0)
    found = dithered((low + share * spacing).expand(4096), 0).float()
    assert set(found.tolist()) == {float(low), float(low + spacing)}
    assert float((found - low).mean() / spacing) == pytest.approx(share, abs=2e-3)


def test_numbers_of_bf16_stay_and_those_that_are_not_finite_too():
    values = torch.randn(10_000).bfloat16()
    assert torch.equal(dithered(values.float(), 7), values)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    assert torch.equal(dithered(bad, 0).float().nan_to_num(9), bad.nan_to_num(9))


def test_a_part_is_rounded_as_in_the_whole():
    values = torch.randn(1000) * torch.logspace(-8, 8, 1000)
    whole = dithered(values, 0)
    assert torch.equal(torch.cat([dithered(values[:333], 0), dithered(values[333:], 333)]), whole)
    assert ((whole.float() - values).abs() / values.abs()).max() < 2**-7


def test_a_short_shift_is_lost_in_the_nearest_number_and_kept_by_dithering():
    weights = torch.randn(20_000).bfloat16()
    along = torch.randn(20_000)
    rate = 2e-4 * weights.float().norm() / along.norm()
    shifts = {}
    for dither in (False, True):
        values = weights.clone()
        with moving([Held(values, 0, weights.float)], None) as move:
            move(Gradients([along]), rate, dither)
            ahead = values.float()
            move(Gradients([along]), -rate, dither)
            shifts[dither] = float((ahead - values.float()) @ along / (2 * rate * along.square().sum()))
        assert torch.equal(values, weights)
    assert shifts[False] < 0.5
    assert shifts[True] == pytest.approx(1, abs=0.05)
