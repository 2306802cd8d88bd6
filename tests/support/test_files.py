"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tdkit.errors import WriteError
from tdkit.support.files import recover, scratch_folder, whole_file, whole_folder, write_text


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


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdkit.support.files.exchange_paths", lambda *_: False)


def test_a_failing_last_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchange(monkeypatch)
    with whole_folder(tmp_path / "a") as target:
        (target / "x").write_text("old")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, to: Path) -> Path:
        if to == tmp_path / "a" and "-old-" not in self.name:
            raise OSError("the disk is gone")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="the disk is gone"), whole_folder(tmp_path / "a") as target:
        (target / "x").write_text("new")
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tdkit.support import files
folder, where = Path(sys.argv[1]), sys.argv[2]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if where == "between the renames":
    files.exchange_paths = lambda *_: False
    rename = Path.rename
    Path.rename = lambda self, to: rename(self, to) if "-old-" in Path(to).name else die()
with files.whole_folder(folder) as target:
    (target / "x").write_text("new")
    if where == "while writing":
        die()
"""


@pytest.mark.parametrize("where", ["while writing", "between the renames"])
def test_a_killed_process_loses_nothing_and_the_next_one_removes_what_it_left(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "a"
    with whole_folder(folder) as target:
        (target / "x").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), where], check=False)
    assert done.returncode == -signal.SIGKILL
    assert folder.exists() == (where == "while writing")
    recover(folder)
    assert names(tmp_path) == ["a"]
    assert (folder / "x").read_text() == "old"


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a") as outer:
        (outer / "x").write_text("outer")
        with whole_folder(tmp_path / "a") as inner:
            (inner / "x").write_text("inner")
        assert (tmp_path / "a" / "x").read_text() == "inner"
    assert (tmp_path / "a" / "x").read_text() == "outer"
    assert names(tmp_path) == ["a"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "a") as target:
            (target / "x").write_text("1")
        write_text(tmp_path / "b", "1")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/x", "b")]
    assert modes == [0o750, 0o640, 0o640]


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


@pytest.mark.parametrize("name", ["mkdir", "rename", "fsync"])
def test_what_cannot_be_written_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, name, refuse)
        said = r"a cannot be written .*No space left.*: free some space"
        with pytest.raises(WriteError, match=said), whole_folder(tmp_path / "a") as target:
            (target / "x").write_text("1")
    assert not (tmp_path / "a").exists()
    assert names(tmp_path) == []


def test_temporary_folders_of_killed_processes_are_swept(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tdkit.support.files import temporary_folder\n"
        "(temporary_folder('x', sys.argv[1]) / 'f').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert len(names(tmp_path)) == 1
    with scratch_folder("x", tmp_path) as folder:
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path) == []
