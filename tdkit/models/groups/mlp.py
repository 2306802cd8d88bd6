"""Hidden units of MLPs: the layers between which only elementwise functions lie, by the names that models give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from tdkit.models.groups.group import Group, Part, Pattern
from tdkit.models.sites import Site


@dataclass(frozen=True)
class Mlp(Pattern):
    """Names of weights that share hidden units wherever one module holds them all.

    Attributes:
        producers: names of the weights that produce the units, relative to the module.
        consumer: the name of the weight that consumes them.
        packed: how many weights are stacked in each producer, each with a row per unit.
    """

    producers: tuple[str, ...]
    consumer: str
    packed: int = 1

    def find(self, sites: Mapping[str, Site]) -> Iterator[Group]:
        """Iterate over the groups among sites whose shapes fit the pattern."""
        for name, consumer in sites.items():
            prefix = name.removesuffix(self.consumer)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            producers = [sites.get(prefix + producer) for producer in self.producers]
            units = consumer.shape[1]
            if any(site is None or len(site.shape) > 2 or site.shape[0] != self.packed * units for site in producers):
                continue
            rows = torch.arange(self.packed * units).reshape(self.packed, units).T
            columns = torch.arange(units)[:, None]
            parts = tuple(Part(site, 0, rows) for site in producers if site is not None)
            yield Group(parts, Part(consumer, 1, columns))


PATTERNS = (
    Mlp(("gate_proj", "up_proj"), "down_proj"),  # LLaMA, Mistral, Qwen, Gemma and others
    Mlp(("gate_up_proj",), "down_proj", packed=2),  # Phi-3
    Mlp(("up_proj",), "down_proj"),  # Nemotron, MPT
    Mlp(("w1", "w3"), "w2"),  # LLaMA as published
    Mlp(("c_fc",), "c_proj"),  # GPT-2, StarCoder2
    Mlp(("fc1",), "fc2"),  # OPT, Phi, CLIP, Whisper
    Mlp(("fc_in",), "fc_out"),  # GPT-J
    Mlp(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    Mlp(("intermediate.dense",), "output.dense"),  # BERT, ViT
    Mlp(("wi",), "wo"),  # T5
    Mlp(("wi_0", "wi_1"), "wo"),  # T5 1.1
    Mlp(("lin1",), "lin2"),  # DistilBERT
    Mlp(("linear1",), "linear2"),  # nn.TransformerEncoderLayer
    Mlp(("pwconv1",), "pwconv2"),  # ConvNeXt
    Mlp(("intermediate_dense",), "output_dense"),  # wav2vec 2.0
)
"""Registered as ``mlp``."""
