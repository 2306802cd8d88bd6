"""The weights of a group once hidden units are removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.decompositions.submatrix import Submatrix
from tdkit.fitting.elimination import refitted
from tdkit.fitting.linalg import working
from tdkit.fitting.metric import Metric, root_and_inverse
from tdkit.models.groups.group import Group, Part
from tdkit.models.swap import Resized


@dataclass(frozen=True, eq=False)
class Problem:
    """The weight of which units are eliminated, with the units as its columns.

    Attributes:
        weight: (out, in) float64; that of the consumer, transposed if the units are its rows.
        metric: of `weight`.
        columns: (units, size) int64.
        basis: (blocks, units of a block, units of a block) float64; unit j of block b is the combination
            ``basis[b, j]`` of the units that the group has. None where they are those themselves.
    """

    weight: Tensor
    metric: Metric
    columns: Tensor
    basis: Tensor | None = None


def problem_of(group: Group, metric: Metric | None) -> Problem:
    """Returns the problem whose solution is the refitted consumer of a group.

    In a group that combines units, those combinations are taken of which the first r are the best r for each r: with C
    the mean of the input moments of the heads that share the units, and M the sum of their W^T S W, the eigenvectors U
    of C^1/2 M C^1/2 give the basis U^T C^-1/2.

    Raises:
        PolicyError: when the weight has NaN or infinite entries.
        CalibrationError: when the metric is that of a weight of another shape.
    """
    metric = metric or Metric()
    metric.check(group.name, group.consumer.site.shape)
    weight = working(finite(group.consumer))
    if group.consumer.axis == 0:
        turned = Metric(metric.ridged_output(), metric.ridged_input())  # ridged as the sides that they are
        return Problem(weight.T, turned, group.consumer.places)
    plain = Problem(weight, metric, group.consumer.places)
    return _combined(plain, group.heads) if group.combines else plain


def _combined(plain: Problem, blocks: int) -> Problem:
    size, shared = len(plain.columns) // blocks, plain.columns.shape[1]
    places = (
        plain.columns.reshape(blocks, size, shared).transpose(1, 2).to(plain.weight.device)
    )  # (blocks, shared, size)
    moment, output = plain.metric.ridged_input(), plain.metric.ridged_output()
    columns = plain.weight[:, places]  # (out, blocks, shared, size)
    weighed = columns if output is None else torch.einsum("op,pbsj->obsj", output.to(columns), columns)
    energy = torch.einsum("obsj,obsk->bjk", columns, weighed)
    inner = torch.eye(size).to(columns).expand(blocks, size, size)
    if moment is not None:
        moment = (moment.diag() if moment.ndim == 1 else moment).to(columns)
        inner = moment[places[..., :, None], places[..., None, :]].mean(1)
    root, inverse = root_and_inverse(inner)
    vectors = torch.linalg.eigh(root @ energy @ root).eigenvectors.flip(-1)
    basis, back = vectors.mT @ inverse, root @ vectors
    weight = plain.weight.clone()
    weight[:, places] = torch.einsum("obsj,bjk->obsk", columns, back)
    change = _block_diagonal(basis, places, plain.weight.shape[1])
    given = plain.metric.input
    if given is not None:
        given = change @ working(given.diag() if given.ndim == 1 else given).to(change) @ change.T
    return Problem(weight, Metric(given, plain.metric.output), plain.columns, basis)


def _block_diagonal(basis: Tensor, places: Tensor, size: int) -> Tensor:
    """The matrix (size, size) that has `basis` at the places of each block and head, and ones elsewhere."""
    change = torch.eye(size).to(basis)
    rows, columns = places[..., :, None], places[..., None, :]
    change[rows, columns] = basis[:, None].expand(*places.shape, places.shape[-1])
    return change


def shrunk(group: Group, units: Tensor, metric: Metric | None = None) -> list[FactorizedMatrix | Resized]:
    """Returns what replaces the sites of a group: their weights without the rows and columns of removed units.

    Args:
        units: (kept,) int64, those that stay, equally many of each head.
        metric: of the consumer, which is refitted in it.

    Raises:
        PolicyError: when a weight has NaN or infinite entries.
    """
    problem = problem_of(group, metric)
    kept = group.consumer.kept(units)
    fitted = refitted(problem.weight, problem.metric, kept)
    made = [_producer(group, part, units, problem.basis) for part in group.producers]
    consumer, weight = group.consumer, group.consumer.site.weight
    if not group.keeps_sizes:
        return [*made, Resized(fitted.to(weight.dtype), consumer.bias)]
    if consumer.axis == 0:
        return [*made, _submatrix(fitted.T, consumer, rows=kept)]
    return [*made, _submatrix(fitted, consumer, columns=kept)]


def masked(group: Group, units: Tensor, metric: Metric | None) -> Resized:
    """Returns what replaces the consumer to compute as if shrunk, with its own size, from all units."""
    problem = problem_of(group, metric)
    kept = group.consumer.kept(units).to(problem.weight.device)
    whole = torch.zeros_like(problem.weight)
    whole[:, kept] = refitted(problem.weight, problem.metric, kept)
    if problem.basis is not None:
        places = group.consumer.places.reshape(group.heads, group.units, -1).transpose(1, 2).to(whole.device)
        whole = whole @ _block_diagonal(problem.basis, places, whole.shape[1])
    whole = whole.T if group.consumer.axis == 0 else whole
    return Resized(whole.to(group.consumer.site.weight.dtype), group.consumer.bias)


def _producer(group: Group, part: Part, units: Tensor, basis: Tensor | None) -> FactorizedMatrix | Resized:
    weight, rows = finite(part), part.kept(units)
    if not group.keeps_sizes:
        rows = rows.to(weight.device)
        return Resized(weight[rows], None if part.bias is None else part.bias.detach()[rows])
    weight = working(weight)
    if basis is not None:
        weight = (basis.to(weight) @ weight.reshape(len(basis), -1, weight.shape[1])).reshape(weight.shape)
    return _submatrix(weight[rows.to(weight.device)], part, rows=rows)


def _submatrix(
    small: Tensor, part: Part, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> FactorizedMatrix:
    kind = Submatrix(rows=None if rows is None else len(rows), columns=None if columns is None else len(columns))
    return kind.holding(small, part.site.shape, rows, columns, part.site.weight)


def finite(part: Part) -> Tensor:
    """Returns the weight of a part.

    Raises:
        PolicyError: when it has NaN or infinite entries.
    """
    return part.site.finite_weight()
