"""Running second moments of the experts of a layer, each of the rows that are routed to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdkit.fitting.metric import Metric
from tdkit.models.hosts.routing import Routing
from tdkit.models.sites import Site

UNSEEN_ROWS = 0.5  # rows that an expert counts for to which no token was routed


class StackSum:
    """A running sum of row^T row for each member of a stack, (members, n, n).

    Args:
        dtype: in which the sum is held, float64 or float32. It is added to in float64 either way; float32 rounds it
            after each batch, by 6e-8 of each entry.
    """

    def __init__(self, members: int, size: int, dtype: torch.dtype = torch.float64) -> None:
        self.members = members
        self.size = size
        self.dtype = dtype
        self.sum: Tensor | None = None
        self.rows = torch.zeros(members, dtype=torch.float64)

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.members * self.size**2

    def add(
        self,
        rows: Tensor,  # (rows, n), those of the first member first
        routing: Routing,
        weight: float = 1.0,
    ) -> None:
        """Add the rows of one batch, each `weight` times; the products are in float32, float64 for float64 rows."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.sum is None:
            self.sum = torch.zeros(self.members, self.size, self.size, dtype=self.dtype, device=rows.device)
        start = 0
        for member, count in enumerate(routing.counts):
            own = rows[start : start + count]
            if count:
                self.sum[member] = self.sum[member].double().add_((own.T @ own).double(), alpha=weight)
            start += count
        self.rows += weight * torch.tensor(routing.counts, dtype=torch.float64)

    def mean(self) -> Tensor | None:
        """Returns the moment of each member per row, `shrunk`, (members, n, n) on the CPU; None without rows.

        It takes the place of the sum, so call it last.
        """
        if self.sum is None or not bool(self.rows.any()):
            return None
        total, self.sum = self.sum.cpu(), None
        pooled = total.sum(0, dtype=torch.float64) / self.rows.sum()
        for member, count in enumerate(self.rows.tolist()):
            total[member] = shrunk(total[member].double() / count, count, pooled) if count else pooled
        return total


def shrunk(
    moment: Tensor,  # (n, n), of `count` rows
    count: float,
    target: Tensor,  # (n, n)
) -> Tensor:  # (n, n)
    """Returns the weighted mean of a measured moment and a `target` that is nearest to the true moment.

    The weight of the target is the expected squared distance of the measured moment from the true one, divided by
    its squared distance from the target; the former is that of normally distributed rows of mean zero.

    Sources: Ledoit and Wolf (2004), section 2; for normally distributed rows, Chen et al. (2010), section 2.
    """
    noise = (moment.square().sum() + moment.trace().square()) / count
    distance = (moment - target).square().sum()
    weight = float((noise / distance).clamp(max=1)) if bool(distance > noise) else 1.0
    return moment.lerp(target, weight)


class StackSums:
    """The sums of one site whose weight is a stack (members, out, in).

    Args:
        limit: bytes above which both sums together are held in float32 instead of float64.
    """

    def __init__(self, site: Site, limit: float = math.inf) -> None:
        members, out, width = site.shape
        dtype = torch.float32 if 8 * members * (width**2 + out**2) > limit else torch.float64
        self.multiply_input = StackSum(members, width, dtype)
        self.multiply_output = StackSum(members, out, dtype)

    def metric(self, units: float) -> Metric | None:
        """Returns the metric of the stack, or None when no token was routed to it.

        The moments of the inputs are multiplied by the rows of each member per unit, so that errors are those per unit.

        Args:
            units: number of tokens or examples that the loss sums over, by weight.
        """
        inputs, outputs = self.multiply_input.mean(), self.multiply_output.mean()
        if inputs is None:
            return None
        rows = self.multiply_input.rows.clamp_min(UNSEEN_ROWS) / units
        return Metric(inputs.mul_(rows[:, None, None]), outputs)

    def observe(
        self, routing: Routing, x: Tensor, y: Tensor, *, mask: Tensor | None, gradients: bool, weight: float = 1.0
    ) -> Tensor:
        """Add the inputs x (rows, in) of one call and, with `gradients`, the gradients of its outputs y (rows, out).

        Args:
            mask: of the tokens, False for padding; ignored where it has another number of tokens than the call.
            weight: of each row.

        Returns:
            y, or a copy that requires a gradient.
        """
        kept, seen = without_padding(routing, mask)

        def real(rows: Tensor) -> Tensor:
            return rows.detach() if kept is None else rows.detach()[kept]

        self.multiply_input.add(real(x), seen, weight)
        if gradients:
            y = y if y.requires_grad else y.detach().clone().requires_grad_()
            y.register_hook(lambda gradient: self.multiply_output.add(real(gradient), seen, weight))  # type: ignore[no-untyped-call]
        return y


def without_padding(routing: Routing, mask: Tensor | None) -> tuple[Tensor | None, Routing]:
    """Returns which rows belong to tokens where `mask` is True, (rows,) bool, and the routing of these.

    Returns None and `routing` without a mask, or where the mask has another number of tokens.
    """
    if mask is None or mask.numel() != routing.of:
        return None, routing
    real = mask.reshape(-1).bool()
    kept = real[routing.tokens]
    members = len(routing.counts)
    member_of = torch.arange(members, device=kept.device).repeat_interleave(
        torch.tensor(routing.counts, device=kept.device)
    )
    counts: list[int] = torch.bincount(member_of[kept], minlength=members).tolist()
    return kept, Routing(routing.tokens[kept], counts, int(real.sum()))
