"""One model of the zoo: how it is built, called and trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdkit import Decomposition, LowRank, Rule

LOW_RANK = LowRank()
GOAL = 0.99  # of the parameters in weights that can shrink

Inputs = tuple[Any, ...] | Mapping[str, Any]


def floats(output: object) -> list[Tensor]:
    """The floating-point tensors of an output: of a tensor, a tuple, a dictionary or a dataclass of transformers."""
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def projection(output: object) -> Tensor:
    """A loss that every element of the output has a different share in."""
    tensors = [x for x in floats(output) if x.requires_grad]
    return torch.stack([(x.flatten() * torch.arange(x.numel(), dtype=x.dtype).cos()).mean() for x in tensors]).sum()


@dataclass(frozen=True)
class Architecture:
    """A model of the zoo.

    Attributes:
        name: of the architecture, as its authors write it.
        build: returns a model with random weights.
        inputs: returns its positional or keyword arguments.
        share: lower bound on the share of the parameters that can be rewritten, of those in weights that can shrink.
        reason: why `share` is below `GOAL`.
        kind: the decomposition of the weights that `match` selects; the others are of low rank.
        match: the pattern of a rule.
        loss: of the output.
        fault: what fails when it is compressed, saved and loaded, and is not mended yet.
    """

    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[], Inputs] = field(repr=False)
    share: float = GOAL
    reason: str = ""
    kind: Decomposition = LOW_RANK
    match: str = "*"
    loss: Callable[[Any], Tensor] = field(default=projection, repr=False)
    fault: str = ""

    def __post_init__(self) -> None:
        assert (self.share < GOAL) == bool(self.reason), f"{self.name}: a share below {GOAL} has a reason"

    def model(self, seed: int = 0) -> nn.Module:
        """A model in float64 and eval mode."""
        torch.manual_seed(seed)
        return self.build().double().eval()

    def rules(self) -> list[Rule]:
        """The rules of a policy for all weights."""
        return [Rule(self.match, self.kind), *([] if self.match == "*" else [Rule("*", LOW_RANK)])]

    def call(self, model: nn.Module) -> Any:
        """The output of a model, with the same inputs and random numbers in each call."""
        batch = self.batch()
        return model(**batch) if isinstance(batch, Mapping) else model(*batch)

    def batch(self) -> Inputs:
        """The inputs in float64; sets the state of the random number generator."""
        torch.manual_seed(2)
        inputs = self.inputs()
        if isinstance(inputs, Mapping):
            return {name: _double(value) for name, value in inputs.items()}
        return tuple(_double(value) for value in inputs)

    def output(self, model: nn.Module) -> list[Tensor]:
        """The floating-point tensors of the output of a model."""
        return floats(self.call(model))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
