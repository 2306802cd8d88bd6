"""Writes the table of docs/layers.md: which layers are rewritten, how they are held, computed and calibrated.

Every row is measured on a small layer of that type: ``python -m tests.benchmarks.layers`` prints the table, and
``--write`` puts it into the page. A test asserts that the page holds the table of the code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdkit
from tdkit.models.sites import Site, User, survey
from tdkit.shapes import by

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
BEGIN, END = "<!-- layers: begin -->", "<!-- layers: end -->"
HEAD = ("layer", "weight", "stored", "seen as", "computed", "calibrated from")


@dataclass(frozen=True)
class Layer:
    """One row or several: a layer and inputs for it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4.0


class ReadsWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


def conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(12, 8)


def experts() -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    layer = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=4))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def rows(*size: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(*size),)


def ids() -> tuple[Any, ...]:
    return (torch.randint(9, (2, 5)),)


def routed() -> tuple[Any, ...]:
    return torch.randn(6, 8), torch.stack([torch.randperm(4)[:2] for _ in range(6)]), torch.rand(6, 2)


LAYERS = [
    Layer("nn.Linear", lambda: nn.Linear(8, 12), rows(4, 8)),
    Layer("transformers' Conv1D", conv1d_of_transformers, rows(4, 8)),
    Layer("nn.Embedding", lambda: nn.Embedding(9, 8), ids),
    Layer("nn.EmbeddingBag", lambda: nn.EmbeddingBag(9, 8), ids),
    Layer("nn.Conv1d", lambda: nn.Conv1d(8, 12, 3), rows(2, 8, 9)),
    Layer("nn.Conv2d", lambda: nn.Conv2d(8, 12, 3), rows(2, 8, 9, 9)),
    Layer("nn.Conv2d, 2 groups", lambda: nn.Conv2d(8, 12, 3, groups=2), rows(2, 8, 9, 9)),
    Layer("nn.Conv2d, depthwise", lambda: nn.Conv2d(8, 8, 3, groups=8), rows(2, 8, 9, 9)),
    Layer("nn.Conv3d", lambda: nn.Conv3d(8, 12, 3), rows(2, 8, 5, 5, 5)),
    Layer("nn.ConvTranspose2d", lambda: nn.ConvTranspose2d(8, 12, 3), rows(2, 8, 5, 5)),
    Layer("nn.LSTM, nn.GRU, nn.RNN", lambda: nn.LSTM(8, 12), rows(5, 2, 8)),
    Layer("nn.LSTMCell, nn.GRUCell", lambda: nn.GRUCell(8, 12), rows(5, 8)),
    Layer("nn.MultiheadAttention", lambda: nn.MultiheadAttention(8, 2), lambda: rows(5, 2, 8)() * 3),
    Layer("nn.Bilinear", lambda: nn.Bilinear(8, 6, 5), lambda: (*rows(4, 8)(), *rows(4, 6)())),
    Layer("experts of transformers", experts, routed),
    Layer("a subclass that calls super().forward", lambda: Scaled(9, 8), ids),
    Layer("a subclass that reads self.weight", lambda: ReadsWeight(8, 12), rows(4, 8)),
    Layer("weight_norm, spectral_norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 12)), rows(4, 8)),
    Layer("a parameter of any module", Bare, rows(2, 16, 8)),
]


def table() -> str:
    """Returns the table as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for layer in LAYERS:
        torch.manual_seed(0)
        model = nn.ModuleDict({"m": layer.make().eval()})
        found = survey(model)
        assert not found.untouchable, layer.name
        for site in found.sites:
            lines.append(f"| {' | '.join(_row(layer, model['m'], site))} |")
    return "\n".join(lines)


def _row(layer: Layer, module: nn.Module, site: Site) -> tuple[str, ...]:
    user = site.users[0]
    stored = tuple(getattr(user.module, user.weight).shape)
    return (
        layer.name,
        f"`{user.name.removeprefix('m.')}`" if user.name != "m" else "`weight`",
        by(stored),
        f"{site.shape[0]} of {by(site.shape[1:])}" if site.stacked else by(site.shape),
        user.host.computed(user.module, user.weight),
        _seen(layer, module, user),
    )


def _seen(layer: Layer, module: nn.Module, user: User) -> str:
    """Returns what an observer sees of the layer: rows of its inputs, or only the gradient of the weight."""
    calls: list[str] = []

    def observe(*arguments: Any) -> Tensor:
        calls.append("rows")
        return arguments[-1]  # type: ignore[no-any-return]

    stacked = user.host.stacked(user.module, user.weight)
    attach: Any = user.host.attach_stack if stacked else user.host.attach
    handle = attach(user.module, user.weight, observe)
    with torch.no_grad():
        module(*layer.inputs())
    handle.remove()
    return "inputs and output gradients" if calls else "gradients of the weight"


def page(text: str) -> str:
    """Returns the page with the table put between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(f"tdkit {tdkit.__version__}\n\n{table()}")


if __name__ == "__main__":
    main()
