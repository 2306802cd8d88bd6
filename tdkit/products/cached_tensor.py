"""A tensor that is kept from call to call for as long as the tensors it was computed from are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdkit.support.compatibility import version_of

GATHERED = "_gathered_from_shards"  # an attribute of tensors whose values may change unseen
CALLS = 64  # that are remembered: the sizes of batches of an expert, or of images


class CachedTensor:
    """At most one tensor, computed from `sources`, with what tells whether it is still valid.

    A change is seen when a source is another tensor, has another storage, or was written in place (its version
    counter moved). Writing through ``source.data`` moves no counter and is not seen. A tensor that was itself written
    in place is computed again as well.

    Several threads may share one: whatever they do, each gets the tensor of its own dtype.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None  # assigned as a whole: another thread sees all of it or none

    def again(self, call: Hashable, sources: Sequence[Tensor]) -> Tensor | None:
        """The tensor, where a `get` was for a `call` equal to this and the sources are unchanged since; else None.

        The fast path of repeated calls. When a weight has passed through the CPU's caches, a step of Python takes
        about ten times as long as in a tight loop, so this one asks as little as it can.
        """
        entry = self._entry
        if (
            entry is None
            or call not in entry.calls
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(entry.device)
            or version_of(entry.tensor) != entry.version
            or not _unchanged(sources, entry.sources)
        ):
            return None
        return entry.tensor

    def find(self, sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """The tensor in `dtype` if it is there and its sources are unchanged; None otherwise."""
        entry = self._entry
        return entry.tensor if entry is not None and entry.dtype is dtype and entry.is_of(sources) else None

    def of_some(self, some: Iterable[tuple[int, Sequence[Tensor]]], dtype: torch.dtype) -> Tensor | None:
        """As `find`, where only the elements that are computed from some of the sources are read.

        Args:
            some: of each part, the place of its first tensor among the sources, and its tensors.
            dtype: of the result.
        """
        entry = self._entry
        if entry is None or entry.dtype is not dtype or version_of(entry.tensor) != entry.version:
            return None
        if not all(_unchanged(part, entry.sources[start : start + len(part)]) for start, part in some):
            return None
        return entry.tensor

    def get(
        self,
        sources: Sequence[Tensor],
        dtype: torch.dtype,
        build: Callable[[], Tensor],
        *,
        few: bool = False,
        call: Hashable = None,
        device: str = "cpu",
    ) -> Tensor | None:
        """The tensor in `dtype`, computed by `build` on a cache miss; None where `can_cache` says no.

        Args:
            few: it is a matrix, wanted for a few vectors: from then on it lies in memory along its longer side, as
                such products read it fastest.
            call: what tells calls without gradients and autocast apart: `again` answers the next equal ones.
            device: the type of the device of such a call.
        """
        entry = self._entry
        if entry is None or entry.dtype is not dtype or not entry.is_of(sources):
            self._entry = None  # its memory is free for the next one
            if not can_cache(sources):
                return None
            stamps = tuple((source, source.data_ptr(), version_of(source)) for source in sources)  # before the build
            aliases = tuple(source.detach() for source in sources)
            with torch.inference_mode(False), torch.no_grad():
                tensor = build().to(dtype).contiguous()
                if type(tensor) is not Tensor:  # such as a FakeTensor, which has no numbers
                    return tensor
                entry = _Entry(tensor, dtype, stamps, aliases, version_of(tensor))
        if few and not entry.lies_long:
            tensor = _along_the_longer_side(entry.tensor)
            entry = entry._replace(tensor=tensor, version=version_of(tensor), lies_long=True)
        if call is not None and call not in entry.calls:
            known = entry.calls if len(entry.calls) < CALLS else frozenset()
            entry = entry._replace(calls=known | {call}, device=device)
        self._entry = entry
        return entry.tensor

    def clear(self) -> None:
        """Drop the tensor."""
        self._entry = None

    def __reduce__(self) -> tuple[type[CachedTensor], tuple[()]]:
        return CachedTensor, ()  # neither copies nor pickles carry the tensor

    @property
    def bytes(self) -> int:
        """What the tensor takes in memory; 0 while there is none."""
        entry = self._entry
        return 0 if entry is None else entry.tensor.numel() * entry.tensor.element_size()


class _Entry(NamedTuple):
    tensor: Tensor
    dtype: torch.dtype
    sources: tuple[tuple[Tensor, int, int], ...]  # tensor, address, version
    aliases: tuple[Tensor, ...]  # keep the storages alive, so that no address is used again
    version: int  # of the tensor
    lies_long: bool = False
    calls: frozenset[Hashable] = frozenset()
    device: str = "cpu"  # type of the device of these calls

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        return version_of(self.tensor) == self.version and _unchanged(sources, self.sources)


def _unchanged(sources: Sequence[Tensor], stamps: Sequence[tuple[Tensor, int, int]]) -> bool:
    if len(sources) != len(stamps):
        return False
    for now, (then, address, version) in zip(sources, stamps, strict=False):
        if now is not then or version_of(now) != version or now.data_ptr() != address:
            return False
    return True


def can_cache(sources: Sequence[Tensor]) -> bool:
    """Whether what is computed from these tensors can be cached.

    Not from inference tensors: they have no version counter, so that changes in place would not be seen. Nor from
    what FSDP gathers again and again into the same memory, without a new version. Nor while a CUDA graph is captured:
    what is computed then has no values until the graph is replayed.
    """
    if any(source.is_inference() or hasattr(source, GATHERED) for source in sources):
        return False
    return not (any(source.is_cuda for source in sources) and torch.cuda.is_current_stream_capturing())


def _along_the_longer_side(matrix: Tensor) -> Tensor:
    if matrix.shape[0] < matrix.shape[1]:
        return matrix
    with torch.inference_mode(False), torch.no_grad():
        return matrix.T.contiguous().T
