"""Replace layers of a model by factorised ones, reversibly, and spill the replaced weights to disk."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import TensorWeakRef

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import CheckpointError
from tdkit.models.attributes import Attributes
from tdkit.models.hosts.base import become, install, install_resized
from tdkit.models.sites import Site, User, changes_in_place, replace_module
from tdkit.models.ties import follow_ties
from tdkit.support.aside import Aside, Place
from tdkit.support.compatibility import own_parameters, parameters_of, shallow_copy


@dataclass(frozen=True, eq=False)
class Resized:
    """The tensors of the dense layer that replaces another one, of another size as a rule.

    Attributes:
        weight: (out, in), of the dtype and on the device of the one that it replaces.
        bias: (out,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def params(self) -> int:
        """The number of entries of the weight."""
        return self.weight.numel()

    def to(self, device: torch.device) -> Resized:
        return Resized(self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def cpu(self) -> Resized:
        return self.to(torch.device("cpu"))


Fitted = Sequence[tuple[Site, FactorizedMatrix | Resized]]

SPILL_FROM = 2**26  # bytes of replaced weights above which they are spilled to disk

_log = logging.getLogger(__name__)


@dataclass
class _Replaced:
    """A dense layer that was replaced.

    Attributes:
        dense: the layer or, once one of its weights is spilled, a shallow copy of it without that weight.
        original: a weak reference to the layer.
        options: the options of the layer that its host needs to build the factorised one.
        in_place: whether the layer becomes the factorised one; `dense` is then a shallow copy of it.
        matrices: the factorised matrices that replace its weights so far, by weight name.
    """

    dense: nn.Module
    original: weakref.ref[nn.Module]
    options: Mapping[str, Any]
    in_place: bool = False
    matrices: dict[str, FactorizedMatrix] = field(default_factory=dict)

    def take(self, layer: nn.Module) -> nn.Module:
        """Returns the module to put in the place of the dense layer: the layer itself if it changes in place."""
        module = self.original()
        if not self.in_place or module is None:
            return layer
        become(module, layer)
        return module

    def forget(self, weight: str, placeholder: nn.Parameter) -> None:
        """Drop the reference to the layer and keep a shallow copy of it with a placeholder for the weight."""
        if self.dense is self.original():
            self.dense = copy.copy(self.dense)
            own_parameters(self.dense)
        parameters_of(self.dense)[weight] = placeholder


@dataclass(frozen=True)
class _Spilled:
    """A weight spilled to a file.

    Attributes:
        place: in the file.
        stride: the strides of the weight.
        device: the device of the weight.
        original: a weak reference to the parameter, which is reused if it is still alive.
        placeholder: the parameter on the meta device that replaces it in the layers.
    """

    place: Place
    stride: tuple[int, ...]
    device: torch.device
    original: TensorWeakRef
    placeholder: nn.Parameter

    def restored(self, file: Aside) -> nn.Parameter:
        held = self.original()
        if held is not None:
            return cast(nn.Parameter, held)
        stored = file.get(self.place)
        weight = torch.empty_strided(stored.shape, self.stride, dtype=stored.dtype, device=self.device).copy_(stored)
        return nn.Parameter(weight, requires_grad=self.placeholder.requires_grad)


class Swap:
    """A reversible replacement of layers of a model.

    Args:
        model: the model whose layers are replaced.
        spill: write the replaced weights to a temporary file and release them, so that memory shrinks while the
            model is compressed; `undo` reads them back. A weight or layer with other references stays in memory,
            and `undo` restores that same object.
    """

    def __init__(self, model: nn.Module, *, spill: bool = False) -> None:
        self.model = model
        self._replaced: dict[str, _Replaced] = {}  # by the name of the layer, in order
        self._spilled: list[_Spilled] = []
        self._undo = [Attributes(model).restore]
        self._file = _file() if spill else None

    def dense(self, layer: str) -> nn.Module:
        """Returns the dense layer of this name, also once it is replaced.

        Raises:
            AttributeError: when the model has no such layer.
        """
        record = self._replaced.get(layer)
        return self.model.get_submodule(layer) if record is None else record.dense

    def put(self, fitted: Fitted, options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Replace every layer of each site by a factorised one, or by a dense one of another size.

        Args:
            fitted: the sites and their factorised matrices, or the tensors of the other size.
            options: `Host.options` by the name of the layer; read from the dense layers when None.
        """
        for site, matrix in fitted:
            built: dict[int, nn.Module] = {}  # one layer per module, also when it has several names
            records = [self._record(user, options) for user in site.users]
            weight = parameters_of(records[0].dense).get(site.users[0].weight)
            for user, record in zip(site.users, records, strict=True):
                if id(record) not in built:
                    built[id(record)] = record.take(_built(user, record, matrix))
                replace_module(self.model, user.layer, built[id(record)])
            if self._file is not None and weight is not None:
                self._spill(weight, site, records, self._file)

    def when_undone(self, call: Callable[[], None]) -> None:
        """Call ``call()`` in `undo`, once the layers are restored; what was given last is called first."""
        self._undo.append(call)

    def keep_numbers(self) -> None:
        """Make `undo` give the tensors that the model has now the memory that they have now, after a cast of them."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        held = [(tensor, tensor.data) for tensor in tensors if not is_lazy(tensor)]

        def restore() -> None:
            for tensor, data in held:
                tensor.data = data

        self.when_undone(restore)

    def undo(self) -> None:
        """Restore all replaced layers, and what the model knows of them.

        Raises:
            CheckpointError: when spilled weights cannot be read back; the other layers are restored all the same.
        """
        restored, lost = self._read_back()
        for name, record in reversed(self._replaced.items()):
            original = record.original()
            dense = record.dense if original is None or record.in_place else original
            for weight, parameter in parameters_of(dense).items():
                if id(parameter) in restored:
                    parameters_of(dense)[weight] = restored[id(parameter)]
            if record.in_place and original is not None:
                become(original, dense)
                dense = original
            replace_module(self.model, name, dense)
        while self._undo:
            self._undo.pop()()
        self._replaced.clear()
        self._spilled.clear()
        if lost:
            raise CheckpointError(
                f"{len(lost)} weights that were set aside on disk cannot be read back ({lost[0]}) and are on the meta "
                "device now: load the model again"
            )

    def close(self) -> None:
        """Release the replaced layers and delete the file; `undo` is no longer possible."""
        self._replaced.clear()
        self._spilled.clear()
        if self._file is not None:
            self._file.close()

    def _read_back(self) -> tuple[dict[int, nn.Parameter], list[OSError]]:
        """Returns the spilled weights, by the ids of their placeholders, and the errors of those that are lost."""
        restored, lost = {}, []
        for spilled in self._spilled:
            assert self._file is not None
            try:
                restored[id(spilled.placeholder)] = spilled.restored(self._file)
            except OSError as error:
                lost.append(error)
        return restored, lost

    def _record(self, user: User, options: Mapping[str, Mapping[str, Any]] | None) -> _Replaced:
        """Returns the record of a layer; all names of a layer share one record."""
        if user.layer not in self._replaced:
            module = user.module
            same = (record for record in self._replaced.values() if record.original() is module)
            record = next(same, None)
            if record is None:
                in_place = changes_in_place(user.host, user.layer)
                dense = shallow_copy(module) if in_place else module
                known = user.host.options(module) if options is None else options[user.layer]
                record = _Replaced(dense, weakref.ref(module), known, in_place)
            self._replaced[user.layer] = record
        return self._replaced[user.layer]

    def _spill(self, weight: Tensor, site: Site, records: list[_Replaced], file: Aside) -> None:
        try:
            place = file.put(weight)
        except OSError as error:
            _log.warning("no room to spill weights to the temporary folder (%s): they stay in memory", error)
            return
        empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
        placeholder = nn.Parameter(empty, requires_grad=weight.requires_grad)
        self._spilled.append(_Spilled(place, weight.stride(), weight.device, TensorWeakRef(weight), placeholder))
        for user, record in zip(site.users, records, strict=True):
            record.forget(user.weight, placeholder)


def _file() -> Aside | None:
    try:
        return Aside()
    except OSError as error:
        _log.warning("no temporary file to spill weights to (%s): they stay in memory", error)
        return None


def _built(user: User, record: _Replaced, matrix: FactorizedMatrix | Resized) -> nn.Module:
    if isinstance(matrix, Resized):
        return install_resized(record.dense, user.host, matrix.weight, matrix.bias)
    record.matrices[user.weight] = matrix
    return install(record.dense, user.host.build(record.dense, record.matrices, record.options))


@contextmanager
def swapping(model: nn.Module, sites: Iterable[Site] = ()) -> Iterator[Swap]:
    """A context manager that yields a `Swap`, and undoes it when the block raises, Ctrl-C included.

    Args:
        model: the model whose layers are replaced.
        sites: the sites to be replaced; their weights are spilled to disk if they exceed `SPILL_FROM` bytes.
    """
    size = sum(site.params * site.weight.element_size() for site in sites)
    swap = Swap(model, spill=size > SPILL_FROM)
    try:
        yield swap
        follow_ties(model)
    except BaseException:
        swap.undo()
        raise
    finally:
        swap.close()
