"""Time and error of the fits, beside those of other libraries and of a long L-BFGS; writes docs/results/fits.md.

    python tests/benchmarks/fits.py [--parts seconds,peers,objective,small] [--layers 12] [--keep 0.66]

Parts that are not measured again are kept in `docs/results/fits.json`. The shapes are those of GPT-2 small. Weights
are random with a decaying spectrum; moments are random and correlated, with a few dominant directions, like those of
trained models. With fewer than 12 layers the seconds are scaled up. Generating weights and moments is not timed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdkit
from tdkit import (
    Auto,
    Decomposition,
    FactorizedMatrix,
    Kronecker,
    LowRank,
    Metric,
    PermutedKronecker,
    Policy,
    Rule,
    TTMatrix,
)
from tdkit.evaluation.timing import side_by_side
from tdkit.fitting.linalg import rearrange, relative_error, restore
from tdkit.shapes import Shape
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
LAYERS = 12
BLOCK: dict[str, Shape] = {
    "attn.c_attn": (2304, 768),
    "attn.c_proj": (768, 768),
    "mlp.c_fc": (3072, 768),
    "mlp.c_proj": (768, 3072),
}
BARS = {"plain": 30.0, "calibrated": 120.0}  # seconds for 12 layers on two cores
KINDS: tuple[Decomposition, ...] = (LowRank(), Kronecker(), TTMatrix(), PermutedKronecker())
NO_BAR = ("permuted_kronecker",)  # it also searches permutations
SQUARE, WIDE = (768, 768), (768, 3072)
OBJECTIVE_SHAPE: Shape = (192, 288)
LONG = 500  # L-BFGS iterations
SMALL_KEEP = 0.6  # params after / params before, of the small models
BATCHES, TOKENS = 8, (8, 64)  # of their calibration
Model = tuple[Callable[[], nn.Module], int, float]  # how to make it, its vocabulary, and the bar in seconds


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
    """Seconds of all fits per decomposition, with and without a metric, scaled to 12 layers."""
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
                    "kept": keep,
                    "layers fitted": layers,
                    "seconds": round(scaled, 1),
                    "bar": None if kind.name in NO_BAR else bar,
                    "relative error": round(error, 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def long_lbfgs(start: FactorizedMatrix, weight: Tensor, metric: Metric, iterations: int) -> float:
    """The objective after `iterations` of torch's L-BFGS on all factors of a copy of `start` (float64)."""
    matrix = copy.deepcopy(start)
    for parameter in matrix.parameters():  # torch's L-BFGS flattens parameters by `view`
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
    """The calibrated fit, beside a long L-BFGS from the plain fit and from the calibrated fit."""
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


def peers() -> list[dict[str, Any]]:
    """Plain fits of float32 weights, beside other implementations, with alternating calls in one process."""
    rows = []
    for shape in (SQUARE, WIDE):
        weight = random_weight(shape, 0)
        for name, ways in contenders(weight).items():
            errors = {way: relative_error(weight, call()) for way, call in ways.items()}
            timings = side_by_side(ways, seconds=0, min_rounds=3)
            for way, timing in timings.items():
                rows.append(
                    {
                        "shape": "{}x{}".format(*shape),
                        "factors": name,
                        "how": way,
                        "seconds": round(timing.seconds, 3),
                        "x ours": round(timing.ratio, 2),
                        "relative error": round(errors[way], 5),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def contenders(weight: Tensor) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Implementations by name of the factors, tdkit first; each returns the dense approximation of `weight`."""
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    tensorly.set_backend("pytorch")
    rows, columns = weight.shape
    rank = 64
    b = (32, 32) if rows == columns else (32, 64)
    a = (rows // b[0], columns // b[1])
    narrow = (1, 8), (rows, columns // 8)
    out_modes, in_modes = (8, 12, 8), (8, 12, 8) if rows == columns else (16, 12, 16)

    def by_svd() -> Tensor:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank] * s[:rank] @ v[:rank]

    def kronecker_by_svd(a: Shape, b: Shape, terms: int) -> Tensor:
        u, s, v = torch.linalg.svd(rearrange(weight, a, b), full_matrices=False)
        return restore(u[:, :terms] * s[:terms] @ v[:terms], a, b)

    def train_by_tensorly() -> Tensor:
        cores = tensor_train_matrix(weight.reshape(*out_modes, *in_modes), rank=(1, 32, 32, 1))
        dense: Tensor = cores.to_tensor()
        return dense.reshape(rows, columns)

    def ours(kind: Decomposition) -> Callable[[], Tensor]:
        return lambda: kind.fit(weight).dense().detach()

    return {
        f"rank {rank}": {"tdkit": ours(LowRank(rank=rank)), "torch.linalg.svd": by_svd},
        "16 terms of {}x{} kron {}x{}".format(*a, *b): {
            "tdkit": ours(Kronecker(terms=16, a=a, b=b)),
            "torch.linalg.svd of the rearranged matrix": lambda: kronecker_by_svd(a, b, 16),
        },
        "1 term of {}x{} kron {}x{}".format(*narrow[0], *narrow[1]): {
            "tdkit": ours(Kronecker(terms=1, a=narrow[0], b=narrow[1])),
            "torch.linalg.svd of the rearranged matrix": lambda: kronecker_by_svd(*narrow, 1),
        },
        "train of 3 cores, ranks 32": {
            "tdkit": ours(TTMatrix(ranks=32, out_modes=out_modes, in_modes=in_modes)),
            "tensorly.tensor_train_matrix": train_by_tensorly,
        },
    }


def gpt2(width: int, layers: int, vocabulary: int) -> Callable[[], nn.Module]:
    """A GPT-2 with random weights."""

    def make() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"vocab_size": vocabulary, "n_positions": TOKENS[1], "n_embd": width, "n_layer": layers, "n_head": 4}
        ends = {"bos_token_id": None, "eos_token_id": None}
        model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, **ends)).eval()
        return model

    return make


MODELS: dict[str, Model] = {
    "GPT-2, 3 layers of 48": (gpt2(48, 3, 256), 256, 2.0),
    "GPT-2, 8 layers of 32": (gpt2(32, 8, 128), 128, 2.0),
    "GPT-2, 4 layers of 128": (gpt2(128, 4, 1000), 1000, 5.0),
}


def time_small(models: dict[str, Model] = MODELS) -> list[dict[str, Any]]:
    """Seconds of `tdkit.compress` per model, the calibration included, beside those with low rank only."""
    first = gpt2(16, 1, 40)()  # not timed: imports, and the first calls of the libraries
    tdkit.compress(first, Policy([Rule("*", Auto())], budget=SMALL_KEEP), calibration=[torch.arange(40)[None]])
    rows = []
    for name, (make, vocabulary, bar) in models.items():
        draw = torch.Generator().manual_seed(0)
        batches = [torch.randint(vocabulary, TOKENS, generator=draw) for _ in range(BATCHES)]
        found: dict[str, tuple[float, float]] = {}
        params = 0
        kinds: dict[str, Decomposition] = {"low rank": LowRank(), "auto": Auto()}
        for kind, decomposition in kinds.items():
            model = make()
            params = sum(p.numel() for p in model.parameters())
            start, cpu_start = time.perf_counter(), time.process_time()
            policy = Policy([Rule("*", decomposition)], budget=SMALL_KEEP)
            tdkit.compress(model, policy, calibration=batches, progress=False)
            found[kind] = time.perf_counter() - start, time.process_time() - cpu_start
        rows.append(
            {
                "model": name,
                "params": params,
                "seconds": round(found["auto"][0], 2),
                "bar": bar,
                "CPU seconds": round(found["auto"][1], 2),
                "x low rank": round(found["auto"][0] / found["low rank"][0], 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    parts = [
        "# Fits\n",
        f"Written by `python tests/benchmarks/fits.py`: {machine['threads']} threads of {machine['cpus']} CPUs, torch "
        f"{machine['torch']}, tensorly {machine['tensorly']}; random weights with a decaying spectrum, seed 0.\n",
    ]
    for part, (heading, text) in SECTIONS.items():
        rows = results.get(part)
        if rows:
            table = markdown_table(list(rows[0]), [[_shown(value) for value in row.values()] for row in rows])
            parts += [f"## {heading}\n", f"{text}\n", table]
    return "\n".join(parts)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


SECTIONS = {
    "seconds": (
        "All block weights of GPT-2 small",
        "48 matrices in 12 layers; where fewer layers were fitted the seconds are scaled up. The time of calibration "
        "is not counted.",
    ),
    "peers": (
        "Plain fits beside other libraries",
        "The same factors, each way in turn; ratios are medians of paired ratios. Ours are computed in float64, the "
        "others in the float32 of the weight.",
    ),
    "objective": (
        f"Calibrated fits beside {LONG} iterations of L-BFGS",
        f"tr(S E C Eᵀ), relative to that of the weight, for a {OBJECTIVE_SHAPE[0]}x{OBJECTIVE_SHAPE[1]} matrix in a "
        "metric with dominant directions: the plain fit, ours, and torch's L-BFGS on all factors from the plain fit "
        "and from ours. Asked for: `ours / from plain` at most 1.01.",
    ),
    "small": (
        "Small models with `Auto`",
        f"`tdkit.compress` to {SMALL_KEEP:.0%} of the parameters with a calibration on batches, which is timed too; "
        "beside it the same with low rank only. CPU seconds are those of all threads.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--parts", default="seconds,peers,objective,small", help="what to measure again; the rest is kept"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="how many of the 12 layers to fit; scaled up")
    parser.add_argument("--keep", type=float, default=0.66, help="params after / params before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of fits.json and fits.md")
    options = parser.parse_args()
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "seconds": lambda: time_fits(options.keep, options.layers),
        "peers": peers,
        "objective": lambda: compare_objectives(options.keep),
        "small": time_small,
    }
    parts = options.parts.split(",")
    if unknown := set(parts) - set(measures):
        parser.error(f"--parts {', '.join(sorted(unknown))}: there are {', '.join(measures)}")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "fits.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    results["machine"] = {
        "threads": options.threads,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "tensorly": importlib.metadata.version("tensorly"),
    }
    for part in parts:
        results[part] = measures[part]()
        write_text(path, json.dumps(results, indent=1) + "\n")
        write_text(path.with_suffix(".md"), page(results))


if __name__ == "__main__":
    main()
