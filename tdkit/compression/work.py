"""The folder of unfinished work beside an output folder: what is done is kept, so that a later call goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from tdkit.calibration.calibration import CurveKey
from tdkit.decompositions.base import FactorizedMatrix, Point
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import CheckpointError
from tdkit.models.shards import Entry, write_tensors
from tdkit.support.claims import claimed, shared_by_claims
from tdkit.support.documents import parse_json, read_json
from tdkit.support.files import whole_file, write_text, writing
from tdkit.support.version import VERSION

T = TypeVar("T")

JOB = "job.json"
ENTRY = "layer"  # the key of a layer's description in the metadata of its file


class Work:
    """The folder ``NAME.work`` beside the folder ``NAME``: layers that are fitted, error curves and the plan.

    Several processes may work in it at once. Every file in it is written as a whole.

    Args:
        out: the output folder.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.work")
        self.curves = KeptCurves(self.folder / "curves")

    def begin(self, job: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the work in it.

        Args:
            job: what the work depends on, JSON-able.

        Raises:
            CheckpointError: when the work in it is of another job or of another version; the message says what differs.
        """
        job = {"version": VERSION, **json.loads(json.dumps(job))}
        while not self._begun(job):
            pass  # another process has removed the folder meanwhile, since its work was done

    def _begun(self, job: Mapping[str, Any]) -> bool:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.folder), claimed(self.folder / "job.lock", wait=True) as mine:
            if not mine:
                return False
            path = self.folder / JOB
            if not path.exists():  # what else is there is of a job whose process was killed while it was removed
                for place in self.folder.iterdir():
                    if place.is_dir():
                        shutil.rmtree(place)
                    elif place.suffix != ".lock":
                        place.unlink()
                for name in ("layers", "curves"):
                    (self.folder / name).mkdir()
                write_text(path, json.dumps(job, indent=2))
                return True
            try:
                known = read_json(path)
                if not isinstance(known, dict):
                    raise ValueError(f"it holds a {type(known).__name__}")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged ({error}): delete {self.folder}") from None
        differ = [key for key in {**known, **job} if known.get(key) != job.get(key)]
        if differ:
            raise CheckpointError(
                f"{self.folder} holds the unfinished work of a call whose {' and '.join(differ)} differed: repeat that "
                "call to go on, or delete the folder, or give another output folder"
            )
        return True

    def is_over(self) -> bool:
        """Returns whether the work has been finished and removed."""
        return not (self.folder / JOB).exists()

    def share(self, items: Sequence[T], place: Callable[[T], Path], work: Callable[[T], None]) -> Iterator[T]:
        """As `shared_by_claims`."""
        return shared_by_claims(items, place, work, over=self.is_over)

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Returns the path called `name`, which one process makes while the others wait."""
        path = self.folder / name
        with claimed(self.folder / f"{name}.lock", wait=True) as mine:
            if mine and not path.exists() and not self.is_over():
                make(path)
        return path

    def layer(self, number: int) -> Path:
        """Returns the path of the file of a fitted weight, by its place in the plan."""
        return self.folder / "layers" / f"{number:06}.safetensors"

    def remove(self) -> None:
        """Delete the folder: the job first, by which other processes see that the work is over."""
        (self.folder / JOB).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def write_layer(path: Path, matrix: FactorizedMatrix, entry: Mapping[str, Any]) -> None:
    """Write fitted factors, and the description of the layer that a saved model holds."""
    tensors = {name: tensor.detach() for name, tensor in matrix.state_dict().items()}
    entries = {name: Entry.of(tensor) for name, tensor in tensors.items()}
    with whole_file(path) as target:
        write_tensors(target, entries, {ENTRY: json.dumps(entry)})


def read_entry(path: Path) -> dict[str, Any]:
    """Returns the description of the layer in a file that `write_layer` wrote.

    Raises:
        CheckpointError: when the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entry: dict[str, Any] = parse_json(file.metadata()[ENTRY])
            return entry
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it, and it is fitted again") from None


class KeptCurves:
    """Error curves in files, one for each site and decomposition."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, site: str, kind: str) -> Path:
        """Returns the file of a curve.

        Args:
            site: the name of the site.
            kind: the ``repr`` of the decomposition.
        """
        return self.folder / f"{hashlib.sha256(json.dumps([site, kind]).encode()).hexdigest()[:32]}.json"

    def __contains__(self, key: CurveKey, /) -> bool:
        return self.path(*key[:2]).exists()

    def __getitem__(self, key: CurveKey, /) -> list[Point]:
        path = self.path(*key[:2])
        try:
            return [Point(decomposition(spec), int(params), float(error)) for spec, params, error in read_json(path)]
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): delete it, and it is computed again") from None

    def __setitem__(self, key: CurveKey, points: list[Point], /) -> None:
        form = [[spec_of(point.decomposition), point.params, point.error] for point in points]
        write_text(self.path(*key[:2]), json.dumps(form))
