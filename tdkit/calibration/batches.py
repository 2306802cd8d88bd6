"""Divide a batch into the arguments of a model's forward and the labels."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import CalibrationError, did_you_mean
from tdkit.support.compatibility import tree_leaves

Batch = Any  # the input of a model: a tensor, a tuple of arguments or a mapping of keyword arguments

LABELS = ("labels", "label", "targets", "target")  # names of the entry of a batch that holds the labels

DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_input_values")


@dataclass(frozen=True, eq=False)
class Weighted:
    """A calibration batch that counts for more or less than another one.

    Attributes:
        batch: the batch.
        weight: of its tokens or examples in the moments; those of other batches have the weight 1.

    Raises:
        CalibrationError: when the weight is not positive and finite.
    """

    batch: Batch
    weight: float

    def __post_init__(self) -> None:
        if not (isinstance(self.weight, int | float) and 0 < self.weight < math.inf):
            raise CalibrationError(f"the weight of a batch is {self.weight!r}: give a positive number")


def unweighted(batch: Batch) -> tuple[Batch, float]:
    """Returns a batch and its weight."""
    return (batch.batch, batch.weight) if isinstance(batch, Weighted) else (batch, 1.0)


@dataclass(frozen=True)
class Call:
    """One batch, divided.

    Attributes:
        args: the positional arguments of forward.
        kwargs: the keyword arguments of forward.
        labels: the labels; None when the batch has none.
        passed: whether the labels are an argument of forward as well.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any = None
    passed: bool = False

    def run(self, model: nn.Module) -> Any:
        """Returns the output of the model."""
        return model(*self.args, **self.kwargs)

    @property
    def token_ids(self) -> Tensor | None:
        """The integer tensor (n, tokens) that is taken for token ids: ``input_ids`` or the first argument, or None."""
        ids = self.kwargs.get("input_ids", self.args[0] if self.args else None)
        is_ids = isinstance(ids, Tensor) and ids.ndim == 2 and ids.dtype in (torch.int64, torch.int32)
        return ids if is_ids else None

    @property
    def is_text(self) -> bool:
        """Whether token ids and masks are all of the inputs: no images, sounds or embeddings beside them."""
        others = [*self.args, *(value for name, value in self.kwargs.items() if not name.endswith("mask"))]
        floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(others))
        return self.token_ids is not None and not floats

    @property
    def mask(self) -> Tensor | None:
        """The attention mask (n, tokens), bool, True for real tokens; None when there is no 2-D mask."""
        mask = self.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @property
    def units(self) -> int:
        """The number of token ids, without padding, or else of examples."""
        if self.token_ids is None:
            return self.examples
        mask = self.mask
        return self.token_ids.numel() if mask is None or mask.shape != self.token_ids.shape else int(mask.sum())

    @property
    def examples(self) -> int:
        """The length of the first dimension of the first tensor; 1 without tensors."""
        tensors = (leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor) and leaf.ndim)
        return next((len(tensor) for tensor in tensors), 1)

    def with_token_ids(self, ids: Tensor) -> Call:
        """Returns the same call with other token ids."""
        if "input_ids" in self.kwargs:
            return dataclasses.replace(self, kwargs={**self.kwargs, "input_ids": ids})
        return dataclasses.replace(self, args=(ids, *self.args[1:]))


def call_of(model: nn.Module, batch: Batch) -> Call:
    """Divide a batch into the arguments of ``model.forward`` and the labels, by the signature of forward.

    - A mapping holds keyword arguments. An entry called ``labels``, ``label``, ``targets`` or ``target`` is the labels;
      it is passed to forward only if forward has a parameter of that name.
    - A tuple or list holds positional arguments. If it has one entry more than forward has parameters for tensors, the
      last entry is the labels. Parameters for tensors are the leading ones without a default or with the default None.
    - A pair (mapping, labels) is a mapping of keyword arguments and its labels.
    - Anything else is the only argument.

    The weight of a `Weighted` batch plays no part.

    Raises:
        CalibrationError: when forward does not take what the batch has, or an entry of a tuple can be both an optional
            argument and the labels.
    """
    batch, known = unweighted(batch)[0], _Parameters.of(model)
    if isinstance(batch, Mapping):
        return _by_name(known, dict(batch))
    if not isinstance(batch, tuple | list):
        return Call((batch,), {})
    entries = tuple(batch)
    if entries and isinstance(entries[0], Mapping) and len(entries) <= 2:
        call = _by_name(known, dict(entries[0]))
        return call if len(entries) == 1 else dataclasses.replace(call, labels=entries[1])
    return _by_position(known, entries)


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a forward.

    Attributes:
        shown: the signature, for messages.
        names: all names that can be given by keyword.
        leading: the names of the leading positional parameters that can take tensors.
        required: how many of these have no default.
        any_position: forward takes any number of positional arguments.
        any_name: forward takes any keyword argument.
    """

    shown: str
    names: tuple[str, ...]
    leading: tuple[str, ...]
    required: int
    any_position: bool
    any_name: bool

    @classmethod
    def of(cls, model: nn.Module) -> _Parameters:
        try:
            signature = inspect.signature(model.forward)
        except (TypeError, ValueError):  # a forward that is no Python function
            return cls("forward", (), (), 0, any_position=True, any_name=True)
        found = list(signature.parameters.values())
        kinds = {parameter.kind for parameter in found}
        any_position = inspect.Parameter.VAR_POSITIONAL in kinds
        children = list(model.children())
        if any_position and len(children) == 1:  # a wrapper: DistributedDataParallel, torch.compile, PEFT
            return cls.of(children[0])
        leading: list[inspect.Parameter] = []
        for parameter in found:
            positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            if not positional or not (parameter.default is parameter.empty or parameter.default is None):
                break
            leading.append(parameter)
        return cls(
            shown=f"{type(model).__name__}.forward({', '.join(_shown(parameter) for parameter in found)})",
            names=tuple(p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)),
            leading=tuple(p.name for p in leading),
            required=sum(p.default is p.empty for p in leading),
            any_position=any_position,
            any_name=inspect.Parameter.VAR_KEYWORD in kinds,
        )


def _shown(parameter: inspect.Parameter) -> str:
    stars = "*" * (parameter.kind is parameter.VAR_POSITIONAL) or "**" * (parameter.kind is parameter.VAR_KEYWORD)
    default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
    return f"{stars}{parameter.name}{default}"


def _by_name(known: _Parameters, entries: dict[str, Any]) -> Call:
    opaque = known.any_name and not known.names  # forward(**kwargs): what it does with labels is its own matter
    held = [name for name in LABELS if entries.get(name) is not None]
    if len(held) > 1:
        raise CalibrationError(f"a batch has {' and '.join(map(repr, held))}: keep one of them as its labels")
    withheld = [name for name in LABELS if name in entries and name not in known.names and not opaque]
    kwargs = {name: value for name, value in entries.items() if name not in withheld}
    unknown = [] if known.any_name else [f"'{n}'{did_you_mean(n, known.names)}" for n in kwargs if n not in known.names]
    if unknown:
        raise CalibrationError(
            f"a batch has {', '.join(unknown)}, which {known.shown} does not take: leave it out of the batch"
        )
    name = held[0] if held else None
    return Call((), kwargs, entries[name] if name else None, passed=name is not None and name not in withheld)


def _by_position(known: _Parameters, entries: tuple[Any, ...]) -> Call:
    count, most, least = len(entries), len(known.leading), max(known.required, 1)
    if known.any_position:
        return Call(entries, {})
    if not known.required <= count <= most + 1 or not count:
        plural = "entry" if count == 1 else "entries"
        raise CalibrationError(f"a batch has {count} {plural}, which {known.shown} does not take")
    if count == most + 1 and count > 1:
        return Call(entries[:-1], {}, entries[-1])
    last = known.leading[count - 1]
    if last in LABELS:
        return Call(entries, {}, entries[-1], passed=True)
    if count <= least:
        return Call(entries, {})
    names = ", ".join(f"'{name}': ..." for name in known.leading[: count - 1])
    raise CalibrationError(
        f"the last of the {count} entries of a batch can be the labels or '{last}' of {known.shown}: give dictionaries "
        f"instead, {{{names}, 'labels': ...}} or {{{names}, '{last}': ...}}"
    )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Returns whether a model of transformers has an encoder and a decoder, and takes token ids for both."""
    stated = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(stated) and "decoder_input_ids" in _Parameters.of(model).names


def check_decoder_inputs(model: nn.Module, call: Call) -> None:
    """Check that a batch has labels, or inputs of the decoder, if the model is an encoder-decoder of transformers.

    Raises:
        CalibrationError: when it has none. Some such models stop without them; others decode their own inputs.
    """
    given = call.labels is not None or any(call.kwargs.get(name) is not None for name in DECODER_INPUTS)
    if not given and is_encoder_decoder(model):
        raise CalibrationError(
            f"{type(model).__name__} is an encoder-decoder, and a batch has neither labels nor decoder_input_ids: add "
            "'labels', the token ids that the decoder is to predict"
        )


def decoder_lengths(model: nn.Module, call: Call) -> list[int]:
    """Returns the numbers of tokens of the labels and the decoder's inputs; none if there is no encoder-decoder."""
    given = (call.labels, *(call.kwargs.get(name) for name in DECODER_INPUTS))
    found = [value.shape[1] for value in given if isinstance(value, Tensor) and value.ndim > 1]
    return found if found and is_encoder_decoder(model) else []


def moved(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with its tensors on `device`, without a weight; mappings become dictionaries, lists tuples."""
    batch = unweighted(batch)[0]
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    return tuple(moved(value, device) for value in batch) if isinstance(batch, tuple | list) else batch


def digest_of(batches: Iterable[Batch]) -> str:
    """Returns the SHA-256 of the dtypes, shapes and bytes of the tensors in batches, and of what else they hold."""
    total = hashlib.sha256()
    for batch in batches:
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Weighted):
                total.update(f"weight {leaf.weight} {digest_of([leaf.batch])}".encode())
            elif isinstance(leaf, Tensor):
                total.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
                total.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                total.update(repr(leaf).encode())
    return total.hexdigest()


def check_batches(batches: Iterable[Batch]) -> None:
    """Check that `batches` are several batches rather than one.

    Raises:
        CalibrationError: when they are one tensor, whose rows would be taken for batches, or one mapping.
    """
    if isinstance(batches, Tensor | Mapping):
        what = "one tensor" if isinstance(batches, Tensor) else "one mapping"
        raise CalibrationError(f"batches is {what}, not an iterable of batches: give [batch]")
