"""The folder of a sweep: what all points depend on, and a record for each point that is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdkit.compression.work import KeptCurves
from tdkit.errors import CheckpointError
from tdkit.records.record import Record
from tdkit.support.claims import claimed
from tdkit.support.documents import read_json
from tdkit.support.files import recover, write_text, writing
from tdkit.sweeps.grid import Point

SWEEP, POINTS = "sweep.json", "points"
FORM = "tdkit-sweep/1"
WORK = "work"  # the calibration and the error curves, which are removed when all points are done


class Folder:
    """The folder of a sweep. Every file in it is written as a whole; several processes may work in it.

    Args:
        path: must not exist, be empty, or hold a sweep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / WORK
        self.curves = KeptCurves(self.work / "curves")

    def check(self, overwrite: bool) -> None:
        """Check that a sweep may be written here; with `overwrite`, remove an earlier one, and no other files.

        Raises:
            CheckpointError: when the folder holds other files.
        """
        if self.path.is_file():
            raise CheckpointError(f"{self.path} is a file: give a folder")
        if self.path.is_dir() and not (self.path / SWEEP).is_file() and not self._is_begun():
            raise CheckpointError(f"{self.path} holds other files than a sweep: give another folder")
        if overwrite and self.path.is_dir():
            with writing(self.path):
                for name in (POINTS, WORK):
                    if (self.path / name).is_dir():
                        shutil.rmtree(self.path / name)
                (self.path / SWEEP).unlink(missing_ok=True)  # last, so that what is left is a sweep

    def _is_begun(self) -> bool:
        """Returns whether the folder is empty, or holds what a process leaves that is killed in `begin`."""
        recover(self.path / SWEEP)
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(f".{SWEEP}-")}
        return names <= {POINTS, WORK} and not any((self.path / POINTS).glob("*"))

    def begin(self, job: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the sweep in it.

        Args:
            job: what every point depends on, JSON-able.
            told: what is kept for the report besides.

        Raises:
            CheckpointError: when the sweep in it depends on something else; the message says on what.
        """
        for folder in (self.path, self.path / POINTS, self.work, self.curves.folder):
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        job = json.loads(json.dumps(job))
        with claimed(self.work / "begin.lock", wait=True):
            file = self.path / SWEEP
            if file.exists():
                try:
                    known = read_json(file)["job"]
                    if not isinstance(known, dict):
                        raise ValueError("it does not say what its points depend on")
                except (ValueError, KeyError, TypeError) as error:
                    raise CheckpointError(f"{file} is damaged ({error}): remove the folder, or give another") from None
                differ = [key for key in {**known, **job} if known.get(key) != job.get(key)]
                if differ:
                    raise CheckpointError(
                        f"{self.path} holds a sweep whose {' and '.join(differ)} differed: give another folder, or "
                        "overwrite this one"
                    )
                return
            write_text(file, json.dumps({"form": FORM, "job": job, **told}, indent=1) + "\n")

    def file(self, point: Point) -> Path:
        """Returns the path of the record of a point."""
        return self.path / POINTS / f"{point.name}.json"

    def done(self, point: Point) -> Record | None:
        """Returns the record of a point that is done, or None.

        Raises:
            CheckpointError: when a point of this name is there with another policy, or its file is damaged.
        """
        file = self.file(point)
        if not file.exists():
            return None
        record = Record.read(file)
        if record.policy != json.loads(json.dumps(point.policy.to_dict())):
            raise CheckpointError(f"{file} is a point of another policy: give another folder, or overwrite this one")
        return record

    def finish(self) -> None:
        """Remove what only unfinished points need."""
        shutil.rmtree(self.work, ignore_errors=True)
        for lock in (self.path / POINTS).glob("*.lock"):
            lock.unlink(missing_ok=True)
