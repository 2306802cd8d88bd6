"""Which item goes to which place so that the summed gain is largest."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_SIZE = 1024  # a linear assignment of this size takes a tenth of a second, one of 3072 up to five


def best_assignment(
    gain: Tensor,  # (places, items), square, any float dtype
    *,
    exact_size: int = EXACT_SIZE,
) -> Tensor:  # (places,) int64, the item of each place
    """The assignment of items to places with the largest summed gain.

    Exact when every place's best item is different (which proves it) and up to `exact_size` places. Beyond
    that, places and items that prefer each other are settled first and the rest is assigned exactly in
    portions of `exact_size` places, each to what is still free.

    Source: Crouse (2016), the shortest augmenting paths of `scipy.optimize.linear_sum_assignment`.
    """
    gain = gain.detach().cpu()
    size = len(gain)
    favourite = gain.argmax(dim=1)
    if len(set(favourite.tolist())) == size:
        return favourite
    if size <= exact_size:
        return _exact(gain)
    settled = gain.argmax(dim=0)[favourite] == torch.arange(size)
    order = torch.where(settled, favourite, -1)
    free = torch.ones(size, dtype=torch.bool)
    free[favourite[settled]] = False
    for portion in torch.split((~settled).nonzero().flatten(), exact_size):
        items = free.nonzero().flatten()
        chosen = items[_exact(gain[portion][:, items])]
        order[portion] = chosen
        free[chosen] = False
    return order


def _exact(gain: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment  # here: importing tdkit must stay quick

    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
