"""Rounding to grids of 8 and 4 bits: exact where it can be, near everywhere, and never silent."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkit.errors import OptionError
from tdkit.fitting.quantization import Grid
from tests.side_packages import use_torchao

use_torchao()

counts = st.integers(1, 200)
grids = st.sampled_from([Grid(8, 64), Grid(4, 32), Grid(8, 2), Grid(4, 6)])


@settings(max_examples=40, deadline=None)
@given(counts, grids, st.integers(0, 2**16), st.floats(1e-6, 1e4))
def test_a_number_is_near_what_it_is_rounded_to(count: int, grid: Grid, seed: int, scale: float) -> None:
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale
    back = grid.decode(grid.encode(numbers), count, torch.float32)
    missing = grid.groups(count) * grid.group - count
    groups = torch.cat([numbers, numbers[-1:].expand(missing)]).view(-1, grid.group)
    low, high = groups.aminmax(dim=1)
    width = torch.maximum(high.abs(), low.abs()) / 127 if grid.bits == 8 else (high - low) / 15
    if grid.bits == 8:
        limit = 0.51 * width  # half a step, rounded up to bfloat16
        assert bool(((back - numbers).abs() <= limit.repeat_interleave(grid.group)[:count] + 1e-30).all())
    else:  # a grid that is placed for the least error may clip outliers
        limit = (width.square().sum() * grid.group).sqrt() + 4e-3 * numbers.norm()
        assert float((back - numbers).norm()) <= float(limit)


@pytest.mark.parametrize("grid", [Grid(8, 64), Grid(4, 32)])
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-20])
def test_groups_of_one_value_are_exact(grid: Grid, value: float) -> None:
    numbers = torch.full((70,), value)
    back = grid.decode(grid.encode(numbers), 70, torch.float32)
    torch.testing.assert_close(back, numbers, rtol=4e-3, atol=1e-28)  # a step has the 8 bits of a bfloat16


def test_numbers_on_a_grid_of_4_bits_stay_where_they_are() -> None:
    steps = torch.tensor([0.5, 0.25])
    codes = torch.randint(0, 16, (2, 32), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15
    numbers = ((codes - 7) * steps[:, None]).flatten()
    grid = Grid(4, 32)
    torch.testing.assert_close(grid.decode(grid.encode(numbers), 64, torch.float32), numbers, rtol=0, atol=1e-6)


def test_8_bits_are_those_of_torchao() -> None:
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    limits = {"quant_min": -127, "quant_max": 127}
    steps, zeros = choose_qparams_affine(rows, MappingType.SYMMETRIC, (1, 64), torch.int8, **limits)
    theirs = quantize_affine(rows, (1, 64), steps, zeros, torch.int8, **limits)
    codes = Grid(8, 64).encode(rows.flatten())
    found = codes.steps.view(torch.bfloat16).float()
    assert bool((found >= steps.flatten()).all())
    torch.testing.assert_close(found, steps.flatten(), rtol=8e-3, atol=0)
    assert int((codes.values.view(5, 64).int() - theirs.int()).abs().max()) <= 1


@pytest.mark.parametrize("bits", [8, 4])
def test_4_bits_are_packed_two_to_a_byte(bits: int) -> None:
    grid = Grid(bits, 32)  # type: ignore[arg-type]
    codes = grid.encode(torch.randn(100))
    held = sum(part.numel() * part.element_size() for part in codes if part is not None)
    assert held == grid.bytes(100) == 4 * 32 * bits // 8 + 4 * (2 if bits == 8 else 4)
    empty = grid.empty(100)
    assert [None if part is None else (part.shape, part.dtype) for part in codes] == [
        None if part is None else (part.shape, part.dtype) for part in empty
    ]


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_refused(bits: int) -> None:
    with pytest.raises(OptionError, match="NaN or infinite"):
        Grid(bits, 32).encode(torch.tensor([1.0, float("nan")]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (True, 32), (8, 0), (8, 7), (4, "32")])
def test_options_are_checked(bits: int, group: int) -> None:
    with pytest.raises(OptionError, match="must be"):
        Grid(bits, group)  # type: ignore[arg-type]


def test_without_torchao_the_error_says_what_to_install() -> None:
    code = (
        "import sys, torch; sys.modules['torchao'] = None; import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torchao' else find(name, *a)\n"
        "from tdkit.fitting.quantization import Grid; Grid(8, 64).encode(torch.ones(3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'tdkit[torchao]'" in done.stderr
