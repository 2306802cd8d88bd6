"""The JSON form of measurements: what identifies a model, its data and its tokens."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tdkit
from tdkit import Kronecker, LowRank, Policy, Rule
from tdkit.errors import EvaluationError, OptionError
from tdkit.evaluation import Report, measure_text, perplexity, read_texts, report
from tdkit.evaluation.reports import Figure, identity, tokens_sha256
from tdkit.sources.models import load_model
from tdkit.sources.source import Source
from tdkit.sources.texts import encode


@pytest.fixture
def source(gpt2_folder: Path) -> Source:
    return load_model(str(gpt2_folder))


def test_a_report_is_written_and_read_again(source: Source, text_file: Path, tmp_path: Path) -> None:
    text = read_texts(text_file)
    result, measured = measure_text(source, text, tokens=200, context=32)
    made = report(source, [result], seed=3)
    again = Report.read(made.save(tmp_path / "report.json"))
    assert again == made
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data == made.to_dict()
    assert data["form"] == "tdkit-evaluation/1"
    assert data["seed"] == 3
    assert {"python", "tdkit", "torch", "transformers"} <= set(data["versions"])
    assert data["model"]["sha256"] == hashlib.sha256((Path(source.name) / "model.safetensors").read_bytes()).hexdigest()
    assert data["model"]["sha256_of"] == "file"
    [entry] = data["results"]
    assert entry["figures"]["perplexity"] == {"value": measured.perplexity, "stderr": measured.stderr}
    assert entry["dataset"]["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert (entry["protocol"]["context"], entry["protocol"]["stride"], entry["protocol"]["windows"]) == (32, 32, 6)
    assert "at most the first 200 tokens" in entry["protocol"]["description"]


def test_the_tokens_that_the_model_saw_are_hashed(source: Source, text_file: Path) -> None:
    text = read_texts(text_file)
    result, _ = measure_text(source, text, tokens=200, context=32)
    ids = encode(text.documents, source.tokenizer, 200)
    expected = hashlib.sha256((200).to_bytes(8, "little") + ids.numpy().tobytes()).hexdigest()
    assert result.tokens_sha256 == expected
    assert tokens_sha256([[1, 2], [3]]) != tokens_sha256([[1], [2, 3]])


def test_dense_weights_are_listed_with_the_reason(source: Source) -> None:
    assert {each.reason for each in identity(source).left_dense} == {"the model is not compressed"}
    rules = [Rule("*.c_fc", Kronecker(terms=2, b=(2, 4))), Rule("*.c_proj", LowRank(rank=3)), Rule("*", keep=True)]
    tdkit.compress(source.model, Policy(rules), progress=False)
    found = identity(source)
    assert found.decompositions == {"kronecker": 2, "low_rank": 4}
    dense = {each.names[0]: each for each in found.left_dense}
    assert dense["transformer.wte"].names == ("transformer.wte", "lm_head")
    assert dense["transformer.wte"].reason == "the policy kept it"
    assert dense["transformer.wte"].params == source.model.transformer.wte.weight.numel()
    assert "transformer.h.0.mlp.c_fc" not in dense


def test_weights_that_cannot_be_rewritten_have_their_own_reason() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, dtype=torch.complex64))
    [kept] = identity(Source("x", model, None)).left_dense
    assert kept.reason.startswith("cannot be rewritten: its dtype is complex64")


def test_a_model_in_memory_is_identified_by_its_tensors(gpt2: Any, tmp_path: Path) -> None:
    first = identity(Source("gpt2", gpt2, None))
    assert first.sha256_of == "tensors"
    assert identity(Source("gpt2", gpt2, None)).sha256 == first.sha256
    with torch.no_grad():
        gpt2.transformer.wpe.weight[0, 0] += 1
    assert identity(Source("gpt2", gpt2, None)).sha256 != first.sha256
    assert identity(Source("gpt2", gpt2.bfloat16(), None)).dtypes == ("bfloat16",)


def test_shards_are_identified_together(gpt2: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    found = identity(Source(str(tmp_path), gpt2, None))
    lines = "".join(f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.name}\n" for each in shards)
    assert (found.sha256_of, found.sha256) == ("files", hashlib.sha256(lines.encode()).hexdigest())


def test_a_text_with_a_protocol_is_measured_by_it(source: Source, text_file: Path, tmp_path: Path) -> None:
    rows = [f"{line} .\n" for line in text_file.read_text(encoding="utf-8").split(" people")]
    (tmp_path / "wiki.test.tokens").write_text("".join(rows), encoding="utf-8")
    text = read_texts(f"wikitext-2:{tmp_path}")
    result, _ = measure_text(source, text, context=64)  # the model has no 1024 positions
    assert result.protocol.name == "windows"  # another context is another protocol
    assert "the incomplete last one too" in result.protocol.description
    assert (result.dataset.name, result.dataset.config) == ("Salesforce/wikitext", "wikitext-2-v1")
    ids = source.tokenizer("\n\n".join(rows))["input_ids"]
    assert result.tokens_sha256 == tokens_sha256([ids])  # all tokens, of the joined rows
    assert result.figures["perplexity"].value == pytest.approx(
        perplexity(source.model, torch.tensor(ids), context=64), rel=0.05
    )


def test_the_named_protocol_is_named(text_file: Path, tmp_path: Path, source: Source) -> None:
    from tests.conftest import make_gpt2

    (tmp_path / "wiki.test.tokens").write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    model = make_gpt2(n_layer=1, n_embd=8, n_head=1, vocab_size=300, n_positions=1024)
    result, _ = measure_text(Source("x", model, source.tokenizer), read_texts(f"wikitext-103:{tmp_path}"))
    assert (result.protocol.name, result.protocol.context) == ("wikitext-103", 1024)


def test_a_protocol_is_not_mixed_with_other_texts(text_file: Path) -> None:
    with pytest.raises(OptionError, match=r"'lambada' has a protocol of its own: measure it in a call without other"):
        read_texts([text_file, "lambada"])
    both = read_texts([text_file, text_file])
    assert both.name == f"{text_file} + {text_file}"
    assert len(both.documents) == 2


def test_numbers_that_are_not_finite_survive_json() -> None:
    figure = Figure(value=math.inf)
    assert json.loads(figure.model_dump_json()) == {"value": "Infinity", "stderr": None}
    assert Figure.model_validate_json(figure.model_dump_json()) == figure


def test_files_of_another_form_are_told(gpt2: Any, tmp_path: Path) -> None:
    file = report(Source("gpt2", gpt2, None), []).save(tmp_path / "report.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    data |= {"form": "tdkit-evaluation/9", "sede": 0}
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"(?s)is no report of the form.*form: .*tdkit-evaluation/1.*sede: Extra"):
        Report.read(file)
    file.write_text("no JSON", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"report.json is no report of the form.*\nthe file: Invalid JSON"):
        Report.read(file)
    with pytest.raises(EvaluationError, match=r"nothing\.json cannot be read"):
        Report.read(tmp_path / "nothing.json")
