"""Contract tests for decompositions and hosts, to be run in the tests of plugins."""

from tdkit.testing.check import Check
from tdkit.testing.decompositions import (
    BATCHES,
    DTYPES,
    HUGE,
    SHAPES,
    TENSOR_SHAPES,
    TOLERANCE,
    check_decomposition,
    checks,
)
from tdkit.testing.hosts import check_host, host_checks
from tdkit.testing.packages import use_entry_points

__all__ = [
    "BATCHES",
    "DTYPES",
    "HUGE",
    "SHAPES",
    "TENSOR_SHAPES",
    "TOLERANCE",
    "Check",
    "check_decomposition",
    "check_host",
    "checks",
    "host_checks",
    "use_entry_points",
]
