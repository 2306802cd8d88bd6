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
        self._sources: list[tuple[Tensor, Tensor, int]] = []  # factor, alias that keeps its storage alive, version

    def get(self, factors: Sequence[Tensor], dtype: torch.dtype, build: Callable[[], Tensor]) -> Tensor:
        """The weight in `dtype`, built by `build` when there is none or the factors have changed."""
        if self._weight is None or self._dtype != dtype or not self._is_of(factors):
            with torch.inference_mode(False), torch.no_grad():
                self._weight = build().to(dtype).contiguous()
            self._dtype = dtype
            self._sources = [(factor, factor.detach(), factor._version) for factor in factors]
        return self._weight

    def drop(self) -> None:
        """Forget the weight."""
        self._weight, self._dtype, self._sources = None, None, []

    def _is_of(self, factors: Sequence[Tensor]) -> bool:
        return len(factors) == len(self._sources) and all(
            now is then and now._version == version and now.data_ptr() == alias.data_ptr()
            for now, (then, alias, version) in zip(factors, self._sources, strict=True)
        )

    @property
    def bytes(self) -> int:
        """What the weight takes in memory; 0 while there is none."""
        return 0 if self._weight is None else self._weight.numel() * self._weight.element_size()


def holdable(factors: Sequence[Tensor]) -> bool:
    """Whether changes of these factors can be seen: tensors made in inference mode have no versions."""
    return not any(factor.is_inference() for factor in factors)
