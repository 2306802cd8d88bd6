"""Elimination of the inputs of a weight, one unit after another, while those that stay take over what they can."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdkit.fitting.linalg import working
from tdkit.fitting.metric import Metric, factor_and_inverse, times_left
from tdkit.support.threads import threads_for

BLOCK = 16  # units removed between two updates; blocks of 4, 8 and 16 differ by less than 0.01% in the error


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which the units of a weight are removed, and the error of each number of them.

    Attributes:
        order: (heads * units,) int64, the first to be removed first; the units of one head are neighbours in number.
        errors: (units + 1,) float64; entry k is tr(S E C E^T) without the first k units of each head, the other columns
            refitted.
        heads: how many heads keep equally many units.
    """

    order: Tensor
    errors: Tensor
    heads: int = 1

    def kept(self, units: int) -> Tensor:
        """Returns which units stay if `units` of each head do, ascending, int64."""
        return self.order[len(self.order) - units * self.heads :].sort().values

    def error(self, units: int) -> float:
        """Returns tr(S E C E^T) if `units` units of each head stay."""
        return float(self.errors[len(self.errors) - 1 - units])


def eliminate(
    weight: Tensor, metric: Metric, columns: Tensor | None = None, *, heads: int = 1, block: int = BLOCK
) -> Elimination:
    """Remove the units of a weight one block after another, always those that raise the error least.

    With V = F W for F^T F = S, and P = C^-1 of the units that are left, removing the columns J of a unit and
    refitting the others adds tr(V_J P_JJ^-1 V_J^T) to tr(S E C E^T). The `block` cheapest units are removed; then
    V -= V_J P_JJ^-1 P_J: and P -= P_:J P_JJ^-1 P_J:. The sum of these costs is exactly the error of the refit.

    Args:
        weight: W (out, in), any float dtype.
        metric: C and S; an absent one is the identity.
        columns: (units, size) int64, the columns of each unit; each column belongs to at most one of them, those of no
            unit stay. Each column is a unit when None.
        heads: that lose equally many units: the k-th of each head, in the order in which a head would lose its own, go
            together.
        block: units removed between two updates of the costs.

    Source: optimal brain surgery, Hassibi and Stork (1993), section 3, of groups of weights and in a two-sided metric;
    Frantar and Alistarh, Optimal Brain Compression (2022), section 4.
    """
    left = _Left.of(weight, metric, columns)
    whole = replace(left) if heads > 1 else None  # two matrices of the size of C are large in an MLP
    order: list[Tensor] = []
    costs: list[Tensor] = []
    with threads_for(weight.numel()):
        while len(left.units):
            cheapest = left.costs().argsort(stable=True)[:block]
            order.append(left.units[cheapest])
            costs.append(left.remove(cheapest))
        if whole is not None:
            return _in_order(whole, torch.cat(order), heads)
    return _with_errors(torch.cat(order), torch.cat(costs))


def in_order(
    weight: Tensor, metric: Metric, order: Tensor, columns: Tensor | None = None, *, heads: int = 1
) -> Elimination:
    """Returns the errors if the units are removed in a given order, (units,) int64; the rest as in `eliminate`."""
    left = _Left.of(weight, metric, columns)
    with threads_for(weight.numel()):
        return _in_order(left, order.cpu(), heads)


def _in_order(left: _Left, order: Tensor, heads: int) -> Elimination:
    order = _by_head(order, heads)
    costs = left.remove(order.to(left.units.device))
    return _with_errors(order, costs.reshape(-1, heads).sum(1), heads)


def _by_head(order: Tensor, heads: int) -> Tensor:
    """Returns the first unit of each head, then the second of each, and so on; each head's in the order given."""
    head = order // (len(order) // heads)
    return torch.stack([order[head == number] for number in range(heads)], 1).flatten()


def refitted(weight: Tensor, metric: Metric, kept: Tensor) -> Tensor:
    """The columns `kept` of W, changed to take over what they can of the removed: W C_:K C_KK^-1, (out, kept), float64.

    That minimises tr(S E C E^T) for every S.

    Args:
        weight: W (out, in), any float dtype.
        metric: its C; the identity, for which nothing changes, when absent.
        kept: (kept,) int64.
    """
    weight, moment = working(weight), metric.ridged_input()
    kept = kept.to(weight.device)
    if moment is None or moment.ndim == 1 or not len(kept):
        return weight[:, kept]
    moment = moment.to(weight.device)
    gone = _others(weight.shape[1], kept)
    with threads_for(weight.numel()):
        taken_over = torch.cholesky_solve(moment[kept][:, gone], torch.linalg.cholesky(moment[kept][:, kept]))
        return weight[:, kept] + weight[:, gone] @ taken_over.T


def leverage_scores(moment: Tensor, ridge: float = 1.0) -> Tensor:
    """The ridge leverage score of each input, the diagonal of C (C + ridge I)^-1, (in,) float64.

    Args:
        moment: C (in, in), the sum over tokens as published.

    Source: Lin et al., MoDeGPT (2024), section 3.2 and algorithm 1.
    """
    moment = working(moment)
    raised = moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(raised))
    return 1 - ridge * inverse.diagonal()


@dataclass
class _Left:
    """What is left of a weight while units are removed.

    Attributes:
        values: V = F W, with F^T F = S, of the columns of the units that are left, (out, columns).
        inverse: the block of C^-1, for all columns that are left, that belongs to those of the units.
        units: the numbers of the units that are left; those of their columns are `size` neighbours each.
        size: columns per unit.
    """

    values: Tensor
    inverse: Tensor
    units: Tensor
    size: int

    @classmethod
    def of(cls, weight: Tensor, metric: Metric, columns: Tensor | None) -> _Left:
        weight = working(weight)
        if columns is None:
            columns = torch.arange(weight.shape[1])[:, None]
        places = columns.flatten().to(weight.device)
        output = metric.ridged_output()
        root = None if output is None else factor_and_inverse(output.to(weight.device))[0]
        values = times_left(root, weight[:, places])
        return cls(values, _inverse(metric, places, weight), torch.arange(len(columns)), columns.shape[1])

    def costs(self) -> Tensor:
        """What removing each unit alone adds to the error, (units,)."""
        count, size = len(self.units), self.size
        if size == 1:
            return self.values.square().sum(0) / self.inverse.diagonal()
        blocks = self.inverse.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        values = self.values.reshape(-1, count, size).permute(1, 2, 0)  # (units, size, out)
        whitened: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), values, upper=False)
        return whitened.square().sum((1, 2))

    def remove(self, which: Tensor) -> Tensor:
        """Remove the units at some places; returns what each adds to the error, one after the other."""
        spread = torch.arange(self.size, device=which.device)
        gone = (which[:, None] * self.size + spread).flatten().to(self.values.device)
        lower = torch.linalg.cholesky(self.inverse[gone][:, gone])
        values: Tensor = torch.linalg.solve_triangular(lower, self.values[:, gone].T, upper=False)  # (gone, out)
        stay = _others(self.values.shape[1], gone)
        rows = torch.linalg.solve_triangular(lower, self.inverse[gone][:, stay], upper=False)  # (gone, stay)
        self.values = self.values[:, stay].addmm_(values.T, rows, alpha=-1)
        self.inverse = self.inverse[stay][:, stay].addmm_(rows.T, rows, alpha=-1)
        self.units = self.units[_others(len(self.units), which.to(self.units.device))]
        return values.square().sum(1).reshape(-1, self.size).sum(1).cpu()


def _inverse(metric: Metric, places: Tensor, weight: Tensor) -> Tensor:
    """The rows and columns `places` of C^-1."""
    moment = metric.ridged_input()
    if moment is None or moment.ndim == 1:
        diagonal = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device) if moment is None else moment
        return (1 / diagonal.to(weight.device))[places].diag()
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(moment.to(weight.device)))
    return inverse[places][:, places]


def _others(count: int, places: Tensor) -> Tensor:
    """The numbers below `count` that are not in `places`, ascending."""
    mask = torch.ones(count, dtype=torch.bool, device=places.device)
    mask[places] = False
    return mask.nonzero().flatten()


def _with_errors(order: Tensor, costs: Tensor, heads: int = 1) -> Elimination:
    return Elimination(order, torch.cat([costs.new_zeros(1), costs.cumsum(0)]), heads)
