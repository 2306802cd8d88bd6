"""Running second moments of the inputs of a model's layers and of the gradients of their outputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdkit.calibration.stacks import StackSums
from tdkit.errors import CalibrationError
from tdkit.fitting.metric import Metric
from tdkit.models.hosts.base import Observer, Removable
from tdkit.models.hosts.routing import Routing
from tdkit.models.sites import Site, User
from tdkit.support.compatibility import parameters_of, version_of

DIAGONAL_ABOVE = 16384  # a longer side (a vocabulary) keeps only the diagonal of its moment

Row = Tensor  # (tokens, features)


class SharingBrokeError(Exception):
    """Layers that shared one input tensor on the first batch had different inputs on a later batch."""


class SideSum:
    """A running sum of row^T row in float64: a matrix (n, n), or for large n its diagonal (n,)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.diagonal = size > DIAGONAL_ABOVE
        self.sum: Tensor | None = None
        self.count = 0.0  # of rows, by weight
        self._mean: Tensor | None = None

    @property
    def bytes(self) -> int:
        return 8 * self.size * (1 if self.diagonal else self.size)

    def add(
        self,
        rows: Row,  # (tokens, n)
        weight: float = 1.0,
    ) -> None:
        """Add the rows of one batch, each `weight` times.

        The product is in float32 (float64 for float64 rows), the sum in float64.
        The rounding error is about 1e-7 of the largest moment, less than the lower bound that `Metric` sets
        for eigenvalues.
        """
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self._add(rows.square().sum(0) if self.diagonal else rows.T @ rows, len(rows), weight)

    def add_ids(
        self,
        ids: Tensor,  # (tokens,) below n
        weight: float = 1.0,
    ) -> None:
        """Add one-hot rows given by their indices; their moment is the diagonal matrix of counts."""
        self.diagonal = True
        self._add(torch.bincount(ids, minlength=self.size), len(ids), weight)

    def _add(self, moment: Tensor, count: int, weight: float) -> None:
        moment = moment.double()
        self.sum = moment.mul_(weight) if self.sum is None else self.sum.add_(moment, alpha=weight)
        self.count += weight * count

    def mean(self, units: float | None = None) -> Tensor | None:
        """Returns the sum by `units`, or per row; float64 on the CPU. None without rows, and frees the sum."""
        if self.sum is not None and self.count:
            self._mean = self.sum.div_(units or self.count).cpu()
            self.sum = None
        return self._mean


class GradientSum:
    """Running sums of G G^T and G^T G for the gradients G (out, in) of a weight, one per batch.

    They take the place of the rows of a weight whose products are not seen. The nearest Kronecker product to the
    second moment of vec(G) has the factors E[G^T G] and E[G G^T] up to a scale, which is chosen so that the trace is
    exact. It is the Fisher matrix if the gradients of different examples are independent.

    Sources: Martens and Grosse, K-FAC (2015), section 3; Gupta, Koren and Singer, Shampoo (2018), section 3.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = SideSum(rows)
        self.columns = SideSum(columns)
        self.pending: Tensor | None = None  # of the current batch

    def add(self, gradient: Tensor) -> None:  # (out, in)
        """Add to the gradient of the current batch."""
        gradient = gradient.detach()
        self.pending = gradient.clone() if self.pending is None else self.pending + gradient

    def end_batch(self, weight: float = 1.0) -> None:
        if self.pending is not None:
            self.rows.add(self.pending.T, weight)
            self.columns.add(self.pending, weight)
            self.pending = None

    def metric(self, units: float) -> Metric | None:
        """Returns the metric, or None without gradients."""
        if self.columns.sum is None:
            return None
        energy = _trace(self.columns.sum)
        inner, outer = self.columns.sum / energy if energy > 0 else self.columns.sum, self.rows.sum
        assert outer is not None
        return Metric(inner.cpu(), (outer / units).cpu())


class SiteSums:
    """The sums of one site: for layers that multiply by its weight, that look up its rows, and that do neither."""

    def __init__(self, site: Site, inputs: SideSum | None = None) -> None:
        out, width = site.shape[0], math.prod(site.shape[1:])
        self.multiply_input = inputs or SideSum(width)
        self.multiply_output = SideSum(out)
        self.lookup_rows = SideSum(out)
        self.lookup_output = SideSum(width)
        self.gradient = GradientSum(out, width)
        self.products = 0.0  # rows that were multiplied, by weight

    def metric(self, units: float) -> Metric | None:
        """Returns the metric of the site, or None when its layers were never called.

        Args:
            units: number of tokens or examples that the loss sums over, by weight. Sums of gradients are divided by
                it, so that layers with different numbers of rows have errors in the same unit.
        """
        uses = [
            (self.multiply_input.mean(), self.multiply_output.mean(units)),
            (self.lookup_output.mean(units), self.lookup_rows.mean()),
        ]
        known = [Metric(inner, outer) for inner, outer in uses if inner is not None or outer is not None]
        if not known:
            return self.gradient.metric(units)
        return _joined(*known) if len(known) == 2 else known[0]


def _joined(first: Metric, second: Metric) -> Metric:
    """Returns one metric for the two uses of a tied weight, as a multiplier and as a look-up table.

    The sum of the Kronecker products O1 x I1 + O2 x I2 is not a Kronecker product, so it is approximated: each side
    is a weighted sum of the moments of both uses, and the trace equals that of the exact sum.
    """
    width = next(m.input for m in (first, second) if m.input is not None).shape[0]
    inputs = [torch.ones(width, dtype=torch.float64) if m.input is None else m.input for m in (first, second)]
    height = next(m.output for m in (first, second) if m.output is not None).shape[0]
    outputs = [torch.ones(height, dtype=torch.float64) if m.output is None else m.output for m in (first, second)]
    if any(m.input is None or m.output is None for m in (first, second)):  # the units differ: equal shares
        inputs = [moment / _trace(moment) for moment in inputs]
        outputs = [moment / _trace(moment) for moment in outputs]
    traces = [_trace(moment) for moment in inputs]
    shares = [trace * _trace(moment) for trace, moment in zip(traces, outputs, strict=True)]
    whole = sum(shares)
    if whole <= 0:
        return Metric(inputs[0], outputs[0])
    joined_input = _sum([m * (share / whole / t) for m, share, t in zip(inputs, shares, traces, strict=True) if t > 0])
    joined_output = _sum([m * t for m, t in zip(outputs, traces, strict=True)])
    return Metric(joined_input, joined_output)


def _sum(moments: Sequence[Tensor]) -> Tensor:
    if any(m.ndim == 2 for m in moments):
        moments = [m if m.ndim == 2 else torch.diag(m) for m in moments]
    return torch.stack(list(moments)).sum(0)


def _trace(moment: Tensor) -> float:
    return float(moment.sum() if moment.ndim == 1 else moment.diagonal().sum())


class Recorder:
    """Forward hooks on the layers of some sites that accumulate the moments while the model runs.

    Args:
        sites: the sites to record.
        gradients: also record the gradients of the outputs; the caller runs the backward pass.
        unseen: names of sites whose products may not be seen: the gradients of their weights are recorded as well.
        shared: maps a site name to that of the site with the same input tensor, whose moment is computed only once.
        limit: bytes above which the moments of one stack are held in float32.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        gradients: bool,
        shared: Mapping[str, str] | None = None,
        unseen: Collection[str] = (),
        limit: float = math.inf,
    ) -> None:
        self.sites = sites
        self.unseen = unseen if gradients else ()
        self.units = 0.0  # by weight
        self.gradients = gradients
        self.shared = shared or {}
        self.sums: dict[str, SiteSums] = {}
        self.stacks: dict[str, StackSums] = {}
        for site in sites:
            if site.stacked:
                self.stacks[site.name] = StackSums(site, limit)
                continue
            leader = self.sums.get(self.shared.get(site.name, ""))
            self.sums[site.name] = SiteSums(site, leader.multiply_input if leader else None)
        self.mask: Tensor | None = None  # (batch, length) of the current batch; False for padding
        self.weight = 1.0  # of the current batch
        self._last: dict[str, tuple[Tensor, int]] = {}

    def metrics(self) -> dict[str, Metric]:
        """Returns the metric of each site that was called, by site name.

        Raises:
            CalibrationError: when a moment is NaN or infinite.
        """
        units, sums = self.units or 1, self.sums | self.stacks
        found = {site.name: sums[site.name].metric(units) for site in self.sites}
        known = {name: metric for name, metric in found.items() if metric is not None}
        for name, metric in known.items():
            for what, moment in (("inputs", metric.input), ("output gradients", metric.output)):
                if moment is not None and not bool(torch.isfinite(moment).all()):
                    raise CalibrationError(
                        f"{name}: the second moment of its {what} is NaN or infinite on the calibration batches: find "
                        "the layer that overflows, or calibrate in float32"
                    )
        return known

    def overflowing(self) -> str | None:
        """Returns the name of the first site whose inputs have been NaN, infinite or too large to square, or None."""
        for name, sums in self.sums.items():
            total = sums.multiply_input.sum
            if total is not None and not bool(torch.isfinite(total).all()):
                return name
        return None

    def rows(self) -> dict[str, float]:
        """Returns the rows that each site multiplied per token or example, by site name; 0 for a look-up."""
        found: dict[str, float] = {name: sums.products for name, sums in self.sums.items()}
        found |= {name: float(sums.multiply_input.rows.sum()) for name, sums in self.stacks.items()}
        return {name: count / (self.units or 1) for name, count in found.items()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context manager inside which the hooks are registered."""
        handles: list[Removable] = []
        try:
            for site in self.sites:
                for user in distinct_users(site):
                    handles.append(self._attach(site, user))
                if site.name in self.unseen and not site.stacked:
                    handles += self._gradient_handles(site)
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last.clear()

    def begin_batch(self, mask: Tensor | None, weight: float) -> None:
        """Set the mask and the weight of the batch that the model runs on next."""
        self.mask, self.weight = mask, weight

    def end_batch(self, units: int) -> None:
        """Add the gradients of weights of one batch with `units` tokens or examples."""
        self.units += self.weight * units
        for name in self.unseen:
            if name in self.sums:
                self.sums[name].gradient.end_batch(self.weight)

    def gradients_of(self, name: str) -> float:
        """Returns how many rows of gradients of a weight have been added, for a site whose products are not seen."""
        return self.sums[name].gradient.rows.count if name in self.sums else 0.0

    def _gradient_handles(self, site: Site) -> Iterator[Removable]:
        total = self.sums[site.name].gradient
        seen: set[int] = set()  # parameters: one observer serves all users of a shared one
        for user in distinct_users(site):
            parameter = parameters_of(user.module).get(user.weight)
            if parameter is not None and id(parameter) in seen:
                continue
            seen.add(id(parameter))

            def add(gradient: Tensor, user: User = user) -> None:
                total.add(user.host.canonical(gradient, user.weight).flatten(1))

            yield user.host.attach_gradient(user.module, user.weight, add)

    def _attach(self, site: Site, user: User) -> Removable:
        if not site.stacked:
            observe = self._observer(site, looks_up=user.multiplications == 0)
            return user.host.attach(user.module, user.weight, observe)
        sums = self.stacks[site.name]

        def observe_stack(routing: Routing, x: Tensor, y: Tensor) -> Tensor:
            return sums.observe(routing, x, y, mask=self.mask, weight=self.weight, gradients=self.gradients)

        return user.host.attach_stack(user.module, user.weight, observe_stack)

    def _observer(self, site: Site, *, looks_up: bool) -> Observer:
        sums = self.sums[site.name]

        def observe(x: Tensor, y: Tensor) -> Tensor:
            x, weight = x.detach(), self.weight
            mask = self.mask if self.mask is not None and x.shape[:2] == self.mask.shape else None
            if looks_up:
                sums.lookup_rows.add_ids((x if mask is None else x[mask]).reshape(-1), weight)
            else:
                sums.products += weight * (y.numel() // y.shape[-1] if mask is None else int(mask.sum()))
                if not self._follows(site.name, x):
                    sums.multiply_input.add(token_rows(x, mask), weight)
            if not self.gradients:
                return y
            if not y.requires_grad:
                with torch.enable_grad():  # no leaf: the next layer may change it in place
                    y = y.detach().requires_grad_().clone()
            side = sums.lookup_output if looks_up else sums.multiply_output
            y.register_hook(lambda gradient: side.add(token_rows(gradient.detach(), mask), weight))  # type: ignore[no-untyped-call]
            return y

        return observe

    def _follows(self, name: str, x: Tensor) -> bool:
        """Returns whether `x` was already added, for the site that shares its input with `name`."""
        leader = self.shared.get(name)
        if leader is None or leader not in self.sums:
            if name in self.shared.values():
                self._last[name] = (x, _version(x))
            return False
        seen, version = self._last.get(leader, (None, -1))
        if seen is None or not same_tensor(seen, x) or version != _version(x):
            raise SharingBrokeError(name)
        return True


def _version(x: Tensor) -> int:
    """Returns the version counter of x, or -1 for inference tensors, which have none: only addresses are compared."""
    return -1 if x.is_inference() else version_of(x)


def token_rows(x: Tensor, mask: Tensor | None) -> Row:
    """Flatten `x` (batch, length, n) to (tokens, n), without the tokens where `mask` (batch, length) is False."""
    mask = mask if mask is not None and x.shape[:2] == mask.shape else None
    return (x if mask is None else x[mask]).reshape(-1, x.shape[-1])


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors have the same address, shape, strides and dtype."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


@dataclass
class Reach:
    """Which sites one run of the model called.

    Attributes:
        sites: sites whose layers were called.
        others: sites whose layers were not called.
        shared: maps the name of a site to that of an earlier site that multiplied the same input tensor.
    """

    sites: list[Site] = field(default_factory=list)
    others: list[Site] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)


@contextmanager
def reaching(sites: Sequence[Site]) -> Iterator[Reach]:
    """A context manager that finds which sites are called, and which of them share an input, while the model runs once.

    The `Reach` it yields is filled in when the block ends.
    """
    calls: dict[str, list[Tensor]] = {site.name: [] for site in sites}  # kept alive: no address is reused
    handles = []

    def observer(name: str) -> Observer:
        def observe(x: Tensor, y: Tensor) -> Tensor:
            calls[name].append(x.detach())
            return y

        return observe

    reach = Reach()
    try:
        for site in sites:
            for user in distinct_users(site):
                handles.append(user.host.attach(user.module, user.weight, observer(site.name)))
        yield reach
    finally:
        for handle in handles:
            handle.remove()
    reach.sites = [site for site in sites if calls[site.name]]
    reach.others = [site for site in sites if not calls[site.name]]
    leaders: dict[tuple[int, ...], str] = {}
    for site in reach.sites:
        x = calls[site.name][0]
        if len(calls[site.name]) == 1 and site.users[0].multiplications and x.numel():
            leader = leaders.setdefault((x.data_ptr(), _version(x), *x.shape), site.name)
            if leader != site.name:
                reach.shared[site.name] = leader


def distinct_users(site: Site) -> list[User]:
    """Returns the users of a site; a layer with several names appears once."""
    return list({id(user.module): user for user in site.users}.values())


@dataclass(frozen=True)
class Pass:
    """The sites whose moments are measured together, in one pass over the batches.

    Attributes:
        sites: the sites.
        bytes: of their moments.
    """

    sites: list[Site]
    bytes: int


def passes_within(sites: Sequence[Site], shared: Mapping[str, str], gradients: bool, limit: float) -> list[Pass]:
    """Split sites, in order, into passes whose moments take at most `limit` bytes, or one site that takes more."""
    found: list[Pass] = []
    for site in sites:
        sums = StackSums(site, limit) if site.stacked else SiteSums(site)
        alone = sums.multiply_input.bytes + gradients * sums.multiply_output.bytes
        more = alone - (sums.multiply_input.bytes if site.name in shared else 0)
        last = found[-1] if found else None
        if last is None or last.bytes + more > limit:
            found.append(Pass([site], alone))
        else:
            found[-1] = Pass([*last.sites, site], last.bytes + more)
    return found
