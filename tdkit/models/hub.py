"""Publish a compressed model on the hub, with its model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from tdkit.errors import CheckpointError
from tdkit.models.card import Card
from tdkit.models.checkpoint.writing import save


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    tokenizer: Any = None,
    card: bool | Card = True,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Upload a model compressed by tdkit",
) -> str:
    """Upload the folder that `tdkit.save` writes to the hub, in one commit.

    ``model.push_to_hub`` of transformers uploads the same weights, but replaces the model card by its own.

    Args:
        model: a model with or without factorised layers.
        repository: the name of the repository, as ``user/name``; made if it does not exist.
        tokenizer: a transformers tokenizer or processor to upload with it.
        card: as in `tdkit.save`; a `Card` adds what the model does not know of itself.
        private: whether a new repository is private; as the account has it when None.
        revision: the branch, made if it does not exist; the main branch when None.
        token: of the hub; the one that ``hf auth login`` stored when None.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: when the model has state that cannot be saved, `repository` is no name of the hub, or the hub
            refuses the upload.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise CheckpointError(f"{repository!r} is no name of a repository of the hub: {error}") from None
    with tempfile.TemporaryDirectory() as place:
        folder = save(model, Path(place) / "model", tokenizer=tokenizer, card=card)
        api = HfApi(token=token)
        try:
            made = api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(made.repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message=message
            )
        except (errors.HfHubHTTPError, getattr(errors, "HTTPError", OSError), OSError) as error:  # httpx, or requests
            raise CheckpointError(
                f"the hub did not take {repository}: {error}. Log in with `hf auth login`, or write the folder with "
                "tdkit.save and upload it later with `hf upload`"
            ) from error
    return str(done)
