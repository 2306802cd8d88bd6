"""One check of a contract, and what checks have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One clause of a contract for one case; call it to run it.

    Attributes:
        name: of the clause and the case, by which tests are listed.
        run: raises AssertionError when the clause does not hold.
    """

    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return self.name


def run_all(checks: Iterable[Check]) -> None:
    """Run every check and report all failures together.

    Raises:
        AssertionError: with one line per failed check.
    """
    failures = []
    for check in checks:
        try:
            check()
        except Exception as error:
            failures.append(f"{check}: {type(error).__name__}: {error}")
    if failures:
        raise AssertionError(f"{len(failures)} checks failed:\n" + "\n".join(failures))


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with `message` unless `condition` holds."""
    if not condition:
        raise AssertionError(message)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Require equal shapes, and values equal to 1e-9 of the largest (or of 1)."""
    require(found.shape == expected.shape, f"{what} has shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    found, expected = found.detach(), expected.detach()
    gap = float((found - expected).abs().max()) if found.numel() else 0.0
    size = float(expected.abs().max()) if found.numel() else 0.0
    require(gap <= 1e-9 * max(size, 1.0), f"{what} is off by {gap:.3g}")
