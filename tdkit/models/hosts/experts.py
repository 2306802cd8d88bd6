"""transformers' layers of experts, whose weights are stacks (experts, out, in), held as stacks of factors."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from tdkit.decompositions.stacks import FactorizedStack
from tdkit.models.hosts.base import FactorizedModule, Host, Observer, Removable
from tdkit.models.hosts.in_place import InPlaceHost, InPlaceLayer
from tdkit.models.hosts.routing import StackObserver, experts_forward, weights_of
from tdkit.support.compatibility import has_experts_interface, parameters_of, replace_forward

STACKS = ("gate_up_proj", "up_proj", "down_proj")
OBSERVERS = "_observers"  # the attribute with the observers of a layer, by the name of the weight


class ExpertsHost(InPlaceHost):
    """Host of the layers of experts that transformers decorates with ``use_experts_implementation``.

    The factorised layer computes only the experts that tokens are routed to, by their factors, with the layer's own
    activation, gate and biases, whatever ``experts_implementation`` is set. It is not traced as one graph by
    torch.compile: the numbers of rows are read.
    """

    name = "experts"
    is_transposed: ClassVar[bool] = False  # whether the stacks are stored as (experts, in, out)

    def __init__(self) -> None:
        super().__init__(None)

    def accepts(self, module: nn.Module) -> bool:
        if not (has_experts_interface(module) and super().accepts(module)):
            return False
        held = (parameters_of(module).get(name) for name in weights_of(module))
        is_stack = all(parameter is not None and parameter.ndim == 3 for parameter in held)
        return is_stack and bool(module.is_transposed) == self.is_transposed

    def stacked(self, module: nn.Module, weight: str) -> bool:
        return weight in STACKS

    def canonical(self, stored: Tensor, weight: str) -> Tensor:
        if weight not in STACKS:
            return super().canonical(stored, weight)
        return stored.mT if self.is_transposed else stored

    def stored(self, canonical: Tensor, weight: str) -> Tensor:
        return canonical.mT.contiguous() if self.is_transposed and weight in STACKS else canonical

    def computed(self, module: nn.Module, weight: str) -> str:
        return "by factors" if weight in STACKS else "dense"

    def layer_class(self) -> type[InPlaceLayer]:
        return ExpertsLayer

    def multiplications(self, module: nn.Module, weight: str) -> int:
        """Returns the number of experts of a token, of which each row is multiplied by one."""
        return experts_of_a_token(module) if weight in STACKS else 1

    def attach(self, module: nn.Module, weight: str, observe: Observer) -> Removable:
        if weight not in STACKS:
            return super().attach(module, weight, observe)
        return self.attach_stack(module, weight, lambda _, x, y: observe(x, y))

    def attach_stack(self, module: nn.Module, weight: str, observe: StackObserver) -> Removable:
        return _Attached(module, weight, observe)


def experts_of_a_token(module: nn.Module) -> int:
    """Returns the number of experts that each token is routed to, 1 if the configuration does not tell."""
    return int(getattr(module.config, "num_experts_per_tok", None) or 1)


def stacks_of(layer: FactorizedModule) -> dict[str, FactorizedStack]:
    """Returns the stacks of factors of a layer, by the name of the weight."""
    return {name: matrix for name, matrix in layer.matrices.items() if isinstance(matrix, FactorizedStack)}


class TransposedExpertsHost(ExpertsHost):
    """The same for layers that store their stacks as (experts, in, out), such as those of GPT-OSS."""

    name = "transposed_experts"
    is_transposed = True

    def layer_class(self) -> type[InPlaceLayer]:
        return TransposedExpertsLayer


class ExpertsLayer(InPlaceLayer):
    """A layer of experts with stacks held as factors."""

    @property
    def host(self) -> str:
        return ExpertsHost.name

    @property
    def builder(self) -> Host:
        return ExpertsHost()

    def forward(
        self,
        hidden_states: Tensor,  # (tokens, in)
        top_k_index: Tensor,  # (tokens, k)
        top_k_weights: Tensor,  # (tokens, k)
    ) -> Tensor:  # (tokens, in)
        observers = vars(self).get(OBSERVERS, {})
        return experts_forward(self, self.matrices, observers, hidden_states, top_k_index, top_k_weights)


class TransposedExpertsLayer(ExpertsLayer):
    """The layer of `TransposedExpertsHost`."""

    @property
    def host(self) -> str:
        return TransposedExpertsHost.name

    @property
    def builder(self) -> Host:
        return TransposedExpertsHost()


class _Attached:
    """An observer of a layer of experts; a dense layer computes by `experts_forward` while it has one."""

    def __init__(self, module: nn.Module, weight: str, observe: StackObserver) -> None:
        self.module = module
        self.weight = weight
        self.observe = observe
        observers: dict[str, list[StackObserver]] = vars(module).setdefault(OBSERVERS, {})
        observers.setdefault(weight, []).append(observe)
        if not isinstance(module, ExpertsLayer):
            replace_forward(module, lambda *args, **kwargs: experts_forward(module, {}, observers, *args, **kwargs))

    def remove(self) -> None:
        observers: dict[str, list[StackObserver]] = vars(self.module).get(OBSERVERS, {})
        if self.observe in observers.get(self.weight, ()):
            observers[self.weight].remove(self.observe)
            if not any(observers.values()):
                del vars(self.module)[OBSERVERS]
                if not isinstance(self.module, ExpertsLayer):
                    replace_forward(self.module, None)
