"""Locks that processes share: who gets them, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdkit.errors import WriteError
from tdkit.support.claims import claimed


def test_one_gets_it_and_the_next_after_it(tmp_path: Path) -> None:
    with claimed(tmp_path / "a.lock", wait=True) as first, claimed(tmp_path / "a.lock", wait=False) as second:
        assert (first, second) == (True, False)
    with claimed(tmp_path / "a.lock", wait=False) as third:
        assert third


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(WriteError, match=r"a\.lock cannot be written"),
        claimed(tmp_path / "file" / "a.lock", wait=True),
    ):
        pass
