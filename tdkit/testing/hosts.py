"""The contract of a host: the behaviour that tdkit relies on to calibrate, replace, save and restore a layer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.decompositions.low_rank import LowRank
from tdkit.errors import RegistryError
from tdkit.models.hosts.base import FactorizedModule, Host, Observer, install
from tdkit.models.hosts.registered import host_of, hosts
from tdkit.models.hosts.routing import Routing, StackObserver
from tdkit.models.hosts.sequential import PlainStages
from tdkit.testing.check import Check, close, require, run_all

MakeLayer = Callable[[], nn.Module]
MakeInputs = Callable[[], Sequence[Any]]


def host_checks(make: MakeLayer, inputs: MakeInputs) -> list[Check]:
    """Returns all checks of a host's contract, for the layers that `make` builds.

    Args:
        make: a function that returns a layer of the host's type, which is cast to float64. Test layers of other
            sizes and options with further calls.
        inputs: a function that returns the arguments of the layer's forward, such as
            ``lambda: [torch.randn(3, 5, 8)]``; floating-point tensors are cast to float64.
    """
    clauses = (
        it_is_found_by_its_name,
        weights_are_matrices_and_back,
        full_rank_layers_compute_the_same,
        other_parameters_stay_the_same_objects,
        undo_is_the_reverse_of_build,
        plain_layers_compute_the_same,
        observers_see_every_product,
        observers_see_the_products_of_the_factorised_layer,
        what_observers_return_is_used_until_they_are_removed,
        options_are_json,
    )
    return [Check(clause.__name__, partial(clause, _Case(make, inputs))) for clause in clauses]


def check_host(make: MakeLayer, inputs: MakeInputs) -> None:
    """Run every check of `host_checks` and report all failures together.

    Raises:
        AssertionError: with one line per failed check.
    """
    run_all(host_checks(make, inputs))


class _Case:
    """Builds layers and inputs of one host with the same values each time."""

    def __init__(self, make: MakeLayer, inputs: MakeInputs) -> None:
        self._make = make
        self._inputs = inputs

    def layer(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._make().double()

    def inputs(self) -> list[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            given = self._inputs()
        floats = [isinstance(each, Tensor) and each.is_floating_point() for each in given]
        return [each.double() if is_float else each for each, is_float in zip(given, floats, strict=True)]

    def host(self, layer: nn.Module) -> Host:
        host = host_of(layer)
        require(host is not None, f"no registered host accepts {type(layer).__name__}")
        return cast(Host, host)

    def factorized(self, layer: nn.Module, weights: Sequence[str]) -> FactorizedModule:
        """Returns the layer with full-rank factors for the given weights."""
        host = self.host(layer)
        matrices: dict[str, FactorizedMatrix] = {}
        for weight in weights:
            matrix = host.canonical(getattr(layer, weight), weight).detach().flatten(1)
            matrices[weight] = LowRank(rank=min(matrix.shape)).fit(matrix)
        return install(layer, host.build(layer, matrices, host.options(layer)))


def it_is_found_by_its_name(case: _Case) -> None:
    """A host accepts the layer and is registered under its `name`; it accepts no other type, nor a subclass."""
    layer = case.layer()
    host = case.host(layer)
    try:
        registered = hosts.get(host.name)
    except RegistryError as error:
        raise AssertionError(f"the host is not registered as '{host.name}': {error}") from error
    require(registered is type(host), f"'{host.name}' is registered for {registered.__name__}")
    subclass = copy.copy(layer)
    subclass.__class__ = type("Subclass", (type(layer),), {})
    require(not host.accepts(subclass), "it accepts a subclass, whose forward may be another one")
    require(not host.accepts(nn.Identity()), "it accepts nn.Identity")


def weights_are_matrices_and_back(case: _Case) -> None:
    """Every name in `weights` is a parameter; `stored` is the inverse of `canonical`, which returns a view."""
    layer = case.layer()
    host = case.host(layer)
    weights = host.weights(layer)
    require(len(weights) > 0, "it names no weights")
    for weight in weights:
        parameter = dict(layer.named_parameters(recurse=False)).get(weight)
        require(parameter is not None, f"the layer has no parameter '{weight}' of its own")
        assert parameter is not None
        matrix = host.canonical(parameter, weight)
        require(matrix.ndim >= 2, f"'{weight}' is read as {tuple(matrix.shape)}, which has no two dimensions")
        shared = matrix.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        require(shared, f"'{weight}' is read as a copy, not as a view")
        back = host.stored(matrix, weight)
        require(back.shape == parameter.shape and torch.equal(back, parameter), f"'{weight}' does not come back")
        times = host.multiplications(layer, weight)
        require(isinstance(times, int) and times >= 0, f"multiplications of '{weight}' are {times!r}")


def full_rank_layers_compute_the_same(case: _Case) -> None:
    """With full-rank factors for each weight alone, and for all, the output equals that of the dense layer."""
    for weights in _selections(case):
        layer, inputs = case.layer(), case.inputs()
        expected = layer(*inputs)
        close(case.factorized(layer, weights)(*inputs), expected, f"the output with {', '.join(weights)} factorised")


def other_parameters_stay_the_same_objects(case: _Case) -> None:
    """Biases, and weights that are not factorised, are the same parameters in the factorised layer."""
    for weights in _selections(case):
        layer = case.layer()
        before = {name: p for name, p in layer.named_parameters() if name not in weights}
        built = case.factorized(layer, weights)
        require(set(built.matrices) == set(weights), f"`matrices` has {sorted(built.matrices)}, not {sorted(weights)}")
        held = {id(p) for p in built.parameters()}
        for name, parameter in before.items():
            require(id(parameter) in held, f"'{name}' is not in the layer with {', '.join(weights)} factorised")
        inside = sum(p.numel() for matrix in built.matrices.values() for p in matrix.parameters())
        total = sum(p.numel() for p in built.parameters())
        require(total == inside + sum(p.numel() for p in before.values()), "it holds parameters of its own")


def undo_is_the_reverse_of_build(case: _Case) -> None:
    """`undo` returns a layer of the dense type with the same output, parameters and dtypes."""
    for weights in _selections(case):
        layer, inputs = case.layer(), case.inputs()
        built = case.factorized(layer, weights)
        dense = case.host(layer).undo(built)
        require(type(dense) is type(layer), f"undo gives a {type(dense).__name__}, not a {type(layer).__name__}")
        require(built.host == case.host(layer).name, f"the layer names the host '{built.host}'")
        require(built.replaces == type(layer).__name__, f"the layer replaces '{built.replaces}'")
        close(dense(*inputs), layer(*inputs), "the output after undo")
        for name, parameter in layer.named_parameters():
            other = dict(dense.named_parameters())[name]
            close(other, parameter, f"'{name}' after undo")
            require(other.dtype == parameter.dtype, f"'{name}' after undo is {other.dtype}")


def plain_layers_compute_the_same(case: _Case) -> None:
    """What `sequential` returns, if anything, has the output of the factorised layer and holds no factorised one."""
    for weights in _selections(case):
        layer, inputs = case.layer(), case.inputs()
        built = case.factorized(layer, weights)
        chain = case.host(layer).sequential(built, PlainStages())
        if chain is not None:
            inside = [type(each).__name__ for each in chain.modules() if isinstance(each, FactorizedModule)]
            require(not inside, f"sequential returns factorised layers: {', '.join(inside)}")
            close(chain(*inputs), built(*inputs), "the output of sequential")


def observers_see_every_product(case: _Case) -> None:
    """Observers see all products: the weight's gradient can be computed from the rows of x and the gradient of y."""
    layer = case.layer()
    _check_observers(case, layer, layer, {w: cast(Tensor, getattr(layer, w)) for w in case.host(layer).weights(layer)})


def observers_see_the_products_of_the_factorised_layer(case: _Case) -> None:
    """Observers work on the factorised layer too, on which a second calibration pass measures."""
    layer = case.layer()
    built = case.factorized(layer, case.host(layer).weights(layer))
    _check_observers(case, layer, built, {})


def _check_observers(case: _Case, dense: nn.Module, layer: nn.Module, parameters: dict[str, Tensor]) -> None:
    host = case.host(dense)
    expected = layer(*case.inputs()).detach()
    slopes = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layer.requires_grad_(True)
    for weight in _seen(host, dense):
        canonical = host.canonical(getattr(dense, weight), weight)
        looks_up = host.multiplications(dense, weight) == 0
        found = torch.zeros(canonical.flatten(1).shape, dtype=torch.float64)
        calls: list[int] = []
        if host.stacked(dense, weight):
            handle = host.attach_stack(layer, weight, _adding_members(found.view(canonical.shape), calls))
        else:
            handle = host.attach(layer, weight, _adding(found, looks_up, calls))
        output = layer(*case.inputs())
        close(output, expected, f"the output while '{weight}' is observed")
        layer.zero_grad()
        output.backward(slopes)
        handle.remove()
        require(len(calls) > 0, f"no product with '{weight}' is seen")
        if weight in parameters:
            gradient = parameters[weight].grad
            require(gradient is not None, f"'{weight}' has no gradient")
            wanted = host.canonical(cast(Tensor, gradient), weight).flatten(1)
            close(found, wanted, f"the gradient of '{weight}' from the rows that are observed")


def _adding(total: Tensor, looks_up: bool, calls: list[int]) -> Observer:
    """Returns an observer that accumulates the weight's gradient from the inputs and the output gradients."""

    def observe(x: Tensor, y: Tensor) -> Tensor:
        calls.append(x.numel())
        groups = x.shape[-2] if x.ndim > y.ndim else 1
        rows = x.detach().reshape(-1) if looks_up else x.detach().reshape(-1, x.shape[-1])

        def add(gradient: Tensor) -> None:
            gradient = gradient.reshape(-1, gradient.shape[-1])
            if looks_up:
                total.index_add_(0, rows, gradient)
            elif x.ndim > y.ndim:
                for part, own, block in zip(
                    total.chunk(groups), x.detach().unbind(-2), gradient.chunk(groups, 1), strict=True
                ):
                    part.add_(block.T @ own.reshape(-1, own.shape[-1]))
            else:
                total.add_(gradient.T @ rows)

        if not y.requires_grad:
            y = y.detach().clone().requires_grad_()
        y.register_hook(add)  # type: ignore[no-untyped-call]
        return y

    return observe


def _adding_members(total: Tensor, calls: list[int]) -> StackObserver:
    """As `_adding`, for a stack (members, out, in)."""

    def observe(routing: Routing, x: Tensor, y: Tensor) -> Tensor:
        calls.append(x.numel())
        rows = x.detach().split(list(routing.counts))  # type: ignore[no-untyped-call]

        def add(gradient: Tensor) -> None:
            parts = gradient.split(list(routing.counts))  # type: ignore[no-untyped-call]
            for member, (of_y, of_x) in enumerate(zip(parts, rows, strict=True)):
                total[member] += of_y.T @ of_x

        y = y if y.requires_grad else y.detach().clone().requires_grad_()
        y.register_hook(add)  # type: ignore[no-untyped-call]
        return y

    return observe


def _seen(host: Host, layer: nn.Module) -> list[str]:
    """Returns the weights whose products are to be seen: those that the layer does not just read as dense ones."""
    return [weight for weight in host.weights(layer) if host.computed(layer, weight) != "dense"]


def what_observers_return_is_used_until_they_are_removed(case: _Case) -> None:
    """The layer uses the result of an observer in place of y, and no longer calls it after ``remove()``."""
    layer = case.layer()
    expected = layer(*case.inputs())
    for weight in _seen(case.host(layer), layer):
        handle = case.host(layer).attach(layer, weight, lambda _, y: y + 1.0)
        changed = layer(*case.inputs())
        handle.remove()
        require(not torch.allclose(changed, expected), f"what an observer of '{weight}' returns is not used")
        close(layer(*case.inputs()), expected, f"the output after the observer of '{weight}' is removed")


def options_are_json(case: _Case) -> None:
    """The options of the dense layer survive JSON and equal those of the factorised layer."""
    layer = case.layer()
    host = case.host(layer)
    options = host.options(layer)
    require(json.loads(json.dumps(options)) == options, f"options {options!r} are not JSON")
    own = case.factorized(layer, host.weights(layer)).options()
    require(own == options, f"the built layer says {own!r} of itself, `options` said {options!r}")


def _selections(case: _Case) -> list[tuple[str, ...]]:
    layer = case.layer()
    weights = case.host(layer).weights(layer)
    return list(dict.fromkeys([*((weight,) for weight in weights), tuple(weights)]))
