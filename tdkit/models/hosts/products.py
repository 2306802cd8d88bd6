"""See the products of a module with one of its parameters, wherever in its forward they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tdkit.models.hosts.base import Handles, Observer, Removable
from tdkit.models.hosts.windows import observed
from tdkit.products.convolution import FUNCTIONS, Geometry


def observing(module: nn.Module, weight: str, observe: Observer, *, looks_up: bool) -> Removable:
    """Call ``observe(x, y)`` at each product with a weight in the forward of a module; its result replaces y.

    Seen are ``F.linear(x, weight)`` and ``F.conv1d(x, weight)``, ``F.conv2d`` and ``F.conv3d``, the latter with the
    rows that `tdkit.models.hosts.windows.observed` gives; products that are computed by other functions are not.

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
        self.functions = {F.embedding: _row} if looks_up else {F.linear: _row} | dict.fromkeys(FUNCTIONS, _convolution)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        output = func(*args, **given)
        see = self.functions.get(func)
        if see is not None and (args[1] if len(args) > 1 else given.get("weight")) is self.weight:
            return see(self.observe, output, *args, **given)
        return output


def _row(observe: Observer, output: Tensor, input: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: A002, as torch's
    return observe(input, output)


def _convolution(
    observe: Observer,
    output: Tensor,
    input: Tensor,  # noqa: A002, as torch's
    weight: Tensor,
    *arguments: Any,
    **named: Any,
) -> Tensor:
    others = {name: value for name, value in named.items() if name != "bias"}
    return observed(observe, input, output, Geometry.of_call(weight.shape[2:], *arguments[1:], **others))
