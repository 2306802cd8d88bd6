"""Fit the factors of single layers, and put them into the model so that it can be undone."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.hosts.base import FactorizedLayer, install
from tdkit.models.sites import Site, replace_module
from tdkit.models.ties import follow_ties

Fitted = list[tuple[Site, FactorizedMatrix]]

ASIDE_FROM = 2**26  # bytes of weights to be replaced from which they wait on disk, so that memory does not grow

_log = logging.getLogger(__name__)


class Swap:
    """Layers put in the place of others, in order; each can be undone.

    Args:
        model: whose layers are replaced.
        aside: write the weights that are replaced to a temporary file and let go of their memory, so that the
            model shrinks while it is rewritten; undoing reads them back.
    """

    def __init__(self, model: nn.Module, *, aside: bool = False) -> None:
        self.model = model
        self._done: list[tuple[str, nn.Module]] = []
        self._aside: list[tuple[nn.Parameter, Path]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="tdkit-weights-") if aside else None

    def put(self, fitted: Fitted) -> None:
        """Replace every layer of each site by one around its factors."""
        for site, matrix in fitted:
            built: dict[int, FactorizedLayer] = {}  # one layer per module, also when it has several names
            for user in site.users:
                if id(user.module) not in built:
                    layer = user.host.build(user.module, matrix, user.host.options(user.module))
                    built[id(user.module)] = install(user.module, layer)
            for user in site.users:
                self._done.append((user.name, user.module))
                replace_module(self.model, user.name, built[id(user.module)])
            if self._folder is not None:
                self._set_aside(site.users[0].module, Path(self._folder.name))

    def undo(self) -> None:
        """Put back everything that was replaced."""
        for parameter, path in reversed(self._aside):
            parameter.data = load_file(path)["weight"].to(parameter.device)
        self._aside.clear()
        for name, module in reversed(self._done):
            replace_module(self.model, name, module)
        self._done.clear()

    def close(self) -> None:
        """Forget what was replaced: it can no longer be undone."""
        self._done.clear()
        self._aside.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _set_aside(self, module: nn.Module, folder: Path) -> None:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        path = folder / f"{len(self._aside):06}.safetensors"
        try:
            save_file({"weight": weight.detach().contiguous()}, path)
        except (OSError, SafetensorError) as error:
            _log.warning("no room to set weights aside in %s (%s): they stay in memory", folder, error)
            path.unlink(missing_ok=True)
            return
        self._aside.append((weight, path))
        weight.data = weight.data.new_empty(0)


@contextmanager
def swapping(model: nn.Module, sites: Iterable[Site] = ()) -> Iterator[Swap]:
    """A `Swap` that stands when the block ends and is undone when it raises, Ctrl-C included.

    Args:
        model: whose layers are replaced.
        sites: those that will be; where they hold more than `ASIDE_FROM` bytes the weights are set aside on disk.
    """
    size = sum(site.weight.numel() * site.weight.element_size() for site in sites)
    swap = Swap(model, aside=size > ASIDE_FROM)
    try:
        yield swap
        follow_ties(model)
    except BaseException:
        swap.undo()
        raise
    finally:
        swap.close()
