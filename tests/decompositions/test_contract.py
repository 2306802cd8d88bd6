"""Every registered decomposition, those of installed plugins included, passes the shipped contract."""

from __future__ import annotations

import pytest

from tdkit.decompositions.registered import decompositions
from tdkit.testing import Check, checks
from tests.kinds import OTHERS

BUILT_IN = (
    *("low_rank", "kronecker", "permuted_kronecker", "tt_matrix", "tucker", "cp", "spatial_low_rank", "stacked"),
    "auto",
)
EVERY = [
    pytest.param(check, id=f"{name}-{check}")
    for name in decompositions.names()
    if name not in OTHERS  # test_blocks.py, test_quantized.py
    for check in checks(decompositions.get(name), metric="used" if name in BUILT_IN else None)
]


@pytest.mark.parametrize("check", EVERY)
def test_contract(check: Check) -> None:
    check()
