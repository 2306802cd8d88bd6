"""The modules of a model as a tree with their parameters; siblings that are built alike share a branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from tdkit.shapes import by

ALIKE = 3  # consecutive siblings of one structure from which they share a branch


@dataclass(frozen=True)
class Branch:
    """A module, or consecutive siblings that consist of modules of the same classes.

    Attributes:
        depth: 0 for the model.
        name: the last part of the module's name, 'first-last' for several.
        kind: the class.
        count: number of modules that the branch stands for, in the whole model.
        params: the fewest and the most parameters of one of them, with all its parts; tied ones are counted once.
        shapes: of the module's own parameters, by name; '...' where they differ between the modules.
    """

    depth: int
    name: str
    kind: str
    count: int
    params: tuple[int, int]
    shapes: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "params": list(self.params), "shapes": dict(self.shapes)}


def tree_of(model: nn.Module) -> list[Branch]:
    """Returns the branches of a model in the order of its modules, each followed by its parts."""
    return _branches("", [model], 0)


def check_tree(branches: Sequence[Branch], name: str) -> None:
    """Check that each branch is at most one deeper than the one before it.

    Raises:
        ValueError: when one is not.
    """
    depths = [each.depth for each in branches]
    for number, (before, depth) in enumerate(zip([-1, *depths], depths, strict=False)):
        if not 0 <= depth <= before + 1:
            raise ValueError(f"{name}.{number}.depth: {depth} after {before}")


def render_tree(branches: Sequence[Branch]) -> str:
    """Returns a tree as text, a line per branch, in the manner of torchinfo."""
    left = [f"{'  ' * each.depth}{each.name + ': ' if each.name else ''}{each.kind}" for each in branches]
    shapes = [", ".join(f"{name} {shape}" for name, shape in each.shapes.items()) for each in branches]
    params = [_params(each) for each in branches]
    widths = [max(map(len, column), default=0) for column in (left, params)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in zip(left, params, shapes, strict=True)]
    return "\n".join(lines)


def _params(branch: Branch) -> str:
    least, most = branch.params
    each = "" if least == most and branch.count == 1 else f"{branch.count} x "
    return each + (f"{least:,}" if least == most else f"{least:,}..{most:,}")


def _branches(name: str, modules: Sequence[nn.Module], depth: int) -> list[Branch]:
    first = modules[0]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    branch = Branch(depth, name, type(first).__name__, len(modules), (min(sizes), max(sizes)), _shapes(modules))
    found = [branch]
    for names in _alike(first):
        label = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
        parts = [dict(module.named_children())[each] for module in modules for each in names]
        found += _branches(label, parts, depth + 1)
    return found


def _shapes(modules: Sequence[nn.Module]) -> dict[str, str]:
    shapes: dict[str, str] = {}
    for name, parameter in modules[0].named_parameters(recurse=False):
        alike = all(dict(other.named_parameters(recurse=False))[name].shape == parameter.shape for other in modules)
        shapes[name] = by(tuple(parameter.shape)) if alike else "..."
    return shapes


def _alike(module: nn.Module) -> list[list[str]]:
    """Returns the names of the children, those of consecutive ones of one structure together."""
    groups: list[tuple[object, list[str]]] = []
    for name, child in module.named_children():
        structure = _structure(child)
        if groups and groups[-1][0] == structure and name.isdigit():
            groups[-1][1].append(name)
        else:
            groups.append((structure, [name]))
    found = []
    for _, names in groups:
        found += [names] if len(names) >= ALIKE else [[name] for name in names]
    return found


def _structure(module: nn.Module) -> object:
    own = tuple(name for name, _ in module.named_parameters(recurse=False))
    return type(module).__name__, own, tuple((name, _structure(child)) for name, child in module.named_children())
