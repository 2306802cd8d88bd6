"""The policy that a command is given, and the check of the folder it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tdkit.decompositions.registered import decomposition
from tdkit.errors import OptionError, PolicyError
from tdkit.models.checkpoint import is_saved
from tdkit.planning.policy import Policy
from tdkit.planning.rule import Rule
from tdkit.support.documents import parse_yaml


def policy_of(file: Path | None, with_: str, match: list[str] | None, budget: str | None) -> Policy:
    """Returns the policy of a file or of the options; a budget replaces that of the file.

    Raises:
        OptionError, PolicyError: when it is none.
    """
    asked = None
    if budget is not None:
        try:
            asked = parse_yaml(budget)
        except ValueError as error:
            raise OptionError(f"--budget {budget!r}: {error}") from None
    if file is not None:
        if not file.is_file():
            raise PolicyError(f"policy file {file} does not exist")
        chosen = Policy.from_yaml(file)
        return chosen if asked is None else replace(chosen, budget=asked)
    try:
        spec = parse_yaml(with_)
    except ValueError as error:
        raise OptionError(f"--with {with_!r}: {error}") from None
    kind = decomposition(spec)
    return Policy([Rule(glob, kind) for glob in match or ["*"]], asked)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check that a model can be saved in a folder.

    Raises:
        PolicyError: when it holds something else, or an earlier save that is not to be replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise PolicyError(f"{folder} is a file: give a folder")
    if any(folder.iterdir()):
        if not is_saved(folder):
            raise PolicyError(f"{folder} holds other files: give another folder")
        if not overwrite:
            raise PolicyError(f"{folder} holds an earlier save: give another folder, or --overwrite it")
