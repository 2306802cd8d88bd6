"""Give the tensors of a model the values that were read from a file, in such a way that it can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdkit.models.swap import Swap
from tdkit.support.compatibility import buffers_of, parameters_of


def fill(
    swap: Swap,
    values: dict[int, Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | str | None,
) -> None:
    """Give the tensors of the model of `swap` their values: those on the meta device become these, others get copies.

    `Swap.undo` gives all of them back the numbers, the dtypes and the devices that they had. What a tensor held takes
    the place of its value in memory.

    Args:
        swap: a swap of layers of the model.
        values: by the ids of the tensors; those that are copied are removed.
        dtypes: of non-persistent buffers, by name.
        device: of the model afterwards; when None, the tensors stay where they are, and those on the meta device get
            to the CPU.
    """
    model = swap.model
    swap.keep_numbers()
    before: list[tuple[Tensor, Tensor]] = []  # the memory of a tensor, and what it held
    swap.when_undone(lambda: _copy_all(before))
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    filled: set[int] = set()  # tied ones are filled once
    others = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta or is_lazy(tensor) or id(tensor) in filled:
            continue
        if id(tensor) not in own:  # of a module that writes its state in its own way
            others[name] = values[id(tensor)]
            continue
        filled.add(id(tensor))
        value = values.pop(id(tensor))
        if value.dtype != tensor.dtype:
            with torch.inference_mode(False):
                tensor.data = torch.empty_like(tensor.data, dtype=value.dtype)
        else:
            before.append((tensor.data, tensor.detach().to(value.device, copy=True)))
        with torch.no_grad():
            tensor.copy_(value)
    for undo in _replace(model, values, device or "cpu"):
        swap.when_undone(undo)
    if others:
        model.load_state_dict(others, strict=False)
    buffers = dict(model.named_buffers())
    for name, dtype in dtypes.items():
        with torch.inference_mode(False):
            buffers[name].data = buffers[name].data.to(dtype)
    if device is not None:
        model.to(device)


@torch.no_grad()
def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in pairs:
        tensor.copy_(value)


def _replace(model: nn.Module, values: Mapping[int, Tensor], device: torch.device | str) -> list[Callable[[], None]]:
    """Replace the tensors of `model` on the meta device by `values` on `device`; ties are kept.

    Returns:
        The functions that take it back.
    """
    made: dict[int, Tensor] = {}  # by the id of the tensor on the meta device
    undo: list[Callable[[], None]] = []  # they keep the old ones alive, so that no id comes back
    for module in model.modules():
        for owned in (parameters_of(module), buffers_of(module)):
            for name, tensor in owned.items():
                if tensor is None or not tensor.is_meta:
                    continue
                undo.append(lambda owned=owned, name=name, tensor=tensor: owned.update({name: tensor}))  # type: ignore[misc]
                if id(tensor) not in made:
                    with torch.inference_mode(False):
                        value = values[id(tensor)].to(device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
                owned[name] = made[id(tensor)]  # type: ignore[assignment]
    return undo
