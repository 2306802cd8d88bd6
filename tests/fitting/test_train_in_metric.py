"""Fits in a calibrated metric: closed forms against brute force, L-BFGS runs, and degenerate moments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tdkit import Decomposition, Kronecker, LowRank, Metric, PermutedKronecker, TTMatrix
from tdkit.errors import CalibrationError
from tdkit.fitting.kronecker_moments import along_modes, product_moments
from tdkit.fitting.lbfgs import minimise
from tdkit.fitting.low_rank import squared_singular_values, truncated_in_metric
from tdkit.fitting.metric import ridged, root_and_inverse
from tdkit.fitting.tensor_train import bond_balanced, truncated_train, tt_matrix, tt_pullback, tt_svd
from tdkit.fitting.train_in_metric import fit_train, kronecker_in_metric, whitened_problem
from tests.benchmarks.fits import long_lbfgs
from tests.fitting.moments import moment, random

KINDS: tuple[Decomposition, ...] = (LowRank(), Kronecker(), PermutedKronecker(), TTMatrix())


def metric_for(m: int, n: int) -> Metric:
    return Metric(moment(n, 1), moment(m, 2))


def test_low_rank_reaches_the_brute_force_optimum() -> None:
    weight, metric = random(5, 7, seed=3), metric_for(5, 7)
    left, right = truncated_in_metric(weight, 2, metric)
    ours = metric.squared_error(weight - left @ right)

    def from_random(seed: int) -> float:
        start = LowRank(rank=2).empty((5, 7), dtype=torch.float64)
        start.load_state_dict({"left": random(5, 2, seed=seed), "right": random(2, 7, seed=seed + 50)})
        return long_lbfgs(start, weight, metric, 60)

    found = min(from_random(seed) for seed in range(3))
    assert ours <= found * (1 + 1e-9)
    assert ours == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
@pytest.mark.parametrize("sides", ["both", "input", "output", "diagonal"])
def test_low_rank_keeps_the_leading_singular_values_of_the_whitened_weight(shape: tuple[int, int], sides: str) -> None:
    weight, c, s = random(*shape), moment(shape[1], 1), moment(shape[0], 2)
    metric = {
        "both": Metric(c, s),
        "input": Metric(input=c),
        "output": Metric(output=s),
        "diagonal": Metric(c.diagonal(), s.diagonal()),
    }[sides]
    left, right = truncated_in_metric(weight, 3, metric)
    squares = squared_singular_values(weight, metric)
    assert metric.squared_error(weight - left @ right) == pytest.approx(float(squares[3:].sum()), rel=1e-7)
    assert metric.squared_error(weight) == pytest.approx(float(squares.sum()), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "metric",
    [
        Metric(torch.zeros(12, 12), torch.zeros(10, 10)),
        Metric(moment(12, 1, samples=2), moment(10, 2, samples=1)),
        Metric(moment(12, 1) * 1e-30, moment(10, 2) * 1e-30),
        Metric(torch.tensor([1.0] + [0.0] * 11), torch.tensor([0.0] * 9 + [5.0])),
        Metric(moment(12, 1).float(), None),
    ],
    ids=["zero", "rank one", "tiny", "one token", "float32"],
)
def test_degenerate_moments_do_no_harm(kind: Decomposition, metric: Metric) -> None:
    weight = random(10, 12)
    choice = kind.complete((10, 12), 80)
    assert choice is not None
    dense = choice.fit(weight, metric).dense().detach()
    assert bool(torch.isfinite(dense).all())
    plain = metric.squared_error(weight - choice.fit(weight).dense().detach())
    assert metric.squared_error(weight - dense) <= plain * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_told(kind: Decomposition, side: str, value: float) -> None:
    broken = moment(12, 1)
    broken[3, 3] = value
    message = "a second moment of 12 features holds NaN or infinite values: calibrate on batches whose activations"
    with pytest.raises(CalibrationError, match=message):
        kind.candidates((12, 12))[0].fit(random(12, 12), Metric(**{side: broken}))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (7, 11), (13, 13), (1, 1), (24, 36)])
def test_zero_weights_and_any_shape(kind: Decomposition, shape: tuple[int, int]) -> None:
    metric = metric_for(*shape)
    choice = kind.candidates(shape)[0]
    zero = choice.fit(torch.zeros(shape), metric).dense().detach()
    assert float(zero.abs().max()) <= 1e-12
    weight = random(*shape)
    error, plain = (metric.squared_error(weight - choice.fit(weight, m).dense().detach()) for m in (metric, None))
    assert error <= plain * (1 + 1e-9) + 1e-12 * metric.squared_error(weight)
    assert error < metric.squared_error(weight)  # the error of the zero matrix


@pytest.mark.parametrize("diagonal", [False, True])
def test_product_moments_find_a_product(diagonal: bool) -> None:
    parts = [moment(3, 1), moment(4, 2), moment(2, 3)]
    if diagonal:
        parts = [part.diagonal() for part in parts]
    whole = torch.kron(torch.kron(parts[0], parts[1]), parts[2])
    first, second, third = product_moments(whole, (3, 4, 2))
    assert torch.allclose(
        torch.kron(torch.kron(first, second), third), whole, rtol=1e-3, atol=1e-6 * float(whole.max())
    )


def test_along_modes_is_a_kronecker_product() -> None:
    parts, matrix = [random(3, 3), random(2, 2, seed=1), random(4, 4, seed=2)], random(24, 5, seed=3)
    dense = torch.kron(torch.kron(parts[0], parts[1]), parts[2])
    assert torch.allclose(along_modes(matrix, parts), dense @ matrix)


def test_whitening_keeps_the_objective() -> None:
    weight, metric = random(10, 9), metric_for(10, 9)
    out_modes, in_modes = (3, 4), (5, 2)  # padded on both sides
    cores = tt_svd(weight, (1, 3, 1), out_modes, in_modes)
    problem = whitened_problem(weight, metric, out_modes, in_modes)
    error = metric.squared_error(weight - tt_matrix(cores)[:10, :9])
    assert problem.error(problem.whiten(cores)) == pytest.approx(error, rel=1e-9)
    assert torch.allclose(tt_matrix(problem.unwhiten(problem.whiten(cores))), tt_matrix(cores))


def test_a_product_metric_is_solved_in_closed_form() -> None:
    c, s = (moment(3, 1), moment(4, 2)), (moment(2, 3), moment(5, 4))
    metric, weight = Metric(torch.kron(*c), torch.kron(*s)), random(10, 12)
    closed = kronecker_in_metric(weight, metric, (2, 3), (5, 4), 2, steps=0)
    refined = kronecker_in_metric(weight, metric, (2, 3), (5, 4), 2)
    errors = [metric.squared_error(weight - sum(map(torch.kron, *pair))) for pair in (closed, refined)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_pullback_is_the_gradient(count: int) -> None:
    cores = [random(1 if k == 0 else 3, 2, 3, 1 if k == count - 1 else 3, seed=k) for k in range(count)]
    slope = random(2**count, 3**count, seed=9)
    leaves = [core.requires_grad_() for core in cores]
    expected = torch.autograd.grad((tt_matrix(leaves) * slope).sum(), leaves)
    for ours, true in zip(tt_pullback(cores, slope), expected, strict=True):
        assert torch.allclose(ours, true)


def test_balancing_keeps_the_train_and_orders_its_bonds() -> None:
    weight = random(24, 30)
    cores = tt_svd(weight, (1, 10, 8, 1), (4, 3, 2), (5, 3, 2))
    balanced, spectra = bond_balanced(cores)
    assert torch.allclose(tt_matrix(balanced), tt_matrix(cores))
    for k, values in enumerate(spectra):
        assert torch.allclose(values, values.sort(descending=True).values)
        before, after = contracted(balanced[: k + 1]), contracted(balanced[k + 1 :])
        left, right = before.reshape(-1, len(values)), after.reshape(len(values), -1)
        assert torch.allclose(left.T @ left, values.diag(), atol=1e-9)
        assert torch.allclose(right @ right.T, values.diag(), atol=1e-9)
    smaller = truncated_train(balanced, (1, 4, 3, 1))
    assert [tuple(core.shape) for core in smaller] == [(1, 4, 5, 4), (4, 3, 3, 3), (3, 2, 2, 1)]
    for core, whole in zip(smaller, balanced, strict=True):
        assert torch.equal(core, whole[: len(core), :, :, : core.shape[3]])


def contracted(cores: list[Tensor]) -> Tensor:
    """The contracted cores, (first rank, product of modes, last rank)."""
    train = cores[0].flatten(1, 2)
    for core in cores[1:]:
        train = torch.einsum("amb,bijc->amijc", train, core).flatten(1, 3)
    return train


def test_minimise_descends_a_hard_quadratic() -> None:
    curvature = torch.logspace(0, 4, 30, dtype=torch.float64)
    target = random(30)

    def quadratic(x: Tensor) -> tuple[float, Tensor]:
        gradient = curvature * (x - target)
        return float((x - target) @ gradient) / 2, gradient

    found = minimise(
        quadratic, torch.zeros(30).double(), scale=torch.ones(30).double(), first_step=1, max_steps=300, tolerance=0
    )
    assert all(after <= before for before, after in zip(found.values, found.values[1:], strict=False))
    assert found.values[-1] <= 1e-8 * found.values[0]
    assert torch.allclose(found.point, target, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: kind.name)
def test_within_one_percent_of_a_long_lbfgs_from_the_plain_fit(kind: Decomposition) -> None:
    shape = (32, 48)
    weight, metric = random(*shape), metric_for(*shape)
    choice = kind.complete(shape, int(0.6 * weight.numel()))
    assert choice is not None
    plain = choice.fit(weight)
    ours = metric.squared_error(weight - choice.fit(weight, metric).dense().detach())
    long = long_lbfgs(plain, weight, metric, 500)
    assert ours <= 1.01 * long


@pytest.mark.parametrize("choice", [Kronecker(terms=8, a=(4, 8), b=(8, 6)), TTMatrix(ranks=8)], ids=lambda k: k.name)
def test_square_factors_too_are_within_one_percent_of_a_long_lbfgs(choice: Decomposition) -> None:
    weight, metric = random(32, 48), metric_for(32, 48)
    ours = metric.squared_error(weight - choice.fit(weight, metric).dense().detach())
    assert ours <= 1.01 * long_lbfgs(choice.fit(weight), weight, metric, 500)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 18), (16, 16)])
def test_permuted_is_never_worse_than_kronecker(shape: tuple[int, int]) -> None:
    metric = metric_for(*shape)
    weight = random(*shape)
    fixed = Kronecker().complete(shape, weight.numel() // 2)
    assert fixed is not None
    free = PermutedKronecker(terms=fixed.terms, a=fixed.a, b=fixed.b)
    errors = [metric.squared_error(weight - kind.fit(weight, metric).dense().detach()) for kind in (free, fixed)]
    assert errors[0] <= errors[1] * (1 + 1e-9)


@pytest.mark.slow
def test_permuted_finds_a_planted_order_in_the_metric() -> None:
    planted = torch.kron(random(6, 6), random(6, 6, seed=1))
    rows = torch.randperm(36, generator=torch.Generator().manual_seed(2))
    weight, metric = planted[rows], metric_for(36, 36)
    kind = PermutedKronecker(terms=1, a=(6, 6), b=(6, 6))
    fitted = kind.fit(weight, metric)
    assert metric.relative_error(weight, fitted.dense().detach()) < 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_points_on_the_curve_are_reached(kind: Decomposition) -> None:
    shape = (24, 36)
    weight, metric = random(*shape), metric_for(*shape)
    size = metric.squared_error(weight)
    points = kind.curve(weight, metric)
    assert len(points) >= 4
    for before, after in itertools.pairwise(points):
        assert before.params < after.params
        assert before.error > after.error
    for point in points[:: max(1, len(points) // 5)]:
        assert point.params == point.decomposition.num_params(shape) < weight.numel()
        reached = metric.squared_error(weight - point.decomposition.fit(weight, metric).dense().detach())
        assert reached <= 1.15 * point.error + 1e-9 * size
        assert isinstance(kind, PermutedKronecker) or reached >= 0.7 * point.error


def test_fits_are_deterministic_and_leave_the_moments_alone() -> None:
    weight, metric = random(24, 36).float(), metric_for(24, 36)
    assert metric.input is not None
    before = metric.input.clone()
    first, second = (fit_train(weight, metric, (1, 9, 1), (4, 6), (6, 6)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(metric.input, before)


def test_ridged_moments_are_positive_definite_and_rooted() -> None:
    low = ridged(moment(20, 1, samples=3), 1e-5)
    assert low is not None
    root, inverse = root_and_inverse(low)
    assert torch.allclose(root @ root, low, atol=1e-9 * float(low.max()))
    assert torch.allclose(root @ inverse, torch.eye(20, dtype=torch.float64), atol=1e-6)
    assert ridged(torch.zeros(4), 1e-5) is None
    assert ridged(None, 1e-5) is None
