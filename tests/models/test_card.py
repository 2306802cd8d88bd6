"""Model cards and folders of the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import tdkit
from tdkit import Card, LowRank, Policy, Rule
from tdkit.errors import CheckpointError
from tdkit.models.card import licence_of
from tdkit.models.sites import num_params

POLICY = Policy([Rule("*.mlp.*", LowRank())], budget=0.8)


def front(text: str) -> Any:
    return yaml.safe_load(text.split("---")[1])


def test_a_card_says_how_the_model_was_made_and_is_loaded(gpt2: Any, tmp_path: Path) -> None:
    before = num_params(gpt2)
    tdkit.compress(gpt2, POLICY)
    evaluation = {"perplexity": 21.25, "tokens": 4088, "context": 512, "dataset": "speeches"}
    card = Card(
        policy=POLICY.to_yaml(), budget=0.8, evaluation=evaluation, base_model="openai-community/gpt2", licence="mit"
    )
    text = (tdkit.save(gpt2, tmp_path / "saved", card=card) / "README.md").read_text(encoding="utf-8")
    after = num_params(gpt2)
    assert front(text)["base_model"] == "openai-community/gpt2"
    assert front(text)["license"] == "mit"
    assert front(text)["library_name"] == "transformers"
    assert "tdkit" in front(text)["tags"]
    assert f"{after:,} parameters instead of {before:,} (ratio {after / before:.3f})" in text
    assert "| low_rank | 8 | 32,768 |" in text
    assert "budget: 0.8" in text
    assert "| perplexity | 21.25 |\n| tokens | 4088 |\n| context | 512 |\n| dataset | speeches |" in text
    assert "import tdkit  # before from_pretrained" in text
    assert "from transformers import GPT2LMHeadModel" in text
    assert {path.name for path in tmp_path.joinpath("saved").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors")
    }


def test_a_card_says_what_is_not_known(tmp_path: Path) -> None:
    model = tdkit.compress(nn.Sequential(nn.Linear(12, 12)), Policy([Rule("*", LowRank(rank=2))]))
    text = (tdkit.save(model, tmp_path / "saved", card=True) / "README.md").read_text(encoding="utf-8")
    assert "Base model: unknown. Licence of the base model: unknown, see the base model." in text
    assert "No evaluation was given" in text
    assert "license" not in front(text)
    assert front(text)["library_name"] == "tdkit"
    assert "tdkit.load(folder, model=Sequential(...))" in text
    assert not (tdkit.save(model, tmp_path / "without") / "README.md").exists()


def test_the_licence_is_read_from_the_card_of_the_base_model(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    assert licence_of(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("# Model\n")
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(str(tmp_path)) is None
    assert licence_of("no/such-model") is None
    assert licence_of("") is None


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub with two revisions of a model, as huggingface_hub lays it out."""
    place = tmp_path / "hub" / "models--user--small"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    from tests.conftest import make_gpt2

    for name, seed in (("main", 1), ("v2", 2)):
        torch.manual_seed(seed)
        commit = f"{seed}" * 40
        tdkit.save(tdkit.compress(make_gpt2(), POLICY), place / "snapshots" / commit, card=Card(licence="mit"))
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / name).write_text(commit)
    return place


def test_a_revision_of_the_hub_is_loaded_from_the_cache(cached: Path, ids: Tensor) -> None:
    by_name: Any = tdkit.load("user/small")
    other: Any = tdkit.load("user/small", revision="v2")
    again: Any = tdkit.load(cached / "snapshots" / ("2" * 40))
    assert torch.equal(other(ids).logits, again(ids).logits)
    assert not torch.equal(other(ids).logits, by_name(ids).logits)
    assert licence_of("user/small") == "mit"
    with pytest.raises(CheckpointError, match=r"user/small does not exist here, and the hub gave none at revision v3"):
        tdkit.load("user/small", revision="v3")
    with pytest.raises(CheckpointError, match=r"user/other does not exist here, and the hub gave none \("):
        tdkit.load("user/other")
    with pytest.raises(CheckpointError, match="is a local folder, and only a hub name has a revision"):
        tdkit.load(cached, revision="v2")


def test_transformers_reads_a_revision_of_the_hub(cached: Path, ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained("user/small", revision="v2", cache_dir=cached.parent)
    ours: Any = tdkit.load("user/small", revision="v2")
    assert torch.equal(loaded(ids).logits, ours(ids).logits)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the hub, to which uploads are copied: USER/NAME/REVISION."""
    from huggingface_hub import HfApi, RepoUrl

    place = tmp_path / "published"

    def create_repo(_: HfApi, repo_id: str, **__: Any) -> RepoUrl:
        (place / repo_id).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(_: HfApi, *, repo_id: str, folder_path: Path, revision: str | None, **__: Any) -> str:
        return str(shutil.copytree(folder_path, place / repo_id / (revision or "main")))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_branch", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return place


def test_what_is_pushed_to_the_hub_has_a_card_and_is_read_by_transformers(gpt2: Any, ids: Tensor, hub: Path) -> None:
    from transformers import AutoModelForCausalLM

    tdkit.compress(gpt2, POLICY)
    address = tdkit.push_to_hub(gpt2, "user/small", card=Card(policy=POLICY.to_yaml(), licence="mit"), revision="v2")
    assert address == str(hub / "user" / "small" / "v2")
    text = (Path(address) / "README.md").read_text(encoding="utf-8")
    assert front(text)["license"] == "mit"
    assert "| low_rank | 8 |" in text
    assert torch.equal(AutoModelForCausalLM.from_pretrained(address)(ids).logits, gpt2(ids).logits)


def test_what_the_hub_does_not_take_is_an_error(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="'user/small/x' is no name of a repository"):
        tdkit.push_to_hub(gpt2, "user/small/x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"the hub did not take user/small: .*hf auth login"):
        tdkit.push_to_hub(gpt2, "user/small", token="none")
