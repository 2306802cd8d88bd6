"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdkit.support.files import whole_file, whole_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a") as target:
        (target / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "x").read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a") as target:
        (target / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as target:
        (target / "x").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_replaces_an_old_one_entirely(tmp_path: Path) -> None:
    for name in ("x", "y"):
        with whole_folder(tmp_path / "a") as target:
            (target / name).write_text(name)
    assert names(tmp_path / "a") == ["y"]
    assert names(tmp_path) == ["a"]


def test_a_failing_last_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole_folder(tmp_path / "a") as target:
        (target / "x").write_text("old")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, to: Path) -> Path:
        if to == tmp_path / "a" and self.name != "old":
            raise OSError("the disk is gone")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="the disk is gone"), whole_folder(tmp_path / "a") as target:
        (target / "x").write_text("new")
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_file_is_replaced_or_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), whole_file(path) as target:
        target.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(path.parent) == ["f.txt"]
