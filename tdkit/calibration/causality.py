"""Test whether a model is a causal language model, by running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tdkit.calibration.batches import Call
from tdkit.calibration.losses import next_token_logits

TOLERANCE = 1e-4  # of the change of the later logits; random models without causality change by 1e-3 and more


@torch.no_grad()
def is_causal(run: Callable[[Call], Any], call: Call) -> bool:
    """Returns whether the logits of a model at each token do not depend on the tokens after it.

    The later half of the tokens of each row is replaced, and the logits of the earlier half are compared with those
    before; by the median, because rounding may change single tokens whose experts were routed other tokens beside
    them. A model that has other inputs than token ids, such as images, is not tested: the result is False.

    Args:
        run: runs the model on a call and returns its output.
        call: a batch with token ids (n, tokens); two tokens of a row at least must be unmasked.
    """
    ids = call.token_ids
    if ids is None or not call.is_text:
        return False
    mask = torch.ones_like(ids, dtype=torch.bool) if call.mask is None or call.mask.shape != ids.shape else call.mask
    rank = mask.cumsum(1)
    later = mask & (rank > (mask.sum(1, keepdim=True) + 1) // 2)
    earlier = mask & ~later
    if not bool(later.any()):
        return False
    replaced = torch.where(later, torch.where(ids > 0, ids - 1, 1), ids)
    before = next_token_logits(run(call), call)
    after = next_token_logits(run(call.with_token_ids(replaced)), call)
    if before is None or after is None:
        return False
    change = (after - before).float().nan_to_num().square().mean(-1).sqrt()
    return bool(change[earlier].median() <= TOLERANCE * change[later].median())
