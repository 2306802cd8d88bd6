"""A first guess of the hidden row and column orders of a permuted sum of Kronecker products.

In ``W[i, j] = A[i1, j1] B[i2, j2]`` the logarithm of the magnitude is a sum, ``log|A[i1, j1]| + log|B[i2, j2]|``.
Once the means of its rows and columns are taken off, the singular vectors of the first part depend on i1 (j1)
only and those of the second on i2 (j2) only, whatever the order of rows and columns. So: take the leading
singular vectors, tell the two kinds apart, group the rows and columns by each. With several terms the
logarithm is no longer a sum, but its main effects still are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.fitting.permutations.assignment import best_assignment
from tdkit.shapes import Shape

FEATURES = 24  # singular vectors that are looked at
MOST_PROJECTORS = 1 << 26  # numbers in explicit projectors
ABOVE_NOISE = 0.8  # of the largest singular value of noise: weaker vectors are dropped
DETECTED = 1.15  # a leading singular value this far above that of noise is no accident
ROTATIONS = 12  # trials of `_partitions`
EXACT_PLACES = 512
ITERATIONS = 6  # of the subspace iteration


@dataclass(frozen=True)
class Embedding:
    """Coordinates of rows and columns in which equal indices of a factor lie close; noise is isotropic in them."""

    rows: Tensor  # (out, k), singular vectors
    columns: Tensor  # (in, k)
    values: Tensor  # (k,) singular values
    excess: float  # the largest singular value over that of noise of the same variance


def log_magnitude(matrix: Tensor) -> Tensor:
    """log(w^2 + s / 10) with s the mean square, so that noise on small entries does not count."""
    square = matrix.square()
    return (square + 0.1 * square.mean() + torch.finfo(matrix.dtype).tiny).log()


def embed(matrix: Tensor, transform: Callable[[Tensor], Tensor] = log_magnitude, count: int = FEATURES) -> Embedding:
    """The leading singular vectors of the transformed matrix without its row and column means."""
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
    """Stages of (row order, column order) guesses, the most promising stage first; none without structure.

    A side that may not be reordered keeps its order, and none is sought: a vocabulary's would not fit in memory.

    Source: ours.
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
) -> Tensor:  # (out,) the row of each place
    """An order of the rows from the order of the columns alone.

    Row (i1, i2), laid out as an (a2, b2) matrix, is ``sum_r outer(A_r[i1], B_r[i2])``: its column space is
    a function of i1 only and its row space of i2 only. Rows are grouped by the projectors onto the two.
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
    """Principal coordinates (items, k) of the projectors onto the spans of (items, n, rank)."""
    if bases.shape[1] == bases.shape[2]:
        return torch.zeros(len(bases), 0)  # the whole space: tells nothing
    if len(bases) * bases.shape[1] ** 2 > MOST_PROJECTORS:
        return _coordinates_by_products(bases)
    projectors = (bases @ bases.mT).flatten(1)
    left, singular, _ = _leading(projectors - projectors.mean(dim=0), min(2 * FEATURES, *projectors.shape))
    coordinates: Tensor = left * singular
    return coordinates.cpu()


def _coordinates_by_products(bases: Tensor) -> Tensor:
    """The same from inner products, <P_i, P_j> = |U_i^T U_j|^2, where the projectors would not fit in memory."""
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
    """Leading singular triplets by subspace iteration. Source: Halko, Martinsson and Tropp (2011), section 4.5."""
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
    """Ways to split the features, rotated, into two that depend on one index each; the clearest first.

    The two indices are independent over the rows (and over the columns), so third moments of features are
    zero unless all three are functions of the same index. An eigenvector of a random contraction of these
    moments is of one kind alone; the moments between the eigenvectors then fall into two blocks.

    Returns:
        pairs of (k, k1) and (k, k2) with orthonormal columns, k1 + k2 = k.
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
    """The split of a graph with the least normalised cut along its second eigenvector, no side above its rank.

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
    """The item of each place (i1, i2) when items are grouped by i1 in one set of features, by i2 in the other."""
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
    """Without features for an index: the rank of the items' norms in their group of the other index."""
    order = scales.argsort(descending=True, stable=True)
    order = order[label[order].argsort(stable=True)]
    first = torch.searchsorted(label[order], label[order])
    rank = torch.empty_like(order)
    rank[order] = (torch.arange(len(order)) - first).clamp_max(groups - 1)
    return (rank[:, None] - torch.arange(groups)).abs().float()


def _distances(points: Tensor, groups: int, size: int) -> Tensor | None:
    """Squared distances (items, groups) to the centres of `groups` clusters of about `size` points each."""
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
    """Means of the tightest balls of `size` points that start outside each other, then of the farthest points."""
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
