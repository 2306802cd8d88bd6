"""Round numbers to a grid of 8 or 4 bits per group, and back."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tdkit.errors import OptionError

Bits = Literal[8, 4]

SMALLEST = 1e-30  # step of a group of zeros


class Codes(NamedTuple):
    """Numbers rounded to a grid per group.

    Attributes:
        values: (groups * group,) int8, or (groups * group / 2,) uint8 with two numbers of 4 bits each.
        steps: (groups,) int16, the bits of the bfloat16 step of each grid. Kept as integers, a cast of the model to
            another dtype leaves them as they are.
        zeros: (groups,) int16, the bits of the bfloat16 code of zero; None with 8 bits, where it is 0.
    """

    values: Tensor
    steps: Tensor
    zeros: Tensor | None


@dataclass(frozen=True)
class Grid:
    """Uniform grids of `bits` bits, one per `group` consecutive numbers.

    With 8 bits they are symmetric, -127 to 127 steps, and reach the largest magnitude of the group. With 4 bits they
    have 16 points, placed by half-quadratic quantization (Badri and Shaji, HQQ, 2023), as torchao computes it, or from
    the smallest to the largest number of the group where that is nearer.

    Raises:
        OptionError: when bits or group is not supported.
    """

    bits: Bits
    group: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 4) or isinstance(self.bits, bool):
            raise OptionError(f"bits={self.bits!r} must be 8 or 4")
        group = self.group
        if isinstance(group, bool) or not isinstance(group, int) or group < 2 or group % 2:
            raise OptionError(f"group={group!r} must be an even number of at least 2")

    def groups(self, count: int) -> int:
        """Returns the number of groups of `count` numbers; the last one may be partly used."""
        return -(-count // self.group)

    def bytes(self, count: int) -> int:
        """Returns the bytes of `count` rounded numbers."""
        groups = self.groups(count)
        return groups * self.group * self.bits // 8 + groups * (2 if self.bits == 8 else 4)

    def empty(self, count: int, *, device: torch.device | str | None = None) -> Codes:
        """Returns uninitialised codes of `count` numbers."""
        groups = self.groups(count)
        size = groups * self.group
        values = (
            torch.empty(size, dtype=torch.int8, device=device)
            if self.bits == 8
            else torch.empty(size // 2, dtype=torch.uint8, device=device)
        )
        steps = torch.empty(groups, dtype=torch.int16, device=device)
        return Codes(values, steps, None if self.bits == 8 else torch.empty_like(steps))

    def encode(self, numbers: Tensor) -> Codes:
        """Round (count,) numbers of any float dtype.

        Raises:
            OptionError: when torchao is not installed, or a number is not finite.
        """
        if not bool(torch.isfinite(numbers).all()):
            raise OptionError("weights with NaN or infinite entries cannot be quantized")
        check_torchao()
        rows = self._grouped(numbers.detach().float())
        return self._symmetric(rows) if self.bits == 8 else self._asymmetric(rows)

    def _grouped(self, numbers: Tensor) -> Tensor:
        """The numbers in rows of one group each; the last one repeats its numbers, so that its grid is theirs."""
        last = numbers[(self.groups(len(numbers)) - 1) * self.group :]
        missing = self.group - len(last)
        return torch.cat([numbers, last.repeat(-(-missing // len(last)))[:missing]]).reshape(-1, self.group)

    def decode(self, codes: Codes, count: int, dtype: torch.dtype) -> Tensor:
        """Returns the (count,) numbers that the codes stand for, computed in float32."""
        return self.decode_groups(codes.values, codes.steps, codes.zeros, dtype)[:count]

    def decode_groups(self, values: Tensor, steps: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Like `decode`, for the codes of whole groups."""
        scale = steps.view(torch.bfloat16).float()[:, None]
        if zeros is None:
            rows = values.reshape(-1, self.group).float()
        else:
            rows = torch.stack([values & 15, values >> 4], -1).reshape(-1, self.group).float()
            rows = rows - zeros.view(torch.bfloat16).float()[:, None]
        return (rows * scale).to(dtype).flatten()

    def _symmetric(self, rows: Tensor) -> Codes:
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

        block = (1, self.group)
        limits = {"quant_min": -127, "quant_max": 127}
        steps, zeros = choose_qparams_affine(
            rows, MappingType.SYMMETRIC, block, torch.int8, eps=SMALLEST, scale_dtype=torch.float32, **limits
        )
        steps = _rounded(steps.flatten(), up=True)
        values = quantize_affine(rows, block, steps.float()[:, None], zeros, torch.int8, **limits)
        return Codes(values.flatten(), steps.view(torch.int16), None)

    def _asymmetric(self, rows: Tensor) -> Codes:
        from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as by_hqq

        low, high = rows.aminmax(dim=1)
        flat = high == low  # its grid has no width
        safe = torch.where(flat[:, None], torch.arange(self.group, dtype=rows.dtype, device=rows.device), rows)
        _, steps, zeros, _ = by_hqq(
            safe,
            nbits=4,
            group_size=self.group,
            axis=1,
            compute_dtype=torch.float32,
            device=str(rows.device),
            raw_output=True,
        )
        width = (high - low).clamp_min(SMALLEST) / 15
        grids = [
            (
                torch.where(flat, high.abs().clamp_min(SMALLEST), steps.flatten()),
                torch.where(flat, 8.0, zeros.flatten()),
            ),
            (width, -low / width),  # from the smallest to the largest number, which outliers need
        ]
        best: tuple[Tensor, ...] | None = None
        for step, zero in grids:
            step, zero = _rounded(step), zero.clamp(-(2**14), 2**14).to(torch.bfloat16)
            codes = (rows / step.float()[:, None] + zero.float()[:, None]).round().clamp(0, 15)
            error = ((codes - zero.float()[:, None]) * step.float()[:, None] - rows).square().sum(1)
            if best is None:
                best = codes, step, zero, error
                continue
            better = error < best[3]
            best = (
                torch.where(better[:, None], codes, best[0]),
                *(torch.where(better, new, old) for new, old in zip((step, zero, error), best[1:], strict=True)),
            )
        assert best is not None
        pairs = best[0].to(torch.uint8).reshape(-1, 2)
        return Codes(pairs[:, 0] | pairs[:, 1] << 4, best[1].view(torch.int16), best[2].view(torch.int16))


def check_torchao() -> None:
    """Check that torchao is installed, which places the grids; decoding does without.

    Raises:
        OptionError: when it is not.
    """
    if find_spec("torchao") is None:
        raise OptionError("quantization needs torchao: pip install 'tdkit[torchao]'")


def _rounded(steps: Tensor, *, up: bool = False) -> Tensor:
    """Steps in bfloat16; rounded `up`, so that the largest magnitude of a group stays on its grid."""
    near = steps.to(torch.bfloat16)
    if not up:
        return near
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)  # the next larger number, as it is positive
    return torch.where(near.float() < steps, above, near)
