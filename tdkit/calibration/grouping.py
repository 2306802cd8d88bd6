"""A test, by running the model, that weights share their hidden units and nothing else depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Batch
from tdkit.calibration.measure import without_fast_path
from tdkit.calibration.runner import Runner, as_it_was
from tdkit.models.groups.group import Group, Part
from tdkit.support.compatibility import tree_leaves

TOLERANCE = {
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
    torch.float32: 1e-4,
    torch.float64: 1e-8,
}  # of the largest entry


def faults_of(model: nn.Module, groups: Sequence[Group], batch: Batch) -> dict[str, str]:
    """Returns why units cannot be removed from groups, by the names of those groups.

    - Of a group with elementwise functions between its layers, half of the units, chosen at random, are taken from the
      outputs of the producers. What reaches the consumer must then be the other half of what reached it before.
    - In one that combines units, those of each head are mixed at random: what reaches the consumer must be mixed alike.
    - Where units of two weights are multiplied with each other, those of one weight are doubled or halved at random,
      and those of the other halved or doubled: nothing else may change.

    With the inputs of the consumer put back to what they were, the outputs of the model must be what they were. All
    groups are tested in three runs of the model, and each alone if that fails.

    Args:
        batch: a batch of the calibration.
    """
    if not groups:
        return {}
    runner = Runner(model, gradients=False)
    with torch.inference_mode(False), torch.no_grad(), as_it_was(model, None), without_fast_path():
        inputs: dict[str, list[Tensor]] = {group.name: [] for group in groups}
        with _hooked(_recorders(group, inputs[group.name]) for group in groups):
            before = _floats(runner.forward(batch))
        unused = {group.name: "the calibration batches do not reach it" for group in groups if not inputs[group.name]}
        used = [group for group in groups if group.name not in unused]
        for restored in (True, False):  # apart: what is put back would hide what the others change
            alike = [group for group in used if (group.consumer.axis == 1) == restored]
            unused |= _faults_of_any(runner, alike, inputs, before, batch)
    return unused


def _faults_of_any(
    runner: Runner, groups: Sequence[Group], inputs: dict[str, list[Tensor]], before: list[Tensor], batch: Batch
) -> dict[str, str]:
    found = _faults(runner, groups, inputs, before, batch)
    if found is not None:
        return found
    found = {}
    for group in groups:  # together they cannot be told apart
        own = _faults(runner, [group], inputs, before, batch)
        found |= {group.name: "the model does not run with fewer units"} if own is None else own
    return found


def _faults(
    runner: Runner, groups: Sequence[Group], inputs: dict[str, list[Tensor]], before: list[Tensor], batch: Batch
) -> dict[str, str] | None:
    """Returns the faults of groups by name, or None if one of them, whichever, breaks or changes the model."""
    found: dict[str, str] = {}
    with _hooked(_changes(group, inputs[group.name], found) for group in groups):
        try:
            after = _floats(runner.forward(batch))
        except Exception:  # of any code of the model: it cannot be known which
            return None
    if len(before) == len(after) and all(_equal(x, y) for x, y in zip(before, after, strict=True)):
        return found
    if len(groups) > 1:
        return None
    if groups[0].consumer.axis == 0:
        return {groups[0].name: "other layers lie between, such as a norm: the units of both are not just multiplied"}
    return {groups[0].name: "other layers depend on the units too: the outputs of the model change without them"}


Hooks = Iterator[torch.utils.hooks.RemovableHandle]


def _recorders(group: Group, seen: list[Tensor]) -> Hooks:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_argument(args, kwargs).clone())

    yield _module(group.consumer).register_forward_pre_hook(before, with_kwargs=True)


def _changes(group: Group, expected: list[Tensor], found: dict[str, str]) -> Hooks:
    """Iterate over the hooks that change the units of a group and compare what reaches the consumer."""
    if group.consumer.axis == 0:
        yield from _scaled(group)
        return
    change = _mixed(group) if group.combines else _cut(group)
    calls = iter(expected)

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, whole = _argument(args, kwargs), next(calls)
        wanted = change(group.consumer, whole)
        if x.shape != wanted.shape:
            found[group.name] = f"its inputs have {x.shape[-1]} entries where {wanted.shape[-1]} units are left"
        elif not _equal(x, wanted):
            found[group.name] = "units that stay change when others are removed: a layer between them mixes units"
        return ((whole, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): whole})

    for part in group.producers:
        yield _module(part).register_forward_hook(lambda _module, _args, y, part=part: change(part, y))
    yield _module(group.consumer).register_forward_pre_hook(compare, with_kwargs=True)


Change = Callable[[Part, Tensor], Tensor]
"""Maps the entries (\\*batch, rows or columns of a part) to what they are once the units are changed."""


def _cut(group: Group) -> Change:
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))
    half = order[: max(group.units // 2, 1)].sort().values
    return lambda part, x: x[..., part.kept(half).to(x.device)]


def _mixed(group: Group) -> Change:
    size = group.units
    given = torch.randn(group.heads, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stretched = 2 ** torch.arange(size, dtype=given.dtype).remainder(2)
    turn = torch.linalg.qr(given).Q * stretched  # no rotation: norms would hide

    def change(part: Part, x: Tensor) -> Tensor:
        places = part.places.reshape(group.heads, size, -1).to(x.device)
        turned = x.clone()
        turned[..., places] = torch.einsum("bjk,...bks->...bjs", turn.to(x), x[..., places])
        return turned

    return change


def _scaled(group: Group) -> Hooks:
    doubled = torch.randint(0, 2, (len(group.consumer.places),), generator=torch.Generator().manual_seed(0)).bool()
    for part, sign in ((group.producers[0], 1), (group.consumer, -1)):
        scale = torch.ones(part.site.shape[0])
        scale[part.places] = torch.where(doubled, 2.0**sign, 2.0**-sign)[:, None].expand_as(part.places)
        yield _module(part).register_forward_hook(lambda _module, _args, y, scale=scale: y * scale.to(y))


@contextmanager
def _hooked(hooks: Iterator[Hooks]) -> Iterator[None]:
    handles = []
    try:
        for each in hooks:
            for handle in each:
                handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module(part: Part) -> nn.Module:
    return part.site.users[0].module


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _floats(output: object) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    scale = float(y.abs().max()) if y.numel() else 0.0
    return bool(((x - y).abs() <= TOLERANCE.get(y.dtype, 1e-4) * scale).all())
