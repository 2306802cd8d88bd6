"""The contract of a decomposition, as checks for the tests of plugins.

    import pytest
    from tdkit.testing import checks

    @pytest.mark.parametrize("check", checks(MyDecomposition), ids=str)
    def test_contract(check):
        check()

`checks` returns small named checks; `check_decomposition` runs them all without pytest and reports all failures
together. A check that fails raises an AssertionError with the shape, the decomposition and the values found.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, Preference
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import OptionError, TdkitError
from tdkit.fitting.metric import Metric
from tdkit.models.preparation import prepare
from tdkit.shapes import Shape, by
from tdkit.support.compatibility import tree_leaves
from tdkit.testing.check import Check, close, require, run_all
from tdkit.testing.convolutions import chain, convolution

SHAPES: tuple[Shape, ...] = ((12, 18), (18, 12), (16, 16), (15, 9), (7, 11), (1, 10), (10, 1), (1, 1))
TENSOR_SHAPES: tuple[Shape, ...] = (
    (6, 4, 3, 3),
    (6, 8, 5),
    (5, 7, 3, 2),
    (1, 6, 3, 3),
    (7, 1, 2, 3),
    (6, 5, 1, 1),
    (3, 4, 2, 1, 3),
    (1, 1, 1),
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HUGE: Shape = (1 << 16, 1 << 16)  # dense, this is 32 GiB in float64,
HUGE_TENSOR: Shape = (1 << 13, 1 << 13, 8, 8)  # and so is this
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
BATCHES = ((), (1,), (5,), (2, 3), (0,), (2, 0))
MANY_TOKENS = 300  # enough for paths that only large batches use
USED = 0.95  # maximum error of a fit in the metric relative to a plain fit; the built-in ones reach 0.88 or less


def checks(
    kind: type[Decomposition] | Decomposition,
    *,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    exact: bool = True,
    metric: Literal["used", "ignored"] | None = None,
) -> list[Check]:
    """Returns all checks of the contract for `kind`.

    Args:
        kind: a registered decomposition class, or an instance whose rank or other size is not set.
        shapes: of the weights to test, (out, in) or (out, in, \\*kernel), of orders that `kind` takes; those of
            `SHAPES` and `TENSOR_SHAPES` that it takes when None.
        dtypes: the dtypes of the matrices to test; gradients are always checked in float64.
        exact: whether the largest candidate represents every matrix exactly; False for families such as
            circulant matrices.
        metric: 'used' checks that a fit with calibrated second moments, of the inputs or of the output gradients, has
            less error in that metric than a plain fit; 'ignored' checks that it equals the plain fit; None checks
            neither. That the metric does no harm is always checked.
    """
    open_kind = kind if isinstance(kind, Decomposition) else kind()
    if shapes is None:
        shapes = [shape for shape in (*SHAPES, *TENSOR_SHAPES) if len(shape) in open_kind.orders]
    listed = []
    for clause in (
        candidates_are_sorted,
        alternatives_have_choices,
        complete_keeps_to_the_budget,
        claimed_params_are_real,
        matmul_is_dense,
        linear_is_dense,
        every_path_is_dense,
        rows_are_dense,
        products_stay_on_the_device,
        gradients_are_right,
        curve_is_monotone,
        fit_is_deterministic,
        fit_leaves_no_trace,
        fit_takes_any_layout,
        fit_survives_degenerate_weights,
        metric_does_no_harm,
        *([] if metric is None else [metric_is_used if metric == "used" else metric_is_ignored]),
        copies_are_equal,
        options_round_trip,
    ):
        listed += [Check(_label(clause, shape), partial(clause, open_kind, shape)) for shape in shapes]
    for typed in (dtype_is_kept, state_round_trips, *((exact_at_full_size,) if exact else ())):
        listed += [
            Check(_label(typed, shape, dtype), partial(typed, open_kind, shape, dtype))
            for shape in shapes
            for dtype in dtypes
        ]
    for shape in (shape for shape in (HUGE, HUGE_TENSOR) if len(shape) in open_kind.orders):
        listed.append(Check(_label(empty_costs_nothing, shape), partial(empty_costs_nothing, open_kind, shape)))
    for shape in TENSOR_SHAPES:
        if len(shape) in open_kind.orders or 2 in open_kind.orders:
            listed.append(
                Check(_label(convolutions_are_dense, shape), partial(convolutions_are_dense, open_kind, shape))
            )
    listed.append(Check("bad_options_are_told", partial(bad_options_are_told, open_kind, shapes[0])))
    listed.append(Check("foreign_orders_are_told", partial(foreign_orders_are_told, open_kind)))
    listed.append(Check("foreign_shapes_are_told", partial(foreign_shapes_are_told, open_kind, shapes)))
    listed.append(Check("compiles_whole", partial(compiles_whole, open_kind, shapes[0])))
    return listed


def check_decomposition(kind: type[Decomposition] | Decomposition, **options: Any) -> None:
    """Run every check of `checks`, with the same options, and report all failures together.

    Raises:
        AssertionError: with one line per failed check.
    """
    run_all(checks(kind, **options))


def candidates_are_sorted(kind: Decomposition, shape: Shape) -> None:
    """There are candidates; each is complete and fits the shape; none has fewer params than the previous one."""
    candidates = kind.candidates(shape)
    require(bool(candidates), f"no candidates for {shape}")
    last = 0
    for candidate in candidates:
        candidate.check(candidate.shape_of(shape))
        require(candidate.is_complete(), f"candidate {candidate} of {shape} is not complete")
        params = _num_params(candidate, shape)
        require(params >= last, f"candidate {candidate} of {shape} has {params} params, the one before it {last}")
        last = params


def alternatives_have_choices(kind: Decomposition, shape: Shape) -> None:
    """Each of `alternatives` has candidates for the shape, and `best_within` returns one within the given params."""
    alternatives = kind.alternatives(shape)
    require(bool(alternatives), f"{kind} stands for nothing at {shape}")
    for alternative in alternatives:
        alternative.check(alternative.shape_of(shape))
        require(
            bool(alternative.candidates(alternative.shape_of(shape))),
            f"{alternative}, for which {kind} stands, has no candidates",
        )
    budget = _num_params(_choices(kind, shape)[-1], shape)
    best = kind.best_within(_weight(shape), None, budget)
    require(best is not None and best.is_complete(), f"{kind} of {shape}: {best} is the best within {budget} params")
    assert best is not None
    require(_num_params(best, shape) <= budget, f"{best} of {shape} was chosen for {budget} params")


def complete_keeps_to_the_budget(kind: Decomposition, shape: Shape) -> None:
    """`complete` never exceeds its budget, and finds something whenever the smallest candidate fits."""
    candidates = kind.candidates(shape)
    smallest, largest = _num_params(candidates[0], shape), _num_params(candidates[-1], shape)
    for budget in {0, 1, smallest - 1, smallest, (smallest + largest) // 2, largest, 2 * largest}:
        chosen = kind.complete(shape, budget)
        if budget < smallest:
            require(chosen is None, f"{chosen} was chosen for {budget} params; the smallest has {smallest}")
            continue
        require(chosen is not None, f"nothing was chosen for {budget} params; the smallest has {smallest}")
        assert chosen is not None
        params = _num_params(chosen, shape)
        require(params <= budget, f"{chosen} has {params} params for a budget of {budget}")
        require(chosen.is_complete(), f"{chosen}, chosen for {budget} params of {shape}, is not complete")


def claimed_params_are_real(kind: Decomposition, shape: Shape) -> None:
    """`num_params`, `params` of the empty matrix and the parameters of a fitted one are equal."""
    for choice in _choices(kind, shape):
        claimed = _num_params(choice, shape)
        empty = choice.empty(choice.shape_of(shape), device="meta")
        fitted = _fit(choice, _weight(shape))
        held = sum(p.numel() for p in fitted.parameters())
        require(
            claimed == empty.params == fitted.params == held,
            f"{choice} of {shape} claims {claimed} params; empty has {empty.params}, fitted holds {held}",
        )
        require(empty.indices == fitted.indices, f"{choice} of {shape}: indices {empty.indices}, {fitted.indices}")
        flat = (shape[0], _columns(shape))
        require(fitted.shape == flat and empty.shape == flat, f"{choice}: shape {fitted.shape}, not {flat}")
        own = choice.shape_of(shape)
        require(fitted.sizes == empty.sizes == own, f"{choice}: sizes {fitted.sizes} and {empty.sizes}, not {own}")
        require(fitted.multiply_adds() == empty.multiply_adds() > 0, f"{choice} of {shape}: multiply-adds differ")


def matmul_is_dense(kind: Decomposition, shape: Shape) -> None:
    """``matmul(x) == x @ dense().T`` for any batch shape, empty and zero-dimensional ones included."""
    for choice in _choices(kind, shape):
        matrix = _fit(choice, _weight(shape))
        for batch in BATCHES:
            x = _random(*batch, _columns(shape), seed=1)
            close(matrix.matmul(x), x @ matrix.dense().T, f"{choice} of {shape}: matmul of a batch {batch}")
        strided = _random(_columns(shape), 3, seed=2).T
        close(matrix.matmul(strided), strided @ matrix.dense().T, f"{choice} of {shape}: matmul of a strided x")


def linear_is_dense(kind: Decomposition, shape: Shape) -> None:
    """``linear(x, bias) == x @ dense().T + bias``, which layers call: in training, in eval mode, with a cached weight.

    A second call may use the cache of the first, but not after the factors have changed in place.
    """
    for choice in _choices(kind, shape):
        matrix, biases = _fit(choice, _weight(shape)), (None, _random(shape[0], seed=12))
        _linear_is_dense(matrix.train(), biases, f"{choice} of {shape} in training")
        for prefer in get_args(Preference):
            prepare(matrix, prefer=prefer)
            _linear_is_dense(matrix, biases, f"{choice} of {shape}, prefer={prefer}, with gradients")
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    place = f"{choice} of {shape}, prefer={prefer}, under {context.__name__}"
                    _linear_is_dense(matrix, biases, place)
                    _linear_is_dense(matrix, biases, f"{place}, again")
                    for factor in matrix.parameters():
                        factor.mul_(1.5)
                        _linear_is_dense(matrix, biases, f"{place}, after a factor was changed in place")
                    for factor in matrix.parameters():
                        factor.div_(1.5)


def _linear_is_dense(matrix: FactorizedMatrix, biases: Sequence[Tensor | None], place: str) -> None:
    dense = matrix.dense()
    for batch in (*BATCHES, (MANY_TOKENS,)):
        x = _random(*batch, matrix.shape[1], seed=1)
        for bias in biases:
            what = f"{place}: linear of a batch {batch} {'without' if bias is None else 'with'} bias"
            close(matrix.linear(x, bias), F.linear(x, dense, bias), what)


def every_path_is_dense(kind: Decomposition, shape: Shape) -> None:
    """Each of `paths` computes ``x @ dense().T + bias`` and its gradients; `path` returns one of them."""
    for choice in _choices(kind, shape):
        matrix, bias = _fit(choice, _weight(shape)), _random(shape[0], seed=12)
        for tokens in (1, 3, MANY_TOKENS):
            x = _random(tokens, _columns(shape), seed=1)
            paths = matrix.paths(tokens)
            names = [path.name for path in paths]
            require(len(set(names)) == len(names), f"{choice} of {shape}: two paths of one name among {names}")
            require(
                matrix.path(tokens, prefer="memory").name in names,
                f"{choice} of {shape}: the path taken for {tokens} tokens is not among {names}",
            )
            expected = F.linear(x, matrix.dense(), bias)
            slopes = torch.autograd.grad(expected.square().sum(), list(matrix.parameters()))
            for path in paths:
                what = f"{choice} of {shape}: path '{path.name}' of {tokens} tokens"
                y = matrix.multiply(x, bias, path)
                close(y, expected, what)
                close(matrix.multiply(x, None, path), expected - bias, f"{what}, without bias")
                found = torch.autograd.grad(y.square().sum(), list(matrix.parameters()))
                for one, other in zip(found, slopes, strict=True):
                    close(one, other, f"{what}: a gradient")


def rows_are_dense(kind: Decomposition, shape: Shape) -> None:
    """``rows(ids) == dense()[ids]`` for any shape of ids, empty and zero-dimensional ones included."""
    for choice in _choices(kind, shape):
        matrix = _fit(choice, _weight(shape))
        for batch in BATCHES:
            ids = torch.randint(shape[0], batch, generator=torch.Generator().manual_seed(3))
            close(matrix.rows(ids), matrix.dense()[ids], f"{choice} of {shape}: rows of ids {batch}")
        ids = torch.arange(shape[0], dtype=torch.int32)
        close(matrix.rows(ids), matrix.dense(), f"{choice} of {shape}: rows of all ids, int32")


def products_stay_on_the_device(kind: Decomposition, shape: Shape) -> None:
    """With factors and x on another device (``meta``) every product and look-up allocates its tensors there."""
    for choice in _choices(kind, shape):
        matrix = choice.empty(choice.shape_of(shape), device="meta", dtype=torch.float64).requires_grad_(False).eval()
        x, bias = (
            torch.empty(3, _columns(shape), device="meta", dtype=torch.float64),
            matrix.dense().new_empty(shape[0]),
        )
        with _Devices() as devices:
            matrix.dense()
            matrix.matmul(x)
            matrix.linear(x, bias)
            matrix.rows(torch.empty(3, device="meta", dtype=torch.long))
            for path in matrix.paths(3):
                matrix.multiply(x, bias, path)
        require(devices.seen == {"meta"}, f"{choice} of {shape} on meta makes tensors on {sorted(devices.seen)}")


class _Devices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the device types on which operations allocate tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen |= {leaf.device.type for leaf in tree_leaves(output) if isinstance(leaf, Tensor)}
        return output


def gradients_are_right(kind: Decomposition, shape: Shape) -> None:
    """Float64 gradients of `matmul`, `linear`, `rows` and `dense` agree with finite differences, for every factor."""
    bias = _random(shape[0], seed=12).requires_grad_()
    x = _random(3, _columns(shape), seed=4).requires_grad_()
    ids = torch.tensor([0, shape[0] - 1, shape[0] // 2])
    for choice in _choices(kind, shape)[:2]:
        matrix = _fit(choice, _weight(shape))
        _check_gradients(matrix, "matmul", x)
        _check_gradients(matrix, "linear", x, bias)
        _check_gradients(matrix, "rows", ids)
        _check_gradients(matrix, "dense")


def curve_is_monotone(kind: Decomposition, shape: Shape) -> None:
    """Along `curve` params increase, stay below dense, and errors decrease; the errors are those of actual fits."""
    weight = _weight(shape)
    points = kind.curve(weight)
    for before, after in itertools.pairwise(points):
        require(before.params < after.params, f"params {before.params} then {after.params} on the curve of {shape}")
        require(before.error > after.error, f"error {before.error} then {after.error} on the curve of {shape}")
    for point in points[:: max(1, len(points) // 3)]:
        choice = point.decomposition
        require(choice.is_complete(), f"{choice} on the curve of {shape} is not complete")
        require(point.params == _num_params(choice, shape), f"{choice} on the curve claims {point.params} params")
        require(point.params < weight.numel(), f"{choice} on the curve of {shape} is not smaller than dense")
        real = float((weight.flatten(1) - _fit(choice, weight).dense()).detach().square().sum())
        size = float(weight.square().sum())
        require(
            abs(real - point.error) <= 1e-6 * size,
            f"{choice} of {shape}: error {point.error} on the curve, {real} when fitted",
        )


def fit_is_deterministic(kind: Decomposition, shape: Shape) -> None:
    """Two fits of one weight are equal bit for bit, whatever the global random state is."""
    choice = _choices(kind, shape)[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = _fit(choice, _weight(shape)).state_dict()
        torch.manual_seed(1)
        second = _fit(choice, _weight(shape)).state_dict()
    for name, tensor in first.items():
        require(torch.equal(tensor, second[name]), f"{choice} of {shape}: {name} differs between two fits")


def fit_leaves_no_trace(kind: Decomposition, shape: Shape) -> None:
    """A fit changes neither the weight nor the global random state; its factors are leaves that can be trained."""
    choice = _choices(kind, shape)[-1]
    weight = nn.Parameter(_weight(shape))
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    matrix = _fit(choice, weight)
    require(torch.equal(state, torch.get_rng_state()), f"{choice} of {shape}: the fit used the global random state")
    require(torch.get_default_dtype() == default, f"{choice} of {shape}: the fit changed the default dtype")
    require(torch.equal(weight, _weight(shape)), f"{choice} of {shape}: the fit changed the weight")
    for name, parameter in matrix.named_parameters():
        require(parameter.is_leaf and parameter.requires_grad, f"{choice} of {shape}: {name} cannot be trained")
        shared = parameter.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        require(not shared, f"{choice} of {shape}: {name} shares memory with the weight")


def fit_takes_any_layout(kind: Decomposition, shape: Shape) -> None:
    """A transposed view (transformers' ``Conv1D``) is fitted as well as a contiguous copy."""
    choice = _choices(kind, shape)[-1]
    weight = _weight(shape)
    view = weight.transpose(0, 1).contiguous().transpose(0, 1)
    gaps = [float((weight.flatten(1) - _fit(choice, w).dense()).detach().norm()) for w in (weight, view)]
    require(abs(gaps[0] - gaps[1]) <= 1e-6 * float(weight.norm()), f"{choice} of {shape}: errors {gaps} by layout")


def fit_survives_degenerate_weights(kind: Decomposition, shape: Shape) -> None:
    """Zero, constant, rank-one, very large and very small matrices are fitted without NaN."""
    column, row = _random(shape[0], 1, seed=5), _random(1, _columns(shape), seed=6)
    for label, weight in (
        ("zero", torch.zeros(shape, dtype=torch.float64)),
        ("constant", torch.ones(shape, dtype=torch.float64)),
        ("rank-one", (column @ row).reshape(shape)),
        ("float32 of size 1e15", _weight(shape).float() * 1e15),
        ("float32 of size 1e-15", _weight(shape).float() * 1e-15),
    ):
        for choice in _choices(kind, shape):
            dense = _fit(choice, weight).dense().detach()
            require(bool(torch.isfinite(dense).all()), f"{choice} of a {label} {shape} matrix gives NaN or infinity")
            size, gap = float(weight.norm()), float((weight.flatten(1) - dense).norm())
            require(gap <= size * (1 + 1e-4), f"{choice} of a {label} {shape} matrix is worse than nothing ({gap})")


def metric_does_no_harm(kind: Decomposition, shape: Shape) -> None:
    """Measured in the metric, a fit in it is never worse than the plain fit, also with rank-deficient moments."""
    weight = _weight(shape)
    for label, metric in _metrics(kind, shape).items():
        for choice in _choices(kind, shape)[:2]:
            plain, calibrated = _errors_in(metric, choice, weight)
            slack = 1e-4 * metric.squared_error(weight.flatten(1))  # floors under small eigenvalues cost a little
            require(
                calibrated <= plain + slack,
                f"{choice} of {shape} with {label}: {calibrated:.6g} calibrated, {plain:.6g} plain",
            )


def metric_is_used(kind: Decomposition, shape: Shape) -> None:
    """Measured in the metric, a fit in it has clearly less error than the plain fit, unless that is exact.

    Both sides are checked: moments of inputs for more than one column, of output gradients for more than one row.
    """
    weight, metrics = _weight(shape), _metrics(kind, shape)
    rows, columns = shape[1:] if kind.stacks else (shape[0], _columns(shape))
    sides = {"C": columns > 1, "S of half rank": rows > 1, "C and S": min(rows, columns) > 1}
    for label in (label for label, told in sides.items() if told):
        metric = metrics[label]
        for choice in _choices(kind, shape)[:2]:
            plain, calibrated = _errors_in(metric, choice, weight)
            if plain > 1e-9 * metric.squared_error(weight.flatten(1)):
                require(
                    calibrated <= USED * plain,
                    f"{choice} of {shape} makes no use of {label}: {calibrated:.6g} calibrated, {plain:.6g} plain",
                )


def metric_is_ignored(kind: Decomposition, shape: Shape) -> None:
    """A fit in the metric is bit-identical to the plain fit."""
    weight = _weight(shape)
    for label, metric in _metrics(kind, shape).items():
        for choice in _choices(kind, shape)[:2]:
            plain, calibrated = _fit(choice, weight).dense(), _fit(choice, weight, metric).dense()
            require(torch.equal(plain, calibrated), f"{choice} of {shape} makes use of {label}")


def copies_are_equal(kind: Decomposition, shape: Shape) -> None:
    """A deep copy, and a matrix cast to another dtype and back, give the same results as the matrix."""
    x = _random(3, _columns(shape), seed=9).float()
    for choice in _choices(kind, shape):
        matrix = _fit(choice, _weight(shape).float())
        expected = matrix.matmul(x)
        twin = copy.deepcopy(matrix)
        require(torch.equal(twin.matmul(x), expected), f"{choice} of {shape}: a deep copy gives another result")
        moved = twin.to(torch.float64).to(torch.float32)
        require(torch.equal(moved.matmul(x), expected), f"{choice} of {shape}: float64 and back changes the result")


def options_round_trip(kind: Decomposition, shape: Shape) -> None:
    """Options survive JSON; the decomposition read back is equal, with the same hash and description."""
    for choice in (kind, *_choices(kind, shape)):
        back = decomposition(json.loads(json.dumps(spec_of(choice))))
        require(type(back) is type(choice) and back == choice, f"{choice} came back from JSON as {back}")
        require(hash(back) == hash(choice), f"{choice} has another hash after JSON")
        require(back.describe() == choice.describe(), f"{choice} is described as {back.describe()} after JSON")


def dtype_is_kept(kind: Decomposition, shape: Shape, dtype: torch.dtype) -> None:
    """Factors, products and rows have the dtype and device of the weight; buffers are integers."""
    weight = _weight(shape).to(dtype)
    for choice in _choices(kind, shape):
        for matrix in (_fit(choice, weight), choice.empty(choice.shape_of(shape), device="cpu", dtype=dtype)):
            for name, parameter in matrix.named_parameters():
                found = (parameter.dtype, parameter.device)
                require(found == (dtype, weight.device), f"{choice} of {shape} in {dtype}: {name} is {found}")
            for name, buffer in matrix.named_buffers():
                require(not buffer.is_floating_point(), f"{choice} of {shape}: buffer {name} holds floats")
        matrix = _fit(choice, weight)
        results = (
            matrix.dense(),
            matrix.matmul(weight.new_zeros(2, _columns(shape))),
            matrix.rows(torch.zeros(2, dtype=torch.long)),
        )
        for result in results:
            require(result.dtype == dtype, f"{choice} of {shape} in {dtype}: a result is {result.dtype}")


def state_round_trips(kind: Decomposition, shape: Shape, dtype: torch.dtype) -> None:
    """Factors written to safetensors and read into `empty` give the same results, bit for bit."""
    x = _random(3, _columns(shape), seed=10).to(dtype)
    for choice in _choices(kind, shape):
        fitted = _fit(choice, _weight(shape).to(dtype))
        state = {name: tensor.contiguous() for name, tensor in fitted.state_dict().items()}
        loaded = choice.empty(choice.shape_of(shape), device="cpu", dtype=dtype)
        loaded.load_state_dict(load_tensors(save_tensors(state)))
        ids = torch.arange(shape[0])
        for name, ours, theirs in (
            ("dense", fitted.dense(), loaded.dense()),
            ("matmul", fitted.matmul(x), loaded.matmul(x)),
            ("rows", fitted.rows(ids), loaded.rows(ids)),
        ):
            require(torch.equal(ours, theirs), f"{choice} of {shape} in {dtype}: {name} differs after a round trip")


def exact_at_full_size(kind: Decomposition, shape: Shape, dtype: torch.dtype) -> None:
    """The largest candidate represents any matrix up to rounding error."""
    weight = _weight(shape).to(dtype)
    choice = kind.candidates(shape)[-1]
    gap = float((weight.flatten(1) - _fit(choice, weight).dense()).detach().double().norm() / weight.double().norm())
    require(gap <= TOLERANCE[dtype], f"{choice} of {shape} in {dtype}: relative error {gap:.2g} at full size")


def empty_costs_nothing(kind: Decomposition, shape: Shape) -> None:
    """On the ``meta`` device a huge weight allocates no memory."""
    dense = math.prod(shape)
    choice = kind.complete(shape, dense // 100)
    if choice is None:
        return
    matrix = choice.empty(choice.shape_of(shape), device="meta")
    for name, tensor in (*matrix.named_parameters(), *matrix.named_buffers()):
        require(tensor.device.type == "meta", f"{choice}: {name} is on {tensor.device}, not on meta")
    require(0 < matrix.params <= dense // 100, f"{choice} of {shape} has {matrix.params} params")
    require(matrix.multiply_adds() > 0, f"{choice} of {shape}: no multiply-adds")


def bad_options_are_told(kind: Decomposition, shape: Shape) -> None:
    """Options of a wrong type or name, and a fit with an option not set, raise OptionError."""
    for option in dataclasses.fields(kind):
        _raises(
            lambda name=option.name: decomposition({kind.name: {name: {"not": "an option"}}}),
            f"{kind.name}: {option.name}={{'not': 'an option'}}",
        )
    _raises(lambda: decomposition({kind.name: {"no_such_option": 1}}), f"{kind.name}: an unknown option")
    if not kind.is_complete():
        _raises(lambda: kind.fit(_weight(shape)), f"a fit by {kind}, which leaves an option open")


def foreign_shapes_are_told(kind: Decomposition, shapes: Sequence[Shape]) -> None:
    """A choice made for one shape either fits another shape, or `check`, `fit` and `empty` raise OptionError."""
    for made_for in shapes:
        for choice in _choices(kind, made_for):
            for shape in shapes:
                try:
                    choice.check(choice.shape_of(shape))
                except OptionError:
                    _raises(lambda c=choice, s=shape: _fit(c, _weight(s)), f"a fit by {choice} of {shape}")
                    _raises(
                        lambda c=choice, s=shape: c.empty(c.shape_of(s), device="meta"), f"an empty {choice} of {shape}"
                    )
                else:
                    choice.empty(choice.shape_of(shape), device="meta")


def foreign_orders_are_told(kind: Decomposition) -> None:
    """A weight with a number of dimensions that the decomposition does not take raises OptionError."""
    for shape in (shape for shape in (*SHAPES[:1], *TENSOR_SHAPES) if len(shape) not in kind.orders):
        if 2 not in kind.orders:
            _raises(lambda s=shape: kind.shape_of(s), f"{kind}: the shape of {shape}")


def convolutions_are_dense(kind: Decomposition, shape: Shape) -> None:
    """`convolutions`, where it is not None, equals the convolution with the dense weight, also for groups.

    The stages are those of `Stage`: together they cover each spatial axis once.
    """
    for choice in _choices(kind, kind.shape_of(shape)):
        matrix = _fit(choice, _weight(shape))
        for groups in (each for each in (1, 2, 3) if shape[0] % each == 0):
            stages = matrix.convolutions(shape[2:], groups)
            if stages is None:
                continue
            what = f"{choice} of {shape} in {groups} groups"
            axes = sorted(axis for stage in stages for axis in stage.axes)
            require(axes == list(range(len(shape) - 2)), f"{what}: the stages extend along the axes {axes}")
            x = _random(2, groups * shape[1], *[5] * (len(shape) - 2), seed=13)
            expected = convolution(x, matrix.dense().reshape(shape), groups)
            close(chain(x, stages), expected, f"{what}: the chain of convolutions")


def compiles_whole(kind: Decomposition, shape: Shape) -> None:
    """``torch.compile(fullgraph=True)`` traces `linear`, `matmul` and `rows` without a graph break."""
    for choice in _choices(kind, shape)[:2]:
        matrix = _fit(choice, _weight(shape))
        bias = _random(shape[0], seed=12)
        inputs: dict[str, list[tuple[Tensor, ...]]] = {
            "linear": [(_random(n, _columns(shape), seed=11), bias) for n in (2, 7)],
            "matmul": [(_random(n, _columns(shape), seed=11),) for n in (2, 7)],
            "rows": [(torch.arange(n) % shape[0],) for n in (2, 7)],
        }
        for method, batches in inputs.items():
            torch.compiler.reset()
            call = _Call(matrix, method)
            compiled = torch.compile(call, fullgraph=True, backend="eager")
            for batch in batches:
                what = f"{choice} of {shape}: compiled {method} of {tuple(batch[0].shape)}"
                close(compiled(*batch), call(*batch), what)
    torch.compiler.reset()


class _Call(nn.Module):
    """A module whose forward is one of the methods of a matrix."""

    def __init__(self, matrix: FactorizedMatrix, method: str) -> None:
        super().__init__()
        self.matrix = matrix
        self.method = method

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = getattr(self.matrix, self.method)(*inputs)
        return result


def _check_gradients(matrix: FactorizedMatrix, method: str, *inputs: Tensor) -> None:
    call = _Call(matrix, method)
    names = [name for name, _ in call.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        factors = dict(zip(names, values, strict=False))
        result: Tensor = functional_call(call, factors, values[len(names) :])
        return result

    torch.autograd.gradcheck(run, (*(p.detach().clone().requires_grad_() for p in call.parameters()), *inputs))


def _choices(kind: Decomposition, shape: Shape) -> list[Decomposition]:
    """Returns the smallest, the middle and the largest candidate."""
    candidates = kind.candidates(shape)
    places = dict.fromkeys((0, len(candidates) // 2, len(candidates) - 1))
    return [candidates[place] for place in places]


def _metrics(kind: Decomposition, shape: Shape) -> dict[str, Metric]:
    """Second moments of inputs (C) and of output gradients (S): one direction dominates, as in real activations."""
    members, rows, columns = shape if kind.stacks else (1, shape[0], _columns(shape))
    inputs = _random(members, 40, columns, seed=7)
    gradients = _random(members, max(1, rows // 2), rows, seed=8)
    inputs[:, :, 0] *= 30
    if kind.stacks:
        sides = inputs.mT @ inputs / 40, gradients.mT @ gradients
        return {"C": Metric(sides[0]), "S of half rank": Metric(output=sides[1]), "C and S": Metric(*sides)}
    inputs, gradients = inputs[0], gradients[0]
    return {
        "C": Metric(input=inputs.T @ inputs / len(inputs)),
        "S of half rank": Metric(output=gradients.T @ gradients),
        "C and S": Metric(input=inputs.T @ inputs / len(inputs), output=gradients.T @ gradients),
        "diagonal C and S": Metric(input=inputs.square().mean(0), output=gradients.square().mean(0)),
    }


def _errors_in(metric: Metric, choice: Decomposition, weight: Tensor) -> tuple[float, float]:
    """Squared error of the plain fit and of the one in the metric."""
    plain, calibrated = (
        metric.squared_error(weight.flatten(1) - _fit(choice, weight, given).dense()) for given in (None, metric)
    )
    return plain, calibrated


def _random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _fit(choice: Decomposition, weight: Tensor, metric: Metric | None = None) -> FactorizedMatrix:
    """Returns the fit of a weight (out, in, *kernel), which a member of several may take as a matrix."""
    return choice.fit(choice.view(weight), metric)


def _num_params(choice: Decomposition, shape: Shape) -> int:
    return choice.num_params(choice.shape_of(shape))


def _columns(shape: Shape) -> int:
    """Returns the columns of the matrix of a weight."""
    return math.prod(shape[1:])


def _weight(shape: Shape) -> Tensor:
    return _random(*shape, seed=0)


def _label(clause: Callable[..., None], shape: Shape, dtype: torch.dtype | None = None) -> str:
    kind = "" if dtype is None else f"-{str(dtype).removeprefix('torch.')}"
    return f"{clause.__name__}[{by(shape)}{kind}]"


def _raises(act: Callable[..., object], what: str) -> None:
    try:
        act()
    except OptionError as error:
        require(bool(str(error)), f"{what} raises an OptionError without a message")
    except TdkitError as error:
        raise AssertionError(f"{what} raises {type(error).__name__}, not OptionError: {error}") from error
    except Exception as error:
        raise AssertionError(f"{what} raises {type(error).__name__}, not OptionError: {error}") from error
    else:
        raise AssertionError(f"{what} is accepted, not refused with an OptionError")
