"""Which student layer learns from which teacher layer: by name, by pattern, by depth."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from tdkit.errors import did_you_mean
from tdkit.support.patterns import expression
from torch import nn

from tdkit_distill.errors import StageError

Layers = str | list[str] | dict[str, str]
Pairs = tuple[tuple[str, str], ...]  # (student module, teacher module)

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "output.dense", "lin2", "fc2", "linear2")
ATTENTION = ("attn", "self_attn", "attention.self", "attention", "self_attention")
EMBEDDING = ("embeddings", "transformer.wte", "model.embed_tokens")


def blocks(model: nn.Module) -> list[str]:
    """Names of the model's layers in depth order: the children of its longest ``ModuleList``.

    The outermost one wins among equals. Empty when there is none.
    """
    lists = [
        (len(module), -name.count("."), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not lists:
        return []
    length, _, name = max(lists, key=lambda entry: entry[:2])
    return [f"{name}.{k}" if name else str(k) for k in range(length)]


def by_depth(student: Sequence[str], teacher: Sequence[str]) -> Pairs:
    """Pair each student layer with the teacher's at the same relative depth; the last with the last.

    With equal counts that is the same layer. Layer i of n learns from layer ceil((i + 1) m / n) - 1 of m.
    """
    n, m = len(student), len(teacher)
    return tuple((name, teacher[-(-(i + 1) * m // n) - 1]) for i, name in enumerate(student))


def map_layers(
    student: nn.Module,
    teacher: nn.Module,
    layers: Layers,
    *,
    inside: Sequence[str] = (),
    place: str,
) -> Pairs:
    """The pairs of student and teacher modules that `layers` selects.

    Args:
        layers: ``all`` for every layer of the student at the same relative depth; a glob, ``re:`` pattern or
            list of them over the student's module names, paired with the teacher's matches by depth; or
            ``{student: teacher}`` of names or patterns.
        inside: where in each layer to look when `layers` is ``all``: the first of these that exists; the
            layer itself when empty.
        place: what asks, for the error.

    Raises:
        StageError: when something matches nothing, with the nearest name.
    """
    if isinstance(layers, dict):
        pairs: list[tuple[str, str]] = []
        for mine, theirs in layers.items():
            pairs += by_depth(
                matching(student, mine, f"{place}: student"), matching(teacher, theirs, f"{place}: teacher")
            )
        return tuple(pairs)
    if layers == "all":
        return by_depth(_parts(student, inside, f"{place}: student"), _parts(teacher, inside, f"{place}: teacher"))
    patterns = [layers] if isinstance(layers, str) else layers
    pairs = []
    for pattern in patterns:
        here = matching(student, pattern, f"{place}: student")
        pairs += by_depth(here, matching(teacher, pattern, f"{place}: teacher"))
    return tuple(pairs)


def matching(model: nn.Module, pattern: str, place: str) -> list[str]:
    """Names of the modules that a name, glob or ``re:`` pattern matches, in the model's order."""
    names: list[str] = [name for name, _ in model.named_modules() if name]
    if pattern.startswith("re:"):
        try:
            found = [name for name in names if expression(pattern[3:]).matches(name)]
        except ValueError as error:
            raise StageError(f"{place} layers '{pattern}' is no regular expression: {error}") from None
    else:  # here a star stays within one part of the name, so that h.*.mlp is not also h.0.attn.x.mlp
        glob = re.compile(fnmatch.translate(pattern).replace(".*", "[^.]*"))
        found = [name for name in names if glob.fullmatch(name)]
    if not found:
        raise StageError(f"{place} layers '{pattern}' match no module{did_you_mean(pattern, names) or _example(names)}")
    return found


def first_existing(model: nn.Module, names: Sequence[str], place: str) -> str:
    """The first module whose name is, or ends with, one of `names`."""
    known: list[str] = [name for name, _ in model.named_modules() if name]
    for wanted in names:
        for name in known:
            if name == wanted or name.endswith(f".{wanted}"):
                return name
    raise StageError(f"{place} has none of {', '.join(names)}: say which module, by name")


def _parts(model: nn.Module, inside: Sequence[str], place: str) -> list[str]:
    layers = blocks(model)
    if not layers:
        raise StageError(f"{place} has no list of layers: give layers= as names, patterns or {{student: teacher}}")
    if not inside:
        return layers
    modules = dict(model.named_modules())
    for part in inside:
        if all(f"{layer}.{part}" in modules for layer in layers):
            return [f"{layer}.{part}" for layer in layers]
    raise StageError(
        f"{place} layers like '{layers[0]}' have none of {', '.join(inside)} inside: give layers= as a pattern such as "
        f"'{layers[0].rsplit('.', 1)[0]}.*.PART'"
    )


def _example(names: Mapping[str, object] | Sequence[str]) -> str:
    first = next(iter(names), None)
    return f". Modules are named like '{first}'" if first else ""
