"""Save models that do not hold their tensors: the values are read when they are written, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tdkit.models.shards import Entry, write_tensors
from tdkit.support.compatibility import tensor_files_written_by

Values = Mapping[str, Callable[[], Tensor]]

_values: ContextVar[Values | None] = ContextVar("_values", default=None)


@contextmanager
def values_from(values: Values) -> Iterator[None]:
    """A context manager inside which models on the meta device are saved with `values`.

    Args:
        values: functions that return the tensors of the model's ``state_dict`` on the CPU, by name.
    """
    token = _values.set(values)
    try:
        with tensor_files_written_by(_write):
            yield
    finally:
        _values.reset(token)


def has_values(name: str, tensor: Tensor) -> bool:
    """Returns whether the values of a tensor of a model are known: it has them, or they are read when needed."""
    return not tensor.is_meta or name in (_values.get() or {})


def value_of(name: str, tensor: Tensor) -> Tensor:
    """Returns a tensor of a model, or its values if it is on the meta device."""
    values = _values.get()
    return values[name]() if tensor.is_meta and values is not None else tensor


def late_state(model: nn.Module) -> dict[str, Any] | None:
    """Returns the state of a model whose values are read when needed, with ties as one object; None outside."""
    return None if _values.get() is None else model.state_dict(keep_vars=True)


def _write(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    entries = {
        name: Entry(tensor.dtype, tuple(tensor.shape), partial(value_of, name, tensor))
        for name, tensor in tensors.items()
    }
    write_tensors(Path(path), entries, metadata or {})
