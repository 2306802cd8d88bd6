"""What the permutation search recovers and costs: planted orders under noise, kinds of factors, real weights.

    python -m tests.benchmarks.permutations [--threads 1]

Writes `docs/results/permutations.md`, anew after each section, so that what a stopped run measured is kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tdkit.files import write_text
from tdkit.linalg import nearest_kronecker, relative_error, restore
from tdkit.permutations import search
from tdkit.shapes import Shape
from tdkit.sources import load_model
from tdkit.tables import markdown_table
from tests.planted import Factors, gaussian, non_negative, orthogonal, plant, rank_two, repeated, signs

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "permutations.md"
LEVELS = (0.0, 0.3)

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
KINDS: dict[str, Factors] = {
    "orthogonal rows or columns": orthogonal,
    "non-negative": non_negative,
    "two rows and two columns equal": repeated,
    "rank 2": rank_two,
    "entries 1 and -1": signs,
}


def row(a: Shape, b: Shape, terms: int, noise: float, seed: int, factors: Factors = gaussian) -> list[str]:
    """One search: sizes, planted error, found error, the gap between them and the time in seconds."""
    planted = plant(a, b, terms=terms, noise=noise, seed=seed, factors=factors)
    start = time.perf_counter()
    found = search(planted.matrix, a, b, terms)
    seconds = time.perf_counter() - start
    approximation = restore(found.a.flatten(1).T @ found.b.flatten(1), a, b)
    error = relative_error(planted.matrix[found.rows][:, found.columns], approximation)
    gap = error - planted.error
    cells = [
        f"{a[0] * b[0]}x{a[1] * b[1]}",
        f"{a[0]}x{a[1]} kron {b[0]}x{b[1]}",
        str(terms),
        f"{noise:.0%}",
        str(seed),
        f"{planted.error:.4f}" if noise else "0",
        f"{error:.4f}" if noise else f"{error:.1e}",
        ("yes" if gap < (0.01 if noise else 1e-6) else "**no**"),
        f"{seconds:.1f}",
    ]
    print(" ".join(cells), flush=True)
    return cells


HEADER = ["matrix", "factors", "terms", "noise", "seed", "planted error", "found error", "recovered", "seconds"]


def section(title: str, rows: Iterable[list[str]], header: list[str] = HEADER) -> str:
    return f"## {title}\n\n{markdown_table(header, list(rows))}\n"


def kinds() -> Iterable[list[str]]:
    for name, factors in KINDS.items():
        for noise in (0.0, 0.3):
            yield [name, *row((16, 16), (16, 16), 1, noise, 0, factors)]


def timed(act: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def real() -> Iterable[list[str]]:
    """SmolLM2's fifth block with factors as square as they come, about 80% of the parameters, and one term."""
    square = {192: 12, 576: 24, 1536: 32}
    weights = dict(load_model("smollm2").model.named_parameters())
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                  "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
        weight = weights[f"model.layers.5.{layer}.weight"].detach().double()
        a = (square[weight.shape[0]], square[weight.shape[1]])
        b = (weight.shape[0] // a[0], weight.shape[1] // a[1])
        at_80 = int(0.8 * weight.numel() / (a[0] * a[1] + b[0] * b[1]))
        for terms in (1, at_80):
            yield real_row(layer, weight, a, b, terms)


def real_row(layer: str, weight: Tensor, a: Shape, b: Shape, terms: int) -> list[str]:
    def plain() -> Tensor:
        left, right = nearest_kronecker(weight, a, b, terms)
        return restore(left.flatten(1).T @ right.flatten(1), a, b)

    def permuted() -> Tensor:
        found = search(weight, a, b, terms)
        dense = restore(found.a.flatten(1).T @ found.b.flatten(1), a, b)
        return dense[found.rows.argsort()][:, found.columns.argsort()]

    (plain_seconds, near), (seconds, nearer) = timed(plain), timed(permuted)
    cells = [
        layer,
        f"{weight.shape[0]}x{weight.shape[1]}",
        str(terms),
        f"{relative_error(weight, near):.4f}",
        f"{relative_error(weight, nearer):.4f}",
        f"{plain_seconds:.2f}",
        f"{seconds:.2f}",
    ]
    print(" ".join(cells), flush=True)
    return cells


def page() -> Iterator[str]:
    intro = (
        "# Permutation search\n\n"
        "Written by `python -m tests.benchmarks.permutations`; "
        f"CPU threads: {torch.get_num_threads()}, torch {torch.__version__}.\n\n"
        "A sum of Kronecker products with Gaussian factors (unless said otherwise) is made, Gaussian noise of the "
        "stated share of its norm is added, rows and columns are shuffled, and `tdkit.permutations.search` has to "
        "undo it with its defaults. *Planted error*: the relative Frobenius error of the best fit that knows the "
        "order. *Recovered*: found within 0.01 of it; without noise, within 1e-6.\n"
    )
    yield intro
    yield section("One term", [row(a, b, 1, noise, 0) for a, b in SIZES for noise in LEVELS])
    yield section("One term, other seeds", [row(a, b, 1, 0.3, seed) for a, b in SIZES[:6] for seed in (1, 2, 3)])
    yield section("Several terms", [row(a, b, t, 0.3, 0) for t in (2, 4) for a, b in SEVERAL])
    yield section("Kinds of factors", kinds(), ["factor entries", *HEADER])
    yield (
        "Factors whose entries all have one magnitude leave no trace in the magnitudes of the matrix: "
        "the spectral start is blind to them.\n"
    )
    yield section(
        "Real weights: SmolLM2-135M, block 5",
        real(),
        ["layer", "matrix", "terms", "plain Kronecker", "permuted", "plain seconds", "permuted seconds"],
    )
    yield (
        "Relative Frobenius errors at equal factors; the second row of each layer keeps about 80% of the parameters, "
        "integer orders not counted. The gain there is that of ordering by norm and one round of assignment.\n"
    )
    yield section("Unbalanced factors", [row(a, b, 1, noise, 0) for a, b in UNBALANCED for noise in LEVELS])
    yield section("Several terms, no noise", [row(a, b, t, 0.0, 0) for t in (2, 4) for a, b in SEVERAL])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    parts = []
    for part in page():
        parts.append(part)
        write_text(RESULTS, "\n".join(parts))


if __name__ == "__main__":
    main()
