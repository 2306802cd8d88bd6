"""Record outputs of modules and attention scores inside a model, with hooks that are always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tdkit.errors import did_you_mean
from torch import Tensor, nn

from tdkit_distill.errors import StageError
from tdkit_distill.models.calls import tensor_of

TAPPED_ATTENTION = "tdkit_tapped"  # the attention implementation that hands its scores to a recorder
_RECORDER = "_tdkit_attention_recorder"


@dataclass(frozen=True)
class AttentionRecord:
    """What one attention layer computed.

    Attributes:
        scores: (batch, heads, queries, keys) scaled products of queries and keys, before mask and softmax;
            probabilities when `are_probabilities`.
        allowed: which keys each query may see, broadcastable to the scores; None for all.
        are_probabilities: for a module that only shows its attention after the softmax.
    """

    scores: Tensor
    allowed: Tensor | None
    are_probabilities: bool = False


@dataclass
class Record:
    """What was recorded in the last forward.

    Attributes:
        outputs: by the name asked for; the first tensor when a module returns several, of its last call.
        attention: by name of the attention module.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, AttentionRecord] = field(default_factory=dict)
    open: bool = True  # closed while a backward runs forwards again (gradient checkpointing)

    def clear(self) -> None:
        """Forget everything, so that no tensor outlives its step."""
        self.outputs.clear()
        self.attention.clear()


@contextmanager
def tapped(model: nn.Module, outputs: Iterable[str] = (), attention: Iterable[str] = ()) -> Iterator[Record]:
    """Record the outputs of the named modules, and the attention scores of the named attention modules.

    A name ``MODULE:PATH`` stands for one tensor of what a module returns, see `tensor_of`; without a module it is that
    of the model.

    The scores of a transformers model are read where they arise: while the context is open, the model
    runs an attention implementation that computes the same as ``eager`` and hands the scaled products of
    queries and keys to the record (grouped keys repeated, before mask, softmax and dropout). Another
    library's attention module is read by its output: the last tensor of four dimensions, which is taken
    as probabilities. On leaving, exception or not, every hook is gone and the model's own implementation
    is back.

    Raises:
        StageError: for a name that the model does not have.
    """
    record = Record()
    modules = dict(model.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        for name in dict.fromkeys(outputs):
            handle = _find(modules, name.partition(":")[0]).register_forward_hook(_output_hook(record, name))
            stack.callback(handle.remove)
        wanted = {name: _find(modules, name) for name in dict.fromkeys(attention)}
        owner = _attention_owner(model) if wanted else None
        for name, module in wanted.items():
            if owner is not None and hasattr(module, "config"):
                setattr(module, _RECORDER, _attention_sink(record, name))
                stack.callback(delattr, module, _RECORDER)
            else:
                handle = module.register_forward_hook(_attention_hook(record, name))
                stack.callback(handle.remove)
        if owner is not None:
            stack.enter_context(_tapped_implementation(owner))
        try:
            yield record
        finally:
            record.clear()


def _find(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise StageError(f"the model has no module '{name}'{did_you_mean(name, modules)}")
    return modules[name]


def _output_hook(record: Record, name: str) -> Callable[[nn.Module, Any, Any], None]:
    module, picks, path = name.partition(":")
    place = f"module '{module}'" if module else "the model"

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if record.open:
            record.outputs[name] = tensor_of(output, path, place) if picks else first_tensor(output, name)

    return hook


def _attention_sink(record: Record, name: str) -> Callable[[Tensor, Tensor | None], None]:
    def sink(scores: Tensor, allowed: Tensor | None) -> None:
        if record.open:
            record.attention[name] = AttentionRecord(scores, allowed)

    return sink


def _attention_hook(record: Record, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        found = [x for x in (output if isinstance(output, tuple | list) else [output]) if isinstance(x, Tensor)]
        found = [x for x in found if x.ndim == 4]
        if not found:
            raise StageError(
                f"attention module '{name}' ({type(module).__name__}) returns no (batch, heads, queries, keys) "
                "tensor: name a module whose output is one"
            )
        if record.open:
            record.attention[name] = AttentionRecord(found[-1], None, are_probabilities=True)

    return hook


def first_tensor(output: Any, name: str) -> Tensor:
    """The first tensor of what a module returned."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) and hasattr(output, "keys"):
        output = next((value for value in output.values() if isinstance(value, Tensor)), None)
    if not isinstance(output, Tensor):
        raise StageError(f"module '{name}' returns no tensor but {type(output).__name__}: tap a module inside it")
    return output


def _attention_owner(model: nn.Module) -> Any:
    """The model itself when it is one of transformers', whose attention implementation can be chosen."""
    return model if hasattr(model, "set_attn_implementation") and hasattr(model, "config") else None


@contextmanager
def _tapped_implementation(model: Any) -> Iterator[None]:
    _register()
    before = model.config._attn_implementation
    model.set_attn_implementation(TAPPED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface  # only a tapped transformers model needs it
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(TAPPED_ATTENTION, _attention)
    AttentionMaskInterface.register(TAPPED_ATTENTION, eager_mask)


def _attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, queries, width)
    key: Tensor,  # (batch, key heads, keys, width)
    value: Tensor,
    attention_mask: Tensor | None,  # additive, broadcastable to (batch, heads, queries, keys)
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention as transformers' eager implementation, which also records its scores."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    sink = getattr(module, _RECORDER, None)
    if sink is not None:
        sink(scores, None if mask is None else mask > torch.finfo(mask.dtype).min / 2)
    masked = scores if mask is None else scores + mask
    weights = torch.softmax(masked, dim=-1, dtype=torch.promote_types(masked.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
