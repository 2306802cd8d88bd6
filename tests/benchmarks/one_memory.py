"""The weights of several models in the same memory, for timings that do not depend on where each was allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # elements


class OneMemory:
    """Memory that holds the weights of one model at a time.

    Of two copies of a model on a virtual machine one can be 1.5 times as fast: pages differ. Here each model spreads
    over all of the memory, with gaps between its weights if it is smaller than the largest.

    Args:
        models: all that will be held, of one dtype.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        weights = [list(model.parameters()) for model in models]
        most = max(sum(weight.numel() for weight in each) for each in weights)
        spare = ALIGNMENT * max(map(len, weights))
        self.memory = torch.empty(most + spare, dtype=weights[0][0].dtype)

    def holder(self, model: nn.Module) -> Callable[[], None]:
        """Returns a call that copies the weights of a model into the memory, where it then reads them."""
        weights = list(model.parameters())
        sources = [weight.detach() for weight in weights]
        total = sum(source.numel() for source in sources)
        stretch = (len(self.memory) - ALIGNMENT * len(sources)) / total
        views: list[Tensor] = []
        seen = 0
        for number, source in enumerate(sources):
            start = ALIGNMENT * (number + int(seen * stretch) // ALIGNMENT)
            views.append(self.memory[start : start + source.numel()].view(source.shape))
            seen += source.numel()

        def hold() -> None:
            for weight, source, view in zip(weights, sources, views, strict=True):
                view.copy_(source)
                weight.data = view

        return hold
