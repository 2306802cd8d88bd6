"""LoRA adapters of peft on factorised layers: on their output, with the factors left as they are."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix, assign
from tdkit.decompositions.low_rank import LowRank, LowRankMatrix
from tdkit.errors import AdapterError, MissingDependencyError
from tdkit.models.hosts.base import FactorizedModule
from tdkit.models.hosts.embedding import FactorizedEmbedding
from tdkit.models.hosts.linear import FactorizedConv1D, FactorizedLinear

try:
    from peft.tuners import lora
    from peft.tuners.tuners_utils import check_adapters_to_merge
    from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
except ImportError as error:
    raise MissingDependencyError("LoRA adapters need peft: pip install 'tdkit[peft]'") from error

Config = TypeVar("Config")

STARTS = (True, False, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base weight alone

VARIANTS = (
    *("use_dora", "use_bdlora", "use_qalora", "arrow_config", "alora_invocation_tokens", "velora_config"),
    *("monteclora_config", "kasa_config"),
)
"""Options of peft that ask for another computation than plain LoRA."""


def for_factorized(config: Config, model: nn.Module) -> Config:
    """Make peft's LoRA reach the factorised layers of `model`, by changing and returning `config`.

    Factorised linear layers, those in the place of transformers' ``Conv1D``, and embeddings are targeted by the names
    that they had when they were dense, such as ``q_proj``, ``c_attn`` or ``embed_tokens``. Dense layers of the model
    are adapted as peft does. ``target_modules="all-linear"`` becomes the list of the linear layers, dense and
    factorised, without the output embedding or the classifier. An adapter adds ``scaling * B A x`` to the output of
    the layer, whose factors are frozen. Hu et al. (2022), section 4.1.

    The mapping to layers is not stored with an adapter: pass the config to load one,
    ``PeftModel.from_pretrained(model, folder, config=for_factorized(LoraConfig.from_pretrained(folder), model))``.

    Args:
        config: a ``peft.LoraConfig``.
        model: the compressed model, before peft wraps it.

    Returns:
        The same config.

    Raises:
        AdapterError: when the config is not one of LoRA, or asks for what reads or writes the dense weight: a variant
            such as DoRA, or an initialisation such as PiSSA.
    """
    if type(config) is not lora.LoraConfig:
        raise AdapterError(
            f"{type(config).__name__} is no peft.LoraConfig: of peft's methods only LoRA can be told of factorised "
            "layers; the others adapt the layers that are still dense, without for_factorized"
        )
    options: Any = config
    _check(options)
    if str(options.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        options.target_modules = _linear_layers(model)
    options._register_custom_module({FactorizedLinear: LoraLinear, FactorizedEmbedding: LoraEmbedding})
    return config


def _check(config: Any) -> None:
    asked = [name for name in VARIANTS if getattr(config, name, None)]
    if asked:
        raise AdapterError(
            f"{asked[0]}={getattr(config, asked[0])!r}: factorised layers take plain LoRA (and use_rslora), because "
            "variants compute with the dense weight, which these layers do not hold"
        )
    if config.init_lora_weights not in STARTS:
        raise AdapterError(
            f"init_lora_weights={config.init_lora_weights!r} changes the dense weight of the layer, which factorised "
            f"layers do not hold: give one of {', '.join(map(repr, STARTS))}"
        )


def _linear_layers(model: nn.Module) -> set[str]:
    """Returns the names of the linear layers, dense and factorised, that peft means by "all-linear"."""
    from transformers.pytorch_utils import Conv1D  # peft needs transformers

    heads = {id(getattr(model, name, None)) for name in SEQ_CLS_HEAD_NAMES}
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FactorizedModule))
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | FactorizedLinear)
        and module is not outputs
        and id(module) not in heads
        and not name.startswith(inside)
    }
    if not found:
        raise AdapterError(f"target_modules='all-linear' matches no layer of {type(model).__name__}: name the layers")
    return found


class _OnFactors:
    """What adapters on factorised layers have in common: plain LoRA, merged where the sum has a low rank."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to a low-rank matrix as further columns and rows of its factors.

        Raises:
            AdapterError: when the matrix is of another decomposition, the rank of the sum exceeds the full rank, the
                adapter has a bias and the layer none or, with `safe_merge`, a result is not finite.
        """
        layer = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.scaling:
                continue
            matrix, bias = _widened(layer.matrix, name, *self.delta_factors(name)), getattr(layer, "bias", None)
            if self.lora_bias[name]:
                bias = _shifted(bias, name, self.lora_B[name].bias * self.scaling[name])
            made = [*matrix.parameters(), *([] if bias is None else [bias])]
            if safe_merge and not all(bool(tensor.isfinite().all()) for tensor in made):
                raise AdapterError(f"adapter '{name}' has weights that are not finite: it is not merged")
            self.before_merge.append((layer.matrix, getattr(layer, "bias", None)))
            _put(layer, matrix, bias)
            self.merged_adapters.append(name)

    def unmerge(self: Any) -> None:
        """Put the matrices before each `merge` back."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            _put(self.get_base_layer(), *self.before_merge.pop())


class LoraLinear(_OnFactors, lora.Linear):  # type: ignore[misc]  # peft is untyped
    """An adapter on a `FactorizedLinear` or `FactorizedConv1D`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **options)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), FactorizedConv1D)
        self.before_merge: list[tuple[FactorizedMatrix, nn.Parameter | None]] = []

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer = cast(FactorizedLinear, module)
        return layer.in_features, layer.out_features

    def delta_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns (out, r) and (r, in), whose product an adapter adds to the weight."""
        return self.lora_B[name].weight * self.scaling[name], self.lora_A[name].weight


class LoraEmbedding(_OnFactors, lora.Embedding):  # type: ignore[misc]  # peft is untyped
    """An adapter on a `FactorizedEmbedding`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **options)
        self.before_merge: list[tuple[FactorizedMatrix, nn.Parameter | None]] = []

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer = cast(FactorizedEmbedding, module)
        return layer.num_embeddings, layer.embedding_dim

    def delta_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns (num_embeddings, r) and (r, embedding_dim), whose product an adapter adds to the weight."""
        return self.lora_embedding_A[name].T * self.scaling[name], self.lora_embedding_B[name].T


def _put(layer: Any, matrix: FactorizedMatrix, bias: nn.Parameter | None) -> None:
    layer.matrix = matrix
    if hasattr(layer, "bias"):
        layer.bias = bias
    if isinstance(layer, FactorizedEmbedding):
        matrix.lay_out_for_rows()


@torch.no_grad()
def _widened(
    matrix: FactorizedMatrix,
    name: str,
    left: Tensor,  # (out, r)
    right: Tensor,  # (r, in)
) -> FactorizedMatrix:
    """Returns a low-rank matrix plus ``left @ right``."""
    if not isinstance(matrix, LowRankMatrix):
        raise _not_merged(name, matrix, "only low rank can take up its columns and rows")
    rank = matrix.structure.rank + left.shape[1]
    if rank > min(matrix.shape):
        raise _not_merged(name, matrix, f"a rank of {rank} is above the full rank")
    wider = LowRank(rank=rank).empty(matrix.sizes, device=matrix.left.device, dtype=matrix.left.dtype)
    assign(wider.left, torch.cat([matrix.left, left.to(matrix.left)], 1))
    assign(wider.right, torch.cat([matrix.right, right.to(matrix.right)]))
    wider.requires_grad_(matrix.left.requires_grad).train(matrix.training)
    wider.dispatcher.configure(matrix.prefer)
    return wider


@torch.no_grad()
def _shifted(bias: nn.Parameter | None, name: str, by: Tensor) -> nn.Parameter:
    if bias is None:
        raise AdapterError(f"adapter '{name}' has a bias (lora_bias=True) and the layer none: it cannot be merged")
    return nn.Parameter((bias + by).to(bias.dtype), bias.requires_grad)


def _not_merged(name: str, matrix: FactorizedMatrix, why: str) -> AdapterError:
    return AdapterError(
        f"adapter '{name}' cannot be merged into {matrix.decomposition.describe()}: {why}, and layers before this one "
        "may be merged already. Keep the adapter beside the model: load the compressed model again and put the saved "
        "adapter on it by PeftModel.from_pretrained"
    )
