"""Tasks of lm-eval on compressed and dense models, with data on disk."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import EvaluationError, MissingDependencyError, SourceError
from tdkit.evaluation.tasks import Tasks, measure_tasks
from tdkit.sources.models import load_model
from tdkit.sources.source import Source
from tests.evaluation.local_tasks import CHOICES, WORDS, write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def source(gpt2_folder: Path) -> Source:
    return load_model(str(gpt2_folder))


@torch.no_grad()
def by_hand(source: Source, name: str) -> float:
    """The share of questions whose right choice has the largest log-likelihood."""
    right = 0
    for answer, question in enumerate(WORDS[name]):
        values = []
        for choice in CHOICES:
            whole = source.tokenizer(f"{question} {choice}")["input_ids"]
            start = len(source.tokenizer(question)["input_ids"])
            scores = source.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            values.append(sum(float(scores[place - 1, whole[place]]) for place in range(start, len(whole))))
        right += values.index(max(values)) == answer
    return right / 3


def test_a_task_gives_what_a_person_computes_dense_and_compressed(source: Source, folder: Path) -> None:
    tasks = Tasks([folder / "first_word.yaml"])
    assert tasks.names == ["first_word"]
    smaller = copy.deepcopy(source.model)
    tdkit.compress(smaller, Policy([Rule("*", LowRank())], budget=0.6), progress=False)
    found = {}
    for key, model in {"dense": source.model, "compressed": smaller}.items():
        given = Source(key, model, source.tokenizer)
        [result] = measure_tasks(given, tasks)
        found[key] = result
        assert result.figures["acc"].value == pytest.approx(by_hand(given, "first_word"))
        assert result.figures["acc"].stderr is not None
    assert found["dense"].tokens_sha256 == found["compressed"].tokens_sha256  # they saw the same
    assert found["dense"].dataset == found["compressed"].dataset


def test_a_result_says_what_was_measured(source: Source, folder: Path) -> None:
    [result] = measure_tasks(source, [folder / "first_word.yaml"], limit=2, few_shot=1)
    assert result.protocol.name == "lm-eval"
    assert (result.protocol.few_shot, result.protocol.limit, result.protocol.version) == (1, 2, "1.5")
    assert result.protocol.windows == 2 * len(CHOICES)
    assert result.dataset is not None
    assert result.dataset.split == "test"
    assert "first_word.jsonl" in result.dataset.name
    [other] = measure_tasks(source, [folder / "last_word.yaml"], limit=2, few_shot=1)
    assert other.tokens_sha256 != result.tokens_sha256
    assert other.dataset is not None
    assert other.dataset.sha256 != result.dataset.sha256


def test_a_folder_is_all_its_tasks_and_a_group_has_a_result(source: Source, folder: Path) -> None:
    tasks = Tasks([folder])
    assert tasks.names == ["words"]  # which runs the others
    results = measure_tasks(source, tasks)
    assert [each.task for each in results] == ["first_word", "last_word", "words"]
    found = {each.task: each for each in results}
    mean = (found["first_word"].figures["acc"].value + found["last_word"].figures["acc"].value) / 2
    assert found["words"].figures["acc"].value == pytest.approx(mean)
    assert found["words"].tokens == found["first_word"].tokens + found["last_word"].tokens


def test_mode_and_random_state_survive(source: Source, folder: Path) -> None:
    source.model.train()
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    measure_tasks(source, [folder / "first_word.yaml"], limit=1)
    assert source.model.training
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_data_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    (tmp_path / "away.yaml").write_text("task: away\ndataset_path: nobody/nothing\noutput_type: multiple_choice\n")
    with pytest.raises(
        EvaluationError, match=r"task 'away' or its data cannot be had: .*nobody/nothing.*Offline, give"
    ):
        Tasks([tmp_path / "away.yaml"])


def test_wrong_names_are_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    def small(include_path: Any = None, include_defaults: bool = True) -> Any:
        return TaskManager(include_path=str(folder), include_defaults=False)  # the whole index takes seconds

    monkeypatch.setattr("lm_eval.tasks.TaskManager", small)
    with pytest.raises(EvaluationError, match=r"lm-eval has no task 'frist_word'; did you mean 'first_word'\?"):
        Tasks(["frist_word"])
    with pytest.raises(
        EvaluationError, match=r"defines no task of lm-eval: a task's YAML file has a line 'task: NAME'"
    ):
        Tasks([tmp_path])


def test_other_models_are_told(source: Source, folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"lm-eval runs language models of transformers, and this is a Linear"):
        measure_tasks(Source("x", nn.Linear(2, 2), source.tokenizer), [folder / "first_word.yaml"])
    with pytest.raises(SourceError, match="has no tokenizer"):
        measure_tasks(Source("x", source.model, None), [folder / "first_word.yaml"])


def test_without_lm_eval_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"run by lm-eval .*: pip install 'tdkit\[lm-eval\]'"):
        Tasks(["hellaswag"])
