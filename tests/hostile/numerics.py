"""Every decomposition, in every dtype and metric, of weights without rank, without scale or beyond every scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import tdkit
from tdkit.calibration.calibration import Calibration
from tdkit.errors import TdkitError

ROWS, COLUMNS = 12, 16

KINDS = (
    "low_rank",
    "kronecker",
    "permuted_kronecker",
    "tt_matrix",
    "tucker",
    "cp",
    "spatial_low_rank",
    "blocks",
    "auto",
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def weights() -> dict[str, Tensor]:
    """Returns degenerate weights (out, in), float64."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    one = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    one[3, 5] = 1.0
    row = plain.clone()
    row[1:] = 0
    nan = plain.clone()
    nan[0, 0] = torch.nan
    infinite = plain.clone()
    infinite[0, 0] = torch.inf
    return {
        "random": plain,
        "zeros": torch.zeros_like(plain),
        "ones": torch.ones_like(plain),
        "one entry": one,
        "one row": row,
        "rank one": plain[:, :1] @ plain[:1],
        "identity": torch.eye(ROWS, COLUMNS, dtype=torch.float64),
        "tiny": plain * 1e-30,
        "below the smallest": plain * 1e-42,
        "huge": plain * 1e15,
        "two scales": plain * torch.logspace(-12, 12, COLUMNS, dtype=torch.float64),
        "NaN": nan,
        "infinite": infinite,
    }


def metrics() -> dict[str, tdkit.Metric | None]:
    """Returns metrics that calibrations of few or odd batches give."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, COLUMNS, generator=generator, dtype=torch.float64)
    g = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
    return {
        "none": None,
        "few tokens": tdkit.Metric(x.T @ x / 3, g.T @ g / 2),
        "zeros": tdkit.Metric(torch.zeros(COLUMNS, COLUMNS).double(), torch.zeros(ROWS, ROWS).double()),
        "huge": tdkit.Metric(x.T @ x * 1e30, g.T @ g * 1e30),
        "tiny": tdkit.Metric(x.T @ x * 1e-30, g.T @ g * 1e-30),
        "inputs only": tdkit.Metric(x.T @ x / 3),
        "diagonal": tdkit.Metric((x**2).mean(0), (g**2).mean(0)),
    }


def cases() -> Iterator[tuple[str, str, torch.dtype, str]]:
    yield from itertools.product(KINDS, weights(), DTYPES, metrics())


def tried(kind: str, weight: str, dtype: torch.dtype, metric: str) -> str:
    """Compress a layer with such a weight; returns "success" or "error", and raises for any other outcome."""
    matrix = weights()[weight].to(dtype)
    convolution = kind in ("tucker", "cp", "spatial_low_rank")
    layer: nn.Module = nn.Conv2d(4, ROWS, 2, bias=False) if convolution else nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight = nn.Parameter(matrix.reshape(ROWS, 4, 2, 2) if convolution else matrix)
    model = nn.Sequential(layer)
    known = metrics()[metric]
    calibration = None if known is None else Calibration({"0": known}, gradients=known.output is not None)
    finite = bool(torch.isfinite(matrix).all())
    policy = tdkit.Policy([tdkit.Rule("*", kind)], budget=0.8)
    try:
        tdkit.compress(model, policy, calibration=calibration, progress=False)
    except TdkitError as error:
        if model[0] is not layer or not str(error).strip():
            raise AssertionError("the model changed, or the error says nothing") from error
        if finite and weight == "random" and metric in ("none", "few tokens"):
            raise AssertionError(f"an ordinary weight is refused: {error}") from error
        return "error"
    if not finite:
        raise AssertionError("NaN was compressed")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AssertionError(f"{name} is not finite")
    return "success"
