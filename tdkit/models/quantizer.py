"""The quantization method "tdkit" of transformers: factors in ``from_pretrained`` and ``save_pretrained``.

transformers reads and writes foreign formats through registered quantizers. Factors are no quantised weights: the
models stay ordinary ones in floating point, which can be trained, cast and compiled.

This module imports transformers; `tdkit.models.registration` imports it once transformers is there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tdkit.errors import CheckpointError
from tdkit.models.checkpoint.description import (
    FORMAT,
    Layer,
    buffer_dtypes,
    check_description,
    describe,
    layers_of,
    main_dtype,
)
from tdkit.models.checkpoint.rewriting import rewrite
from tdkit.models.checkpoint.sizes import Sizes, resize, sizes_of
from tdkit.models.checkpoint.tensors import markers, shapes_in, tensors_and_ties, tied_as_in
from tdkit.models.hosts.base import FactorizedModule
from tdkit.models.shards import DTYPES
from tdkit.models.sites import factorized_layers, is_compressed
from tdkit.models.swap import swapping
from tdkit.shapes import Shape
from tdkit.support.compatibility import buffers_of, given_state_dict

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALIGNMENT = 64  # bytes; kernels for a tensor at another address may round otherwise

_log = logging.getLogger(__name__)


class FactorsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a compressed model: the description of its factors."""

    def __init__(self, quant_method: str = FORMAT, **description: Any) -> None:
        self.quant_method = quant_method
        self.description = description

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **self.description}


class FactorsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds factorised layers before ``from_pretrained`` reads the weights, and describes them in ``save_pretrained``.

    Raises:
        CheckpointError: when the description is damaged, belongs to another model, or lacks tensors in the files.
    """

    requires_calibration = True  # only models that were saved with factors have this config

    def __init__(self, quantization_config: FactorsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._layout: dict[str, Tensor] = {}  # the factors on the meta device, as their layers want them
        self._dtypes: dict[str, torch.dtype] = {}  # of non-persistent buffers
        self._dense: dict[str, nn.Module] = {}  # layers with non-persistent buffers, before they were factorised
        self._expected: Any = None

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        place = f"{getattr(model.config, '_name_or_path', '') or 'the model'}: quantization_config"
        description = self.quantization_config.description
        check_description(description, place)
        saved = layers_of(description, place)
        layers, unread = _of_class(saved, model, place), _unread(saved, model)
        with swapping(model) as swap:
            rewrite(swap, layers, place)
            self._dense = {name: swap.dense(name) for name, module in factorized_layers(model) if _computed(module)}
            resize(swap, _sizes_in(model, sizes_of(description, place)), place)
        if not checkpoint_files or None in checkpoint_files:
            raise CheckpointError(f"{place}: factors are read from files: give from_pretrained a folder or a hub name")
        found = _Files(checkpoint_files, model)
        factors = set()
        for layer, module in factorized_layers(model):
            found.check(layer, module, place)
            factors |= {f"{layer}.{name}".lstrip(".") for name in module.state_dict()}
            for part in module.modules():
                part._is_hf_initialized = True  # type: ignore[assignment]  # its dense weight must not be
        state = model.state_dict(keep_vars=True)
        if model.config.dtype == main_dtype(description):  # no other one was asked for: each tensor keeps its own
            for name, tensor in state.items():
                own = SAFETENSORS_DTYPES.get(found.dtype(name) or "")
                if own is not None and tensor.is_floating_point() and tensor.dtype != own:
                    tensor.data = tensor.data.to(own)
            self._dtypes = buffer_dtypes(model, description, place)
        self._layout = {name: state[name] for name in factors}
        self._expected = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = _Patterns((*(self._expected or ()), *unread))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._keys_to_ignore_on_load_unexpected = self._expected
        for name in ("is_quantized", "quantization_method"):  # it is an ordinary model in floating point
            vars(model).pop(name, None)
        for module in model.modules():
            if "config" in vars(module):
                vars(module.config).pop("_is_quantized", None)
        for name, dense in self._dense.items():
            _initialize_buffers(model, name, dense)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_meta or not tensor.numel():
                continue
            wanted = self._layout.get(name, tensor)
            # transformers 5.0 casts indices too, where a class keeps its layers in float32
            dtype = tensor.dtype if wanted.is_floating_point() else wanted.dtype
            misplaced = tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT
            if tensor.stride() != wanted.stride() or tensor.dtype != dtype or misplaced:
                placed = torch.empty_strided(tensor.shape, wanted.stride(), dtype=dtype, device=tensor.device)
                tensor.data = placed.copy_(tensor.data)
        for layer, module in factorized_layers(model):
            for matrix in module.matrices.values():
                own = {name: tensor for name, tensor in matrix.state_dict().items() if not tensor.is_meta}
                fault = matrix.fault(own)
                if fault is not None:
                    raise CheckpointError(f"the files are damaged: of layer {layer}, {fault}")
        buffers = dict(model.named_buffers())
        for name, kind in self._dtypes.items():
            buffers[name].data = buffers[name].data.to(kind)
        self._layout, self._dtypes, self._dense = {}, {}, {}
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Returns what ``save_pretrained`` writes, and puts the description of the model into its config.

        A model that has no factors any more, or whose adapters alone are saved, is written as transformers does it.
        """
        given = given_state_dict()
        if getattr(model, "_hf_peft_config_loaded", False):
            return given, {}
        if not is_compressed(model):
            if isinstance(getattr(model.config, "quantization_config", None), FactorsConfig):
                del model.config.quantization_config
            return given, {}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        state = model.state_dict() if given is None else tied_as_in(model, given)
        tensors, ties = tensors_and_ties(state, {*tied, *tied.values()})
        self.quantization_config = FactorsConfig(**describe(model, tensors, ties))
        model.config.quantization_config = self.quantization_config
        model._weight_conversions = []  # the names of the file are those of the model, on which the factors depend
        model._keys_to_ignore_on_save = None
        return {**tensors, **markers(model)}, {}


def _computed(module: nn.Module) -> bool:
    """Returns whether a layer has buffers of its own that no file holds, such as the scale of an embedding."""
    return bool(buffers_of(module).keys() - module.state_dict().keys())


@torch.no_grad()
def _initialize_buffers(model: nn.Module, name: str, dense: nn.Module) -> None:
    """Let transformers compute the buffers of a factorised layer, which it does for the dense layer `dense` alone."""
    dense._buffers = buffers_of(model.get_submodule(name))
    for parameter in dense.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # left as it is
    owner: Any = model
    for place, part in model.named_modules():  # the innermost comes last
        if hasattr(part, "_init_weights") and f"{name}.".startswith(f"{place}.".lstrip(".")):
            owner = part
    owner._init_weights(dense)


class _Patterns(set[str]):
    """Regular expressions, to which transformers 5.0 adds a list and later versions a set."""

    def __add__(self, other: Collection[str]) -> list[str]:
        return [*self, *other]


class _Files:
    """The tensors in the files of ``from_pretrained``, by the names that a model gives them.

    The files may be those of the model with a head, or of the base model inside it.
    """

    def __init__(self, paths: Collection[str], model: Any) -> None:
        self._found = shapes_in(paths)
        self._prefix = f"{model.base_model_prefix}."
        names: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
        tied = getattr(model, "all_tied_weights_keys", None) or {}  # not tied yet
        self._same: dict[str, list[str]] = {}
        for group in (*names.values(), *map(list, tied.items())):
            for name in group:
                self._same.setdefault(name, []).extend(group)

    def entry(self, name: str) -> tuple[tuple[int, ...], str] | None:
        for same in self._same[name]:
            for spelt in (same, same.removeprefix(self._prefix), f"{self._prefix}{same}"):
                if spelt in self._found:
                    return self._found[spelt]
        return None

    def dtype(self, name: str) -> str | None:
        entry = self.entry(name)
        return None if entry is None else entry[1]

    def check(self, layer: str, module: FactorizedModule, place: str) -> None:
        for own, tensor in module.state_dict(keep_vars=True).items():
            name = f"{layer}.{own}".lstrip(".")
            entry = self.entry(name)
            if entry is None:
                raise CheckpointError(f"{place}: the files lack {name}")
            if entry[0] != tuple(tensor.shape):
                raise CheckpointError(
                    f"{place}: the files hold {name} as {entry[0]}, the description says {tuple(tensor.shape)}"
                )
            if not tensor.is_floating_point() and DTYPES.get(entry[1]) != tensor.dtype:
                raise CheckpointError(f"{place}: the files hold {name} as {entry[1]}, its layer takes {tensor.dtype}")


def _sizes_in(model: Any, sizes: Sizes) -> dict[str, Shape]:
    """Returns the sizes of layers by their names in `model`, without those of layers that its class does not have."""
    found = {_name_in(model, name): shape for name, shape in sizes.items()}
    return {name: shape for name, shape in found.items() if name is not None}


def _unread(saved: list[Layer], model: Any) -> set[str]:
    """Returns patterns of what the files hold and `model` does not read: `markers`, and repeated tensors of others."""
    prefix, patterns = f"{model.base_model_prefix}.", set()
    for layer in saved:
        own = [name for name in layer.names if _name_in(model, name) is not None]
        for name in layer.names:
            beyond = r"(\..*)?" if own and name not in own else r"(\.weight)?"
            patterns.add(rf"^(.*\.)?{re.escape(name.removeprefix(prefix))}{beyond}$")
    return patterns


def _of_class(layers: list[Layer], model: Any, place: str) -> list[Layer]:
    """Returns the layers with the names that they have in `model`, without those that its class does not have.

    A base model is read from the files of a model with a head, and the other way round, as transformers does.
    """
    kept = []
    for layer in layers:
        found = {_name_in(model, name): own for name, own in zip(layer.names, layer.options, strict=True)}
        names = [name for name in found if name is not None]
        if names:
            kept.append(replace(layer, names=names, options=[found[name] for name in names]))
    if layers and not kept:
        raise CheckpointError(f"{place}: a {type(model).__name__} has none of its layers, such as {layers[0].names[0]}")
    return kept


def _name_in(model: Any, name: str) -> str | None:
    """Returns the name that a layer, or a weight of one, of a file has in `model`, or None if it has none."""
    prefix = f"{model.base_model_prefix}."
    for spelt in (name, name.removeprefix(prefix), f"{prefix}{name}"):
        found: object = model
        for part in spelt.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module | Tensor):
            return spelt
    return None


def quantizer_of(model: Any) -> FactorsQuantizer:
    """Returns the quantizer that describes `model` when it is saved: its own, if it has one of this class."""
    own = vars(model).get("hf_quantizer")
    return own if isinstance(own, FactorsQuantizer) else FactorsQuantizer(FactorsConfig(), pre_quantized=True)


def _register() -> None:
    """Register the method with transformers, once; a version that refuses it is named in a warning."""
    known: Mapping[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    if FORMAT in known:
        return
    try:
        auto.register_quantization_config(FORMAT)(FactorsConfig)
        auto.register_quantizer(FORMAT)(FactorsQuantizer)
    except (AttributeError, TypeError, ValueError) as error:
        _log.warning("from_pretrained will refuse compressed models, and tdkit.load read them: %s", error)


_register()
