"""The layers of torch and modules such as users write, as lines of the zoo."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tdkit import CanonicalPolyadic, Kronecker, SpatialLowRank, TTMatrix, Tucker
from tests.zoo import modules as users
from tests.zoo.architecture import Architecture, Inputs


def normal(*shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    """Inputs of these shapes from a normal distribution."""
    return lambda: tuple(torch.randn(*shape) for shape in shapes)


def integers(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.randint(0, 40, shape),)


def chain(*builders: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(build() for build in builders))


def layer(kind: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Callable[[], nn.Module]:
    return partial(kind, *sizes, **options)


def inside(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A model that holds one layer under a name."""
    return chain(build)


def normed(norm: Callable[..., nn.Module], *build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(norm(one()) for one in build))


def weight_norm_hook(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # in favour of the parametrisation
        return weight_norm(module)


def compiled(module: nn.Module) -> nn.Module:
    wrapper: Any = torch.compile(module, backend="eager")
    return cast(nn.Module, wrapper)


linear = layer(nn.Linear, 32, 48)
conv = layer(nn.Conv2d, 16, 24, 3, padding=1)
SEQUENCE = normal((2, 6, 24))
ROWS = normal((4, 32))
IMAGE = normal((2, 16, 8, 8))
lstm = partial(layer, nn.LSTM, batch_first=True)

TORCH = [
    Architecture("Linear", inside(linear), ROWS),
    Architecture("Linear as the root", linear, ROWS),
    Architecture("Linear as the root, Kronecker", linear, ROWS, kind=Kronecker()),
    Architecture("Embedding", inside(layer(nn.Embedding, 40, 32, padding_idx=3)), integers(2, 6)),
    Architecture("Embedding as the root", layer(nn.Embedding, 40, 32), integers(2, 6)),
    Architecture("EmbeddingBag", inside(layer(nn.EmbeddingBag, 40, 32, mode="mean")), integers(2, 6)),
    Architecture("EmbeddingBag with padding", inside(layer(nn.EmbeddingBag, 40, 32, padding_idx=2)), integers(2, 6)),
    Architecture("Bilinear", layer(nn.Bilinear, 16, 24, 32), normal((4, 16), (4, 24))),
    Architecture("LSTM as the root", lstm(24, 32), SEQUENCE),
    Architecture("LSTM as the root, TT matrix", lstm(24, 32), SEQUENCE, kind=TTMatrix()),
    Architecture("LSTM, stacked, bidirectional", lstm(24, 32, num_layers=2, bidirectional=True), SEQUENCE),
    Architecture("LSTM with projections", lstm(24, 32, num_layers=2, bidirectional=True, proj_size=16), SEQUENCE),
    Architecture("LSTM language model", users.AutoregressiveLSTM, integers(2, 6)),
    Architecture("GRU", inside(layer(nn.GRU, 24, 32, num_layers=2)), SEQUENCE),
    Architecture("RNN", inside(layer(nn.RNN, 24, 32, bidirectional=True)), SEQUENCE),
    Architecture("LSTMCell", layer(users.Cells, nn.LSTMCell), SEQUENCE),
    Architecture("GRUCell", layer(users.Cells, nn.GRUCell), SEQUENCE),
    Architecture("RNNCell", layer(users.Cells, nn.RNNCell), SEQUENCE),
    Architecture("MultiheadAttention", users.Attention, normal(*[(2, 6, 32)] * 3)),
    Architecture("MultiheadAttention with kdim and vdim", layer(users.Attention, kdim=24, vdim=40),
                 normal((2, 6, 32), (2, 5, 24), (2, 5, 40))),
    Architecture("TransformerEncoder", lambda: nn.TransformerEncoder(encoder_layer(), 2), normal((2, 6, 32))),
    Architecture("TransformerEncoder, norm first", lambda: nn.TransformerEncoder(encoder_layer(norm_first=True), 2,
                 enable_nested_tensor=False), normal((2, 6, 32))),
    Architecture("Transformer", layer(nn.Transformer, 32, 4, 2, 2, 64, batch_first=True),
                 normal((2, 6, 32), (2, 5, 32))),
    Architecture("Conv1d", layer(nn.Conv1d, 16, 24, 5, stride=2), normal((2, 16, 12))),
    Architecture("Conv2d as the root", conv, IMAGE),
    Architecture("Conv2d", chain(conv, nn.ReLU, layer(nn.Conv2d, 24, 16, 1)), IMAGE),
    Architecture("Conv2d, Kronecker", inside(conv), IMAGE, kind=Kronecker()),
    Architecture("Conv2d, Tucker", chain(conv, nn.ReLU, layer(nn.Conv2d, 24, 32, 3)), IMAGE, kind=Tucker()),
    Architecture("Conv2d, CP", chain(conv, nn.ReLU, layer(nn.Conv2d, 24, 32, 3)), IMAGE, kind=CanonicalPolyadic()),
    Architecture("Conv2d, spatial", chain(conv, nn.ReLU, layer(nn.Conv2d, 24, 32, 3)), IMAGE, kind=SpatialLowRank()),
    Architecture("Conv2d, grouped, Tucker", inside(layer(nn.Conv2d, 32, 64, 3, groups=2)),
                 normal((2, 32, 8, 8)), kind=Tucker()),
    Architecture("Conv2d, grouped", inside(layer(nn.Conv2d, 16, 24, 3, groups=4)), IMAGE),
    Architecture("Conv2d, depthwise separable", chain(layer(nn.Conv2d, 16, 16, 3, groups=16), conv), IMAGE),
    Architecture("Conv2d, dilated", inside(layer(nn.Conv2d, 16, 24, 3, dilation=2, padding="same")), IMAGE),
    Architecture("Conv2d, reflecting", inside(layer(nn.Conv2d, 16, 24, 3, padding=1, padding_mode="reflect")), IMAGE),
    Architecture("Conv2d, circular",
                 inside(layer(nn.Conv2d, 16, 24, (3, 5), padding=(1, 2), padding_mode="circular")), IMAGE),
    Architecture("Conv3d, CP", inside(layer(nn.Conv3d, 8, 12, 3)), normal((2, 8, 4, 5, 6)), kind=CanonicalPolyadic()),
    Architecture("Conv3d", inside(layer(nn.Conv3d, 8, 12, 3)), normal((2, 8, 4, 5, 6))),
    Architecture("ConvTranspose1d", inside(layer(nn.ConvTranspose1d, 16, 24, 4, stride=2)), normal((2, 16, 12))),
    Architecture("ConvTranspose2d", inside(layer(nn.ConvTranspose2d, 16, 24, 4, 2, 1, 1)), IMAGE),
    Architecture("ConvTranspose2d, grouped", inside(layer(nn.ConvTranspose2d, 16, 24, 3, groups=4)), IMAGE),
    Architecture("ConvTranspose3d", inside(layer(nn.ConvTranspose3d, 8, 12, 3)), normal((2, 8, 4, 5, 6))),
    Architecture("weight_norm", normed(parametrizations.weight_norm, linear), ROWS),
    Architecture("weight_norm of a convolution", normed(parametrizations.weight_norm, conv), IMAGE),
    Architecture("weight_norm as a hook", normed(weight_norm_hook, linear), ROWS),
    Architecture("spectral_norm", normed(parametrizations.spectral_norm, linear), ROWS),
    Architecture("spectral_norm as a hook", chain(normed(spectral_norm, linear), layer(nn.Linear, 48, 64)), ROWS,
                 share=0.66, reason="the hook computes the weight from the parameter, which it needs"),
    Architecture("orthogonal", normed(parametrizations.orthogonal, linear), ROWS),
    Architecture("Bare parameters", users.BareParameters, normal((2, 6, 32))),
    Architecture("ParameterList and ParameterDict", users.Lists, ROWS),
    Architecture("Subclass that inherits forward", inside(layer(users.Inherits, 32)), ROWS),
    Architecture("Subclass that calls super", inside(layer(users.Scales, 32, 48)), ROWS),
    Architecture("Subclass that reads its weight", inside(layer(users.ReadsWeight, 32, 48)), ROWS),
    Architecture("Subclass as the root", layer(users.Scales, 32, 48), ROWS),
    Architecture("Subclass of Embedding", inside(layer(users.ScaledEmbedding, 40, 32)), integers(2, 6)),
    Architecture("Subclass of Conv2d", inside(layer(users.SamePadding, 16, 24, 3)), IMAGE),
    Architecture("Weight used by a function", users.Functional, ROWS),
    Architecture("Keyword arguments", users.Keywords, integers(2, 6)),
    Architecture("Tied head, layer used twice", users.Tied, integers(2, 6)),
    Architecture("torch.compile", lambda: compiled(nn.Sequential(linear(), nn.ReLU())), ROWS),
    Architecture("torch.compile of a layer", lambda: nn.Sequential(compiled(linear()), nn.ReLU()), ROWS),
    Architecture("torch.compile of a layer as the root", lambda: compiled(linear()), ROWS),
]  # fmt: skip


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
