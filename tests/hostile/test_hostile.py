"""A seeded share of every part; ``make test-hostile`` runs all of it."""

from __future__ import annotations

import pytest

from tests.hostile import parts

SHARES = {
    "files": 0.02,
    "kills": 0.08,
    "faults": 0.04,
    "exceptions": 0.05,
    "numbers": 0.015,
    "plugins": 1.0,
    "memory": 0.06,
}


@pytest.mark.hostile
@pytest.mark.parametrize("name", parts.PARTS)
def test_nothing_bad_comes_of(name: str) -> None:
    part = parts.run(name, SHARES[name])
    assert part.tried > 10
    assert not part.bad, "\n".join(part.bad)
