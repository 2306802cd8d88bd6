"""A dense weight that is kept from call to call for as long as the factors it was built from are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class HeldWeight:
    """At most one dense weight, with what tells whether it is still that of the factors.

    A change is seen when a factor is another tensor, has another storage, or was written in place (its
    version counter moved). Writing through ``factor.data`` moves no counter and is not seen.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._sources: list[tuple[Tensor, int, int]] = []  # factor, address, version
        self._aliases: list[Tensor] = []  # keep the storages alive, so that no address is used again
        self._lies_long = False
        self._served: tuple[int, torch.dtype] | None = None  # size and dtype of the x of the last call
        self._device = "cpu"

    def again(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor | None:
        """The weight, where the last call `served` an x like this one and the factors are unchanged; None otherwise.

        Calls in a row need to know nothing else, and that is worth a way of its own: when a weight has passed
        through the cache, a step of Python takes about ten times as long as in a tight loop.
        """
        if (
            self._served != (x.numel(), x.dtype)
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(self._device)
            or not self._is_of(factors)
        ):
            return None
        return self._weight

    def served(self, x: Tensor) -> None:
        """Say that a call whose x is like this one, without gradients and autocast, takes the weight as it is."""
        device = x.device.type
        if torch.amp.is_autocast_available(device):
            self._served, self._device = (x.numel(), x.dtype), device

    def get(
        self, factors: Sequence[Tensor], dtype: torch.dtype, build: Callable[[], Tensor], *, few: bool = False
    ) -> Tensor | None:
        """The weight in `dtype`, built by `build` when there is none or the factors have changed.

        From the first time on that it is wanted for a `few` vectors it lies in memory along its longer side, as
        such products read it fastest.

        None for factors made in inference mode: they count no versions, so that changes cannot be seen. None
        also while a CUDA graph is captured: what it builds has no values until the graph is replayed.
        """
        if self._weight is not None and self._dtype is dtype and self._is_of(factors):
            return self._weight if not few or self._lies_long else self._laid_long(self._weight)
        self.drop()
        if any(factor.is_inference() for factor in factors) or _captured(factors):
            return None
        with torch.inference_mode(False), torch.no_grad():
            self._weight = weight = build().to(dtype).contiguous()
        self._dtype = dtype
        self._sources = [(factor, factor.data_ptr(), factor._version) for factor in factors]
        self._aliases = [factor.detach() for factor in factors]
        return self._laid_long(weight) if few else weight

    def drop(self) -> None:
        """Forget the weight."""
        self._weight, self._dtype, self._sources, self._aliases = None, None, [], []
        self._lies_long = False
        self._served = None

    def _laid_long(self, weight: Tensor) -> Tensor:
        self._lies_long = True
        if weight.shape[0] >= weight.shape[1]:
            with torch.inference_mode(False), torch.no_grad():
                self._weight = weight = weight.T.contiguous().T
        return weight

    def _is_of(self, factors: Sequence[Tensor]) -> bool:
        for now, (then, address, version) in zip(factors, self._sources, strict=True):
            if now is not then or now._version != version or now.data_ptr() != address:
                return False
        return True

    def __reduce__(self) -> tuple[type[HeldWeight], tuple[()]]:
        return HeldWeight, ()  # neither copies nor pickles carry the weight

    @property
    def bytes(self) -> int:
        """What the weight takes in memory; 0 while there is none."""
        return 0 if self._weight is None else self._weight.numel() * self._weight.element_size()


def _captured(factors: Sequence[Tensor]) -> bool:
    return any(factor.is_cuda for factor in factors) and torch.cuda.is_current_stream_capturing()
