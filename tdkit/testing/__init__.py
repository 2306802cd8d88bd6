"""The contracts that plugins must pass, as checks for their own tests."""

from tdkit.testing.decompositions import (
    BATCHES,
    DTYPES,
    HUGE,
    SHAPES,
    TOLERANCE,
    Check,
    check_decomposition,
    checks,
)

__all__ = ["BATCHES", "DTYPES", "HUGE", "SHAPES", "TOLERANCE", "Check", "check_decomposition", "checks"]
