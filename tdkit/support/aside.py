"""Tensors set aside in a temporary file that has no name: nobody can remove it, and it ends with the process."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the file.

    Attributes:
        start: in bytes.
        shape: of the tensor.
        dtype: of the tensor.
    """

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Aside:
    """A file for tensors in the temporary folder."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="tdkit-", buffering=0)  # noqa: SIM115, closed by `close`
        self._end = 0

    def put(self, tensor: Tensor) -> Place:
        """Write a tensor.

        Raises:
            OSError: when there is no room; the tensors before it stay.
        """
        place = Place(self._end, tuple(tensor.shape), tensor.dtype)
        left = memoryview(_bytes_of(tensor.detach().cpu().contiguous()))
        self._file.seek(place.start)
        while left:
            left = left[self._file.write(left) :]
        self._end = self._file.tell()
        return place

    def get(self, place: Place) -> Tensor:
        """Read a tensor, which is contiguous and on the CPU.

        Raises:
            OSError: when the file gives fewer bytes than were written.
        """
        tensor = torch.empty(place.shape, dtype=place.dtype)
        left = memoryview(_bytes_of(tensor))
        self._file.seek(place.start)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError("the temporary file is shorter than what was written to it")
            left = left[count:]
        return tensor

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


def _bytes_of(tensor: Tensor) -> bytearray:
    """Returns the memory of a contiguous tensor."""
    data: bytearray = tensor.reshape(-1).view(torch.uint8).numpy().data  # type: ignore[assignment]
    return data
