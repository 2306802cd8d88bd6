"""Every model of the zoo through plan, compress, forward, save, load and a training step."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tdkit
from tdkit import LowRank, Plan, Policy, Rule
from tdkit.models.hosts.registered import dense_layer
from tdkit.models.sites import Survey, factorized_groups, num_params, survey
from tdkit.support.compatibility import parameters_of, uncompiled
from tests.side_packages import INSTALL, SIDE, use_side_packages
from tests.zoo import SIDE_LIBRARIES, architectures
from tests.zoo.architecture import GOAL, Architecture

BUDGET = 0.6
NEAR = 1e-5  # relative
TINY = 1e-12  # of gradients of losses near 1
LIBRARY = os.environ.get("TDKIT_ZOO_LIBRARY")  # set in the process that tests this library
if LIBRARY:
    use_side_packages()


def line(architecture: Architecture, fault: str = "") -> Any:
    """A model of the zoo as the parameter of a test, which fails if there is a fault."""
    marks = [pytest.mark.xfail(strict=True, reason=fault)] if fault else []
    return pytest.param(architecture, id=architecture.name, marks=marks)


TABLE = architectures(LIBRARY)


@pytest.mark.parametrize("architecture", [line(each, each.fault) for each in TABLE])
def test_architecture(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.model()
    found = survey(uncompiled(model))
    check_survey(model, found, architecture)

    budget = reachable_budget(model, found)
    plan = tdkit.plan(model, Policy(architecture.rules(), budget=budget))
    assert plan.ratio <= budget
    assert {name for step in plan for name in step.names} == {name for site in found.sites for name in site.names}
    assert all(step.decomposition or step.reason for step in plan)
    assert Plan.from_json(plan.to_json()) == plan
    kept = {step.name: step.params_before for step in plan if step.decomposition is None and can_shrink(step.shape)}
    assert sum(kept.values()) <= (1 - GOAL) * num_params(model), f"kept though they can shrink: {kept}"

    assert tdkit.compress(model, plan) is model
    assert num_params(model) == plan.params_after == tdkit.applied_plan(model).params_after
    assert not model.training
    dense = with_dense_weights(model, architecture.model())
    with torch.no_grad():
        output = architecture.output(model)
        assert_near(output, architecture.output(dense))
        again = tdkit.load(tdkit.save(model, tmp_path / "model"), model=architecture.model(seed=1))
        for loaded, saved in zip(architecture.output(again), output, strict=True):
            assert torch.equal(loaded, saved)
    check_training_step(model, dense, architecture)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile
@pytest.mark.parametrize("architecture", [line(each) for each in TABLE if each.kind == LowRank()])
def test_calibrated_architecture(architecture: Architecture) -> None:
    model = uncompiled(architecture.model())
    found = survey(model)
    calibration = tdkit.calibrate(model, [architecture.batch()], loss=lambda output, _: architecture.loss(output))
    architecture.loss(architecture.call(model)).backward()
    for site in found.sites:
        stored = [parameter for user in site.users for parameter in stored_parameters(user.module, user.weight)]
        assert site.name in calibration.names or not any(p.grad is not None and p.grad.any() for p in stored), site.name

    plan = tdkit.plan(
        model,
        Policy([Rule("*", LowRank())], budget=reachable_budget(model, found), allocation="loss"),
        calibration=calibration,
    )
    assert all(step.loss is not None for step in plan.rewritten if step.name in calibration.names)
    tdkit.compress(model, plan, calibration=calibration)
    assert num_params(model) == plan.params_after
    with torch.no_grad():
        dense = with_dense_weights(model, architecture.model())
        assert_near(architecture.output(model), architecture.output(dense))


@pytest.mark.skipif(LIBRARY is not None, reason="runs in the process of one library")
@pytest.mark.parametrize("library", SIDE_LIBRARIES)
def test_library_in_the_side_folder(library: str) -> None:
    if not (SIDE / library).is_dir():
        pytest.skip(f"{library} is not installed: run `{INSTALL}`")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "architecture"]
    ended = subprocess.run(
        [*command, __file__],
        env={**environment, "TDKIT_ZOO_LIBRARY": library},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def can_shrink(shape: tuple[int, ...]) -> bool:
    """Whether a matrix of rank 1 is smaller than a weight of this shape."""
    sizes = [size for size in shape if size > 1]
    return len(sizes) > 1 and sizes[0] + math.prod(sizes[1:]) < math.prod(sizes)


def check_survey(model: nn.Module, found: Survey, architecture: Architecture) -> None:
    """Every weight that can shrink is a site or has a reason; the share of sites is what the table says or more."""
    weights = sum(p.numel() for p in model.parameters() if can_shrink(tuple(p.shape)))
    assert sum(site.params for site in found.sites) + sum(each.params for each in found.untouchable) >= weights
    assert all(each.reason for each in found.untouchable)
    assert rewritable_share(model, found) >= architecture.share, {each.name: each.reason for each in found.untouchable}


def rewritable_share(model: nn.Module, found: Survey) -> float:
    """The share of the parameters that can be rewritten, of those in weights that can shrink."""
    rewritable = sum(site.params for site in found.sites if can_shrink(site.shape))
    weights = [weight_called(uncompiled(model), each.name) for each in found.untouchable]
    kept = sum(weight.numel() for weight in weights if can_shrink(tuple(weight.shape)))
    return rewritable / (rewritable + kept)


def weight_called(model: nn.Module, name: str) -> Tensor:
    """The weight of a name as plans use it: that of its layer where it is called ``weight``."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute) if name else model
    return cast(Tensor, found.weight if isinstance(found, nn.Module) else found)


def reachable_budget(model: nn.Module, found: Survey) -> float:
    """`BUDGET`, or half of the weights that can be rewritten where they are too few for it."""
    rewritable = sum(site.params for site in found.sites if can_shrink(site.shape)) / num_params(model)
    return BUDGET if rewritable > 0.7 else 1 - rewritable / 2


def with_dense_weights(model: nn.Module, dense: nn.Module) -> nn.Module:
    """Returns `dense`, a newly built model, with the dense values of the factorised weights of `model`."""
    for _, users in factorized_groups(uncompiled(model)):
        for user in users:
            weight = getattr(dense_layer(user.module), user.weight)
            set_weight(uncompiled(dense).get_submodule(user.layer), user.weight, weight.detach())
    return dense


def set_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Set the effective weight of a layer, whose parametrisation is removed."""
    if parametrize.is_parametrized(module, name):
        parametrize.remove_parametrizations(module, name)
    for removed in (torch.nn.utils.remove_weight_norm, torch.nn.utils.remove_spectral_norm):
        with suppress(ValueError):
            removed(module, name)
    with torch.no_grad():
        getattr(module, name).copy_(value)


def stored_parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that a weight is, or is computed from."""
    if parametrize.is_parametrized(module, name):
        return list(cast(nn.ModuleDict, module.parametrizations)[name].parameters())
    own = parameters_of(module)
    return [own[name if name in own else f"{name}_v"]]  # the latter for the hook of weight_norm


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """The outputs are equal up to rounding; some models compute norms and positions in float32."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= NEAR * other.norm()


def check_training_step(model: nn.Module, dense: nn.Module, architecture: Architecture) -> None:
    """A step of gradient descent: finite gradients, of the factors those that the dense weights imply.

    A factorised weight is linear in each of its factors (all terms taken together), so that the inner product of a
    factor with its gradient is that of the weight with its own.
    """
    gradients(model, architecture)
    gradients(dense, architecture)
    for matrix, users in factorized_groups(uncompiled(model)):
        weights = [getattr(uncompiled(dense).get_submodule(user.layer), user.weight) for user in users]
        used = {id(weight): (weight.detach(), weight.grad) for weight in weights if weight.grad is not None}
        expected = sum(float((weight * gradient).sum()) for weight, gradient in used.values())
        scale = sum(float(weight.norm() * gradient.norm()) for weight, gradient in used.values())
        if not used:
            assert all(factor.grad is None for factor in matrix.parameters()), f"{users[0].name} is not used"
            continue
        for name, factor in matrix.named_parameters():
            assert factor.grad is not None, f"{users[0].name}: no gradient of {name}"
            found = float((factor.detach() * factor.grad).sum())
            assert abs(found - expected) <= NEAR * scale + TINY, f"{users[0].name}: gradient of {name}"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
                parameter -= 1e-3 * parameter.grad
    assert all(x.isfinite().all() for x in architecture.output(model.eval()))


def gradients(model: nn.Module, architecture: Architecture) -> None:
    """Gradients of the parameters in training mode, with the same random numbers in each call."""
    architecture.loss(architecture.call(model.train())).backward()
