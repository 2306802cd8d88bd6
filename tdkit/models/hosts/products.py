"""See the products of a module with one of its parameters, wherever in its forward they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tdkit.models.hosts.base import Handles, Observer, Removable


def observing(module: nn.Module, weight: str, observe: Observer, *, looks_up: bool) -> Removable:
    """Call ``observe(x, y)`` at each product ``F.linear(x, weight)`` in the forward of a module; its result replaces y.

    Products that are computed by other functions are not seen.

    Args:
        weight: the name of the parameter of `module`.
        looks_up: see look-ups ``F.embedding(x, weight)`` instead.
    """
    running: list[_Observing] = []

    def enter(_: nn.Module, __: Any) -> None:
        mode = _Observing(getattr(module, weight), observe, looks_up=looks_up)
        mode.__enter__()  # type: ignore[no-untyped-call]
        running.append(mode)

    def leave(*_: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return Handles(module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True))


class _Observing(TorchFunctionMode):
    def __init__(self, weight: Tensor, observe: Observer, *, looks_up: bool) -> None:
        super().__init__()
        self.weight = weight
        self.observe = observe
        self.function = F.embedding if looks_up else F.linear

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        output = func(*args, **given)
        if func is self.function:
            x, weight = (args[i] if len(args) > i else given.get(name) for i, name in enumerate(("input", "weight")))
            if weight is self.weight:
                return self.observe(x, output)  # type: ignore[arg-type]
        return output
