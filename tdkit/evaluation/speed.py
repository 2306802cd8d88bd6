"""Speed of a compressed model against its dense counterpart, per kind of layer and for the whole model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix, Preference
from tdkit.decompositions.shrink import Shrink
from tdkit.errors import PolicyError
from tdkit.evaluation.timing import peak_bytes, side_by_side
from tdkit.models.conversion import to_dense
from tdkit.models.hosts.base import FactorizedLayer, FactorizedModule
from tdkit.models.hosts.convolution import FactorizedConvolution, image_size
from tdkit.models.hosts.embedding import FactorizedEmbedding
from tdkit.models.hosts.experts import ExpertsLayer, experts_of_a_token, stacks_of
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.models.preparation import cached_bytes, prepare
from tdkit.models.shrinking import shrunk
from tdkit.models.sites import Site, factorized_groups, factorized_layers, num_bytes, survey
from tdkit.models.swap import Resized, swapping
from tdkit.planning.grouping import shrunk_groups
from tdkit.planning.plan import Plan
from tdkit.products.cost import CACHED, DENSE
from tdkit.shapes import by
from tdkit.support.progress import progress_bar
from tdkit.support.tables import table_of

Call = Callable[[nn.Module, int], object]  # runs a model on a number of tokens

WHOLE_MODEL = "whole model"


@dataclass(frozen=True)
class Row:
    """One kind of layer, or the whole model, on one number of tokens.

    Attributes:
        what: type and shape of the layer and its decomposition, or 'whole model'.
        count: number of such layers in the model.
        tokens: tokens per call.
        path: the name of the path that the factorised layer takes; empty for the whole model.
        dense_seconds: median time of the dense call.
        seconds: median time of the factorised call.
        ratio: median of factorised time / dense time of paired calls; below 1 the factorised call is faster.
        dense_peak_bytes: peak memory allocated by a dense call, without parameters.
        peak_bytes: peak memory allocated by a factorised call, without parameters and cached weights.
    """

    what: str
    count: int
    tokens: int
    path: str
    dense_seconds: float
    seconds: float
    ratio: float
    dense_peak_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Benchmark:
    """The result of `benchmark` and its conditions.

    Attributes:
        rows: the measurements.
        train: whether training steps were timed, rather than inference.
        prefer: as in `tdkit.prepare`.
        device: the device of the model.
        dtype: the dtype of the parameters.
        threads: the number of threads of torch.
        dense_bytes: size of parameters and buffers of the dense model.
        bytes: size of parameters and buffers of the compressed model.
        cached_bytes: size of what the compressed model caches in addition, usually dense weights.
        skipped: names of factorised layers that are only timed as part of the whole model, because they cannot be
            called alone (those of hosts of other packages).
    """

    rows: tuple[Row, ...]
    train: bool
    prefer: str
    device: str
    dtype: str
    threads: int
    dense_bytes: int
    bytes: int
    cached_bytes: int
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rows": [vars(row) for row in self.rows], "skipped": list(self.skipped)}

    def table(self) -> Table:
        """Returns a table with a row per kind of layer and number of tokens."""
        step = "training step" if self.train else f"inference, prefer={self.prefer}"
        cached = f" + {_mib(self.cached_bytes)} cached" if self.cached_bytes else ""
        title = (
            f"{step}, {self.dtype}, {self.device}, {self.threads} threads; weights "
            f"{_mib(self.dense_bytes)} -> {_mib(self.bytes)}{cached}"
        )
        columns = ["layer", "tokens", "path", "dense", "factorised", "ratio", "peak dense", "peak factorised"]
        table = table_of(title, columns)
        for row in self.rows:
            times = f" ({row.count} layers)" if row.count > 1 else ""
            table.add_row(
                row.what + times,
                str(row.tokens),
                row.path,
                _ms(row.dense_seconds),
                _ms(row.seconds),
                f"{row.ratio:.2f}",
                _mib(row.dense_peak_bytes),
                _mib(row.peak_bytes),
                style="bold" if row.what == WHOLE_MODEL else None,
            )
        return table


def benchmark(
    model: nn.Module,
    *,
    tokens: Sequence[int] = (1, 16, 512),
    train: bool = False,
    prefer: Preference = "speed",
    call: Call | None = None,
    seconds: float = 0.5,
    progress: bool | None = None,
) -> Benchmark:
    """Time every kind of factorised layer of `model` against its dense counterpart, then the whole model.

    Dense and factorised calls alternate in one process, so that other load on the machine slows both alike.
    They are compared with a copy of the model that has dense weights. The mode and the preference of `model` are
    restored afterwards.

    Args:
        model: a model with factorised layers.
        tokens: the numbers of tokens per call, each timed separately; of a convolution, about that many positions
            of one image.
        train: time a forward and a backward pass instead of inference.
        prefer: as in `tdkit.prepare`; has no effect on training.
        call: a function (model, number of tokens) that runs the model and returns its output: a tensor, or an object
            with ``logits`` or ``last_hidden_state``. When None, transformers models are called with token ids, and
            of other models only the layers are timed.
        seconds: how long to time each call.
        progress: show a progress bar; when None, only on a terminal.

    Raises:
        PolicyError: when the model has no factorised layer.
    """
    groups, skipped = _kinds(model)
    if not groups:
        raise PolicyError("this model has no factorised layer: compress it, or give a policy to try on it")
    dense_model = densified(model)
    call = call or _transformers_call(model)
    device = next(model.parameters()).device
    rows: list[Row] = []
    total = (len(groups) + (call is not None)) * len(tokens)
    with _restored(model), progress_bar("bench", total, progress) as bar:
        ready(model, train, prefer)
        ready(dense_model, train, prefer)
        for (what, _), names in groups.items():
            layer = cast(FactorizedModule, model.get_submodule(names[0]))
            dense_layer = dense_model.get_submodule(names[0])
            for count in tokens:
                bar.now(what)
                path = _path(layer, count, "memory" if train else prefer)
                run = _layer_call(layer, count)
                rows.append(_row(what, len(names), count, path, dense_layer, layer, run, train, seconds, device))
                bar.advance()
        if call is not None:
            for count in tokens:
                bar.now(WHOLE_MODEL)
                whole = _model_call(call, count)
                rows.append(_row(WHOLE_MODEL, 1, count, "", dense_model, model, whole, train, seconds, device))
                bar.advance()
        cached = cached_bytes(model)
    return Benchmark(
        rows=tuple(rows),
        train=train,
        prefer=prefer,
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        dense_bytes=num_bytes(dense_model),
        bytes=num_bytes(model),
        cached_bytes=cached,
        skipped=tuple(skipped),
    )


def densified(model: nn.Module) -> nn.Module:
    """Returns a copy of `model` with equivalent dense layers, tied like the factorised ones."""
    return to_dense(copy.deepcopy(model))


def unfitted(model: nn.Module, plan: Plan) -> nn.Module:
    """Apply `plan` to `model` in place with random factors, to measure speed without a fit; returns `model`."""
    generator = torch.Generator().manual_seed(0)
    fitted: list[tuple[Site, FactorizedMatrix | Resized]] = []
    sites = {site.name: site for site in survey(model).sites}
    pairs = [(step, sites[step.name]) for step in plan.rewritten]
    for group, kind in shrunk_groups(pairs):
        fitted += zip(group.sites, shrunk(group, torch.arange(kind.units or 0)), strict=True)
    for step, site in pairs:
        assert step.decomposition is not None
        if isinstance(step.decomposition, Shrink):
            continue
        shape = step.decomposition.shape_of(site.shape)
        matrix = step.decomposition.empty(shape, device=site.weight.device, dtype=site.weight.dtype)
        for factor in matrix.parameters():
            values = torch.randn(factor.shape, generator=generator) * 0.02
            factor.data.copy_(values)
        fitted.append((site, matrix))
    with swapping(model) as swap:
        swap.put(fitted)
    return model


def ready(model: nn.Module, train: bool, prefer: Preference) -> None:
    """Set the preference and the training mode to measure."""
    prepare(model, prefer=prefer)
    model.train(train)


def _kinds(model: nn.Module) -> tuple[dict[tuple[str, bool], list[str]], list[str]]:
    """Group the names of equal factorised layers by description; also returns those that cannot be called alone."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    others = []
    for name, layer in factorized_layers(model):
        if isinstance(layer, ExpertsLayer) and stacks_of(layer):
            stacks = (
                f"{key} {by(each.sizes)} {each.decomposition.describe()}" for key, each in stacks_of(layer).items()
            )
            kinds.setdefault((f"{layer.replaces} {', '.join(stacks)}", False), []).append(name)
            continue
        if isinstance(layer, nn.RNNBase):
            weights = (
                f"{key} {by(each.shape)} {each.decomposition.describe()}" for key, each in layer.matrices.items()
            )
            kinds.setdefault((f"{layer.replaces} {', '.join(weights)}", layer.bias), []).append(name)
            continue
        if not isinstance(layer, FactorizedLinear | FactorizedEmbedding | FactorizedConvolution):
            others.append(name)
            continue
        what = f"{layer.replaces} {_shape(layer)} {layer.matrix.decomposition.describe()}"
        has_bias = getattr(layer, "bias", None) is not None
        kinds.setdefault((what, has_bias), []).append(name)
    return kinds, others


def _shape(layer: FactorizedLayer) -> str:
    """Format the shape of a layer's weight, with the stride and groups of a convolution."""
    if not isinstance(layer, FactorizedConvolution):
        return by(layer.matrix.shape)
    shape = by((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))
    stride = f", stride {by(layer.stride)}" if max(layer.stride) > 1 else ""
    return shape + stride + (f", {layer.groups} groups" if layer.groups > 1 else "")


def _path(layer: FactorizedModule, tokens: int, prefer: Preference) -> str:
    if isinstance(layer, ExpertsLayer):
        stacks = list(stacks_of(layer).values())
        rows = math.ceil(tokens * experts_of_a_token(layer) / stacks[0].sizes[0])
        return ", ".join(dict.fromkeys(stack.member_path(rows, prefer=prefer).name for stack in stacks))
    if isinstance(layer, nn.RNNBase):
        return DENSE if prefer == "memory" else CACHED
    layer = cast(FactorizedLayer, layer)
    if isinstance(layer, FactorizedEmbedding):
        return "rows"
    if isinstance(layer, FactorizedConvolution):
        return layer.path(image_size(layer, tokens), prefer=prefer)
    return layer.matrix.path(tokens, prefer=prefer).name


def _layer_call(layer: FactorizedModule, tokens: int) -> Callable[[nn.Module], object]:
    of = next(iter(layer.matrices.values()))
    if isinstance(layer, ExpertsLayer):
        return _routed_call(layer, tokens, of)
    if isinstance(layer, nn.RNNBase):
        size: tuple[int, ...] = (1, tokens, layer.input_size) if layer.batch_first else (tokens, 1, layer.input_size)
        steps = torch.randn(size, device=of.device, dtype=of.dtype)
        return lambda module: module(steps.detach().requires_grad_(torch.is_grad_enabled()))
    layer = cast(FactorizedLayer, layer)
    if isinstance(layer, FactorizedEmbedding):
        ids = torch.randint(layer.num_embeddings, (1, tokens), device=of.device)
        return lambda module: module(ids)
    size = image_size(layer, tokens) if isinstance(layer, FactorizedConvolution) else (1, tokens, layer.matrix.shape[1])
    x = torch.randn(size, device=of.device, dtype=of.dtype)
    return lambda module: module(x.detach().requires_grad_(torch.is_grad_enabled()))


def _routed_call(layer: ExpertsLayer, tokens: int, of: FactorizedMatrix) -> Callable[[nn.Module], object]:
    name, stack = next(iter(stacks_of(layer).items()))
    width = stack.sizes[1] if name == "down_proj" else stack.sizes[2]
    hidden = torch.randn(tokens, width, device=of.device, dtype=of.dtype)
    scores = torch.rand(tokens, stack.sizes[0], device=of.device, dtype=of.dtype).topk(experts_of_a_token(layer))
    return lambda module: module(hidden.detach().requires_grad_(torch.is_grad_enabled()), scores.indices, scores.values)


def _model_call(call: Call, tokens: int) -> Callable[[nn.Module], object]:
    return lambda module: call(module, tokens)


def _transformers_call(model: nn.Module) -> Call | None:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int) or not hasattr(model, "get_input_embeddings"):
        return None
    device = next(model.parameters()).device

    def call(module: nn.Module, tokens: int) -> object:
        ids = torch.arange(tokens, device=device).remainder(vocabulary).unsqueeze(0)
        return module(input_ids=ids)

    return call


def _row(
    what: str,
    count: int,
    tokens: int,
    path: str,
    dense: nn.Module,
    factorised: nn.Module,
    run: Callable[[nn.Module], object],
    train: bool,
    seconds: float,
    device: torch.device,
) -> Row:
    def step(module: nn.Module) -> Callable[[], object]:
        if not train:
            return lambda: _infer(run, module)
        return lambda: _train(run, module)

    calls = {"dense": step(dense), "factorised": step(factorised)}
    timings = side_by_side(calls, seconds=seconds, device=device)
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    return Row(
        what=what,
        count=count,
        tokens=tokens,
        path=path,
        dense_seconds=timings["dense"].seconds,
        seconds=timings["factorised"].seconds,
        ratio=timings["factorised"].ratio,
        dense_peak_bytes=peaks["dense"],
        peak_bytes=peaks["factorised"],
    )


def _infer(run: Callable[[nn.Module], object], module: nn.Module) -> object:
    with torch.inference_mode():
        return run(module)


def _train(run: Callable[[nn.Module], object], module: nn.Module) -> None:
    _tensor(run(module)).float().square().mean().backward()  # type: ignore[no-untyped-call]
    module.zero_grad(set_to_none=True)


def _tensor(output: Any) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output  # of a recurrent layer
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    return cast(Tensor, output.last_hidden_state if found is None else found)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the modes of modules, the preferences of matrices and the gradients of parameters on exit."""
    modes = [(module, module.training) for module in model.modules()]
    matrices = [matrix for matrix, _ in factorized_groups(model)]
    preferences = [(matrix, matrix.prefer, matrix.dispatcher.graphs) for matrix in matrices]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for matrix, prefer, graphs in preferences:
            matrix.dispatcher.configure(prefer, graphs=graphs)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _mib(size: int) -> str:
    return f"{size / 2**20:.4g} MiB"
