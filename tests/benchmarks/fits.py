"""Seconds to fit all block weights of GPT-2 small, plain and calibrated, and how near the fits come to a long L-BFGS.

    python tests/benchmarks/fits.py [--layers 12] [--keep 0.66] [--out FILE.json]
    python tests/benchmarks/fits.py --objective [--out FILE.json]

Weights are random with a decaying spectrum, moments random and correlated with a few dominant directions, as
those of trained models are. With fewer than 12 layers the seconds are scaled up. The time to make weights and
moments is not counted. Nothing is written unless --out is given.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkit import Decomposition, FactorizedMatrix, Kronecker, LowRank, Metric, PermutedKronecker, TTMatrix
from tdkit.shapes import Shape
from tdkit.tables import markdown_table

LAYERS = 12
BLOCK: dict[str, Shape] = {
    "attn.c_attn": (2304, 768),
    "attn.c_proj": (768, 768),
    "mlp.c_fc": (3072, 768),
    "mlp.c_proj": (768, 3072),
}
BARS = {"plain": 30.0, "calibrated": 120.0}  # seconds for 12 layers on two cores
KINDS: tuple[Decomposition, ...] = (LowRank(), Kronecker(), TTMatrix())
OBJECTIVE_SHAPE: Shape = (192, 288)
LONG = 500  # L-BFGS iterations


def random_weight(shape: Shape, seed: int) -> Tensor:
    """A float32 matrix whose singular values fall by a power law."""
    draw = torch.Generator().manual_seed(seed)
    inner = min(shape)
    left, right = torch.randn(shape[0], inner, generator=draw), torch.randn(inner, shape[1], generator=draw)
    return left * torch.arange(1, inner + 1).pow(-0.3) @ right / inner


def random_moment(n: int, seed: int) -> Tensor:
    """A float64 second moment of full rank: unequal variances, mixed, and a few directions that dominate."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.randn(n, generator=draw, dtype=torch.float64).exp()
    mixed = torch.randn(n, n, generator=draw, dtype=torch.float64) * torch.arange(1, n + 1).pow(-0.5)
    root = scale.sqrt()[:, None] * (torch.eye(n, dtype=torch.float64) + mixed)
    return root @ root.T / n


def time_fits(keep: float, layers: int) -> list[dict[str, Any]]:
    """For each decomposition the seconds of all plain and all calibrated fits, scaled to 12 layers."""
    metrics = {name: Metric(random_moment(n, 1), random_moment(m, 2)) for name, (m, n) in BLOCK.items()}
    rows = []
    for kind in KINDS:
        for mode, bar in BARS.items():
            seconds, error = 0.0, 0.0
            for layer in range(layers):
                for name, shape in BLOCK.items():
                    weight = random_weight(shape, layer)
                    choice = kind.complete(shape, int(keep * weight.numel()))
                    assert choice is not None
                    metric = metrics[name] if mode == "calibrated" else None
                    start = time.perf_counter()
                    matrix = choice.fit(weight, metric)
                    seconds += time.perf_counter() - start
                    error += choice.error(weight, matrix, metric) / (layers * len(BLOCK))
            scaled = seconds * LAYERS / layers
            rows.append(
                {
                    "decomposition": kind.name,
                    "fit": mode,
                    "seconds": round(scaled, 1),
                    "bar": bar,
                    "relative error": round(error, 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def long_lbfgs(start: FactorizedMatrix, weight: Tensor, metric: Metric, iterations: int) -> float:
    """The objective after many iterations of L-BFGS on all factors of `start` (float64), which stays as it is."""
    matrix = copy.deepcopy(start)
    for parameter in matrix.parameters():  # torch's L-BFGS flattens by views
        parameter.data = parameter.data.contiguous()
        parameter.register_hook(Tensor.contiguous)
    size = metric.squared_error(weight)
    c, s = metric.ridged_input(), metric.ridged_output()
    assert c is not None
    assert s is not None
    optimizer = torch.optim.LBFGS(
        matrix.parameters(),
        max_iter=iterations,
        max_eval=4 * iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        gap = weight - matrix.dense()
        error: Tensor = (gap * (s @ gap @ c)).sum() / size
        error.backward()  # type: ignore[no-untyped-call]
        return error

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return metric.squared_error(weight - matrix.dense().detach())


def compare_objectives(keep: float) -> list[dict[str, Any]]:
    """The calibrated fit against long L-BFGS from the plain fit and from the calibrated fit itself."""
    weight = random_weight(OBJECTIVE_SHAPE, 0).double()
    metric = Metric(random_moment(OBJECTIVE_SHAPE[1], 1), random_moment(OBJECTIVE_SHAPE[0], 2))
    size = metric.squared_error(weight)
    rows = []
    choices: list[tuple[str, Decomposition]] = []
    for kind in (Kronecker(), PermutedKronecker(), TTMatrix()):
        complete = kind.complete(OBJECTIVE_SHAPE, int(keep * weight.numel()))
        assert complete is not None
        choices.append((kind.name, complete))
    choices.append(("kronecker, square", Kronecker(a=(12, 18), b=(16, 16), terms=60)))
    choices.append(("tt_matrix, balanced", TTMatrix(ranks=24)))
    for name, choice in choices:
        start = time.perf_counter()
        fitted = choice.fit(weight, metric)
        seconds = time.perf_counter() - start
        plain = choice.fit(weight)
        ours = metric.squared_error(weight - fitted.dense())
        started = time.perf_counter()
        from_plain = long_lbfgs(plain, weight, metric, LONG)
        rows.append(
            {
                "decomposition": name,
                "plain": metric.squared_error(weight - plain.dense()) / size,
                "ours": ours / size,
                f"L-BFGS {LONG} from plain": from_plain / size,
                f"L-BFGS {LONG} from ours": long_lbfgs(fitted, weight, metric, LONG) / size,
                "ours / from plain": round(ours / from_plain, 4),
                "seconds": round(seconds, 2),
                "seconds L-BFGS": round((time.perf_counter() - started) / 2, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=LAYERS, help="how many of the 12 layers to fit; scaled up")
    parser.add_argument("--keep", type=float, default=0.66, help="params after / params before")
    parser.add_argument("--objective", action="store_true", help="compare objectives instead of timing")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = compare_objectives(options.keep) if options.objective else time_fits(options.keep, options.layers)
    columns = list(rows[0])
    print(markdown_table(columns, [[str(row[column]) for column in columns] for row in rows]))
    if options.out is not None:
        options.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
