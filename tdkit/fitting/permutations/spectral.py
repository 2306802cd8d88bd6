"""Spectral starting points for the search of row and column permutations.

In ``W[i, j] = A[i1, j1] B[i2, j2]`` the logarithm of the magnitude is a sum, ``log|A[i1, j1]| + log|B[i2, j2]|``.
After subtracting row and column means, the singular vectors of the first part depend on i1 (j1) only and those of the
second on i2 (j2) only, whatever the order of rows and columns. So the leading singular vectors are computed and
separated into the two kinds, and the rows and columns are clustered by each kind. With several terms the logarithm is
not such a sum, but its main effects still are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.fitting.permutations.assignment import best_assignment
from tdkit.shapes import Shape

# Tuned by hand; `python -m tests.benchmarks.permutations --again` measures how many planted orders are recovered.
FEATURES = 24  # most singular vectors
MOST_PROJECTORS = 1 << 26  # most entries of the explicit projectors in `_projector_coordinates`
ABOVE_NOISE = 0.8  # singular values below this multiple of the largest one of noise are dropped
DETECTED = 1.15  # multiple of the largest singular value of noise from which there is a structure
ROTATIONS = 12  # random rotations that `_partitions` tries
EXACT_PLACES = 512  # `exact_size` of the assignments here
ITERATIONS = 6  # of the subspace iterations


@dataclass(frozen=True)
class Embedding:
    """Coordinates in which rows (columns) with the same index of a factor are close; noise is isotropic in them."""

    rows: Tensor  # (out, k), singular vectors
    columns: Tensor  # (in, k)
    values: Tensor  # (k,) singular values
    excess: float  # largest singular value, divided by that of noise of the same variance


def log_magnitude(matrix: Tensor) -> Tensor:
    """log(w^2 + s / 10), where the mean square s damps the noise of small entries."""
    square = matrix.square()
    return (square + 0.1 * square.mean() + torch.finfo(matrix.dtype).tiny).log()


def embed(matrix: Tensor, transform: Callable[[Tensor], Tensor] = log_magnitude, count: int = FEATURES) -> Embedding:
    """The leading singular vectors of the transformed matrix after subtracting its row and column means."""
    values = transform(matrix)
    values = values - values.mean(dim=0) - values.mean(dim=1, keepdim=True) + values.mean()
    left, singular, right = _leading(values, min(count, *values.shape))
    noise = float(values.square().mean().sqrt()) * (values.shape[0] ** 0.5 + values.shape[1] ** 0.5)
    excess = float(singular[0]) / noise if noise > 0 else 0.0
    kept = max(2, int((singular > ABOVE_NOISE * noise).sum()))
    return Embedding(left[:, :kept].cpu(), right[:, :kept].cpu(), singular[:kept].cpu(), excess)


def spectral_starts(
    matrix: Tensor,  # (out, in) float32
    a: Shape,
    b: Shape,
    *,
    rows: bool = True,
    columns: bool = True,
    seed: int = 0,
    partitions: int = 2,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Starting orders (rows, columns) in stages, the most promising stage first; nothing if no structure is detected.

    A side that may not be reordered keeps its order and is not clustered, which for a vocabulary would not fit in
    memory.

    Args:
        matrix: what to fit.
        a, b: shapes of the factors.
        rows, columns: whether they may be reordered.
        seed: of the random rotations.
        partitions: stages per transformation of the matrix.

    Source: new here.
    """
    ranks = (max(0, min(a) - 1), max(0, min(b) - 1))
    count = min(FEATURES, sum(ranks))
    if count == 0:
        return
    for transform in (log_magnitude, torch.abs):
        found = embed(matrix, transform, count)
        if found.excess < DETECTED:
            continue
        scales = _scales(matrix), _scales(matrix.T)
        still = torch.arange(matrix.shape[0]), torch.arange(matrix.shape[1])
        for first, second in _partitions(found, ranks, seed, partitions):
            yield [
                (
                    _places(found.rows * found.values, upper, lower, a[0], b[0], scales[0]) if rows else still[0],
                    _places(found.columns * found.values, upper, lower, a[1], b[1], scales[1]) if columns else still[1],
                )
                for upper, lower in ((first, second), (second, first))
                if upper.shape[1] <= ranks[0] and lower.shape[1] <= ranks[1]
            ]


def regrouped(
    matrix: Tensor,  # (out, in) float32, its columns in order
    a: Shape,
    b: Shape,
    terms: int,
) -> Tensor:  # (out,) int64, the row of each place
    """The row order, computed from the column order.

    Row (i1, i2), reshaped to an (a2, b2) matrix, is ``sum_r outer(A_r[i1], B_r[i2])``: its column space depends on i1
    only and its row space on i2 only. The rows are clustered by the projectors onto the two spaces.
    """
    blocks = matrix.reshape(len(matrix), a[1], b[1])
    rank = min(terms, a[1], b[1])
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(b[1], rank, generator=generator).to(matrix.device).expand(len(matrix), b[1], rank)
    for _ in range(ITERATIONS):
        upper = torch.linalg.qr(blocks @ lower)[0]
        lower = torch.linalg.qr(blocks.mT @ upper)[0]
    features = [_projector_coordinates(v) for v in (upper, lower)]
    width = [f.shape[1] for f in features]
    choose = torch.split(torch.eye(sum(width)), width, dim=1)
    return _places(torch.cat(features, dim=1), choose[0], choose[1], a[0], b[0], _scales(matrix))


def _projector_coordinates(bases: Tensor) -> Tensor:
    """Principal coordinates (items, k) of the projectors onto the column spaces of (items, n, rank)."""
    if bases.shape[1] == bases.shape[2]:
        return torch.zeros(len(bases), 0)  # every projector is the identity
    if len(bases) * bases.shape[1] ** 2 > MOST_PROJECTORS:
        return _coordinates_by_products(bases)
    projectors = (bases @ bases.mT).flatten(1)
    left, singular, _ = _leading(projectors - projectors.mean(dim=0), min(2 * FEATURES, *projectors.shape))
    coordinates: Tensor = left * singular
    return coordinates.cpu()


def _coordinates_by_products(bases: Tensor) -> Tensor:
    """The same, from the inner products <P_i, P_j> = |U_i^T U_j|^2, without forming the projectors."""
    items, _, rank = bases.shape
    flat = bases.mT.flatten(0, 1).double()
    products = (flat @ flat.T).square().reshape(items, rank, items, rank).sum(dim=(1, 3))
    centred = products - products.mean(dim=0) - products.mean(dim=1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh(centred)
    count = min(2 * FEATURES, items)
    coordinates: Tensor = (vectors * values.clamp_min(0).sqrt())[:, -count:].flip(1)
    return coordinates.to(bases.dtype).cpu()


def _scales(matrix: Tensor) -> Tensor:
    scales: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return scales.cpu()


def _leading(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by subspace iteration.

    Source: Halko, Martinsson and Tropp (2011), section 4.5.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(count + 8, *values.shape)
    right = torch.randn(values.shape[1], width, generator=generator, dtype=values.dtype).to(values.device)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(values @ right)[0]
        right = torch.linalg.qr(values.T @ left)[0]
    left, triangle = torch.linalg.qr(values @ right)
    u, singular, v = torch.linalg.svd(triangle)
    return (left @ u)[:, :count], singular[:count], (right @ v.T)[:, :count]


def _partitions(found: Embedding, ranks: tuple[int, int], seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Splits of the feature space into two subspaces, of features of one index each; the clearest split first.

    The two indices are independent over the rows (and over the columns), so the third moment of three features is
    zero unless all three are functions of the same index. An eigenvector of a random contraction of the third moments
    is a feature of one index only, and the moments between eigenvectors form two blocks.

    Returns:
        Pairs of bases (k, k1) and (k, k2) with orthonormal columns, k1 + k2 = k.
    """
    size = found.rows.shape[1]
    moments = [_third_moments(found.rows), _third_moments(found.columns)]
    generator = torch.Generator().manual_seed(seed)
    tried: list[tuple[float, Tensor, Tensor]] = []
    for trial in range(ROTATIONS):
        weights = torch.randn(2, size, generator=generator, dtype=torch.float64)
        rotation = torch.eye(size, dtype=torch.float64)
        if trial > 0:
            mixed = moments[0] @ weights[0] + moments[1] @ weights[1]
            rotation = torch.linalg.eigh((mixed + mixed.T) / 2)[1]
        turned = [torch.einsum("klp,ka,lb,pc->abc", m, rotation, rotation, rotation) for m in moments]
        affinity = torch.stack([m.square().sum(dim=2) for m in turned]).sum(dim=0)
        cut, left, right = _cheapest_cut(affinity, ranks)
        tried.append((cut, rotation[:, left].float(), rotation[:, right].float()))
    tried.sort(key=lambda t: t[0])
    return [(left, right) for _, left, right in tried[:count]]


def _third_moments(vectors: Tensor) -> Tensor:
    scaled = vectors.double() * len(vectors) ** 0.5
    pairs = (scaled[:, :, None] * scaled[:, None, :]).flatten(1)
    size = vectors.shape[1]
    moments: Tensor = pairs.T @ scaled / len(vectors)
    return moments.reshape(size, size, size)


def _cheapest_cut(affinity: Tensor, ranks: tuple[int, int]) -> tuple[float, Tensor, Tensor]:
    """The least normalised cut of a graph along its second eigenvector, with at most `ranks` nodes on the two sides.

    Source: Shi and Malik (2000), section 3.
    """
    size = len(affinity)
    affinity = affinity - affinity.diag().diag()
    degree = affinity.sum(dim=1).clamp_min(1e-12)
    second = torch.linalg.eigh(affinity / (degree[:, None] * degree).sqrt())[1][:, max(0, size - 2)]
    order = (second / degree.sqrt()).argsort(stable=True)
    low, high = min(ranks), max(ranks)
    best: tuple[float, Tensor, Tensor] | None = None
    for cut in range(size + 1):
        if min(cut, size - cut) > low or max(cut, size - cut) > high:
            continue
        if low > 0 and size > 1 and cut in (0, size):
            continue
        left, right = order[:cut], order[cut:]
        volume = min(float(degree[left].sum()), float(degree[right].sum())) if cut not in (0, size) else 1.0
        share = float(affinity[left][:, right].sum()) / volume
        if best is None or share < best[0]:
            best = (share, left, right)
    assert best is not None
    return best


def _places(features: Tensor, upper: Tensor, lower: Tensor, groups: int, size: int, scales: Tensor) -> Tensor:
    """The item of each place (i1, i2), with items clustered by i1 in some features and by i2 in the others."""
    by_upper = _distances(features @ upper, groups, size)
    by_lower = _distances(features @ lower, size, groups)
    if by_upper is None and by_lower is not None:
        by_upper = _by_scale(by_lower.argmin(dim=1), scales, groups)
    if by_lower is None and by_upper is not None:
        by_lower = _by_scale(by_upper.argmin(dim=1), scales, size)
    if by_upper is None or by_lower is None:
        return scales.argsort(descending=True, stable=True)
    cost = (by_upper[:, :, None] + by_lower[:, None, :]).flatten(1)
    return best_assignment(-cost.T, exact_size=EXACT_PLACES)


def _by_scale(label: Tensor, scales: Tensor, groups: int) -> Tensor:
    """Distances (items, groups) for an index without features, from the order of the norms within each cluster."""
    order = scales.argsort(descending=True, stable=True)
    order = order[label[order].argsort(stable=True)]
    first = torch.searchsorted(label[order], label[order])
    rank = torch.empty_like(order)
    rank[order] = (torch.arange(len(order)) - first).clamp_max(groups - 1)
    return (rank[:, None] - torch.arange(groups)).abs().float()


def _distances(points: Tensor, groups: int, size: int) -> Tensor | None:
    """Squared distances (items, groups) to the centres of clusters of about `size` points; None without features."""
    if groups == 1:
        return torch.zeros(len(points), 1)
    if points.shape[1] == 0:
        return None
    centres = _dense_centres(points, groups, size)
    for _ in range(10):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=groups)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    distances: Tensor = torch.cdist(points, centres)
    return distances.square()


def _dense_centres(points: Tensor, groups: int, size: int) -> Tensor:
    """Initial cluster centres (groups, k).

    These are the means of the densest neighbourhoods of `size` points, leaving out points of earlier ones, then the
    points farthest from all centres.
    """
    distances = torch.cdist(points, points)
    near, members = distances.topk(size, dim=1, largest=False)
    covered = torch.zeros(len(points), dtype=torch.bool)
    chosen: list[Tensor] = []
    for point in near[:, -1].argsort(stable=True).tolist():
        if len(chosen) == groups:
            break
        if not covered[point]:
            covered[members[point]] = True
            chosen.append(points[members[point]].mean(dim=0))
    while len(chosen) < groups:
        gap = torch.cdist(points, torch.stack(chosen)).min(dim=1).values
        chosen.append(points[gap.argmax()])
    return torch.stack(chosen)
