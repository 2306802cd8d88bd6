"""Validation of devices."""

from __future__ import annotations

import torch

from tdkit.errors import OptionError


def check_device(device: torch.device | str | None) -> torch.device | None:
    """Returns the device if it is available on this machine; None for None.

    Raises:
        OptionError: when the name is no device, or this machine or this build of torch lacks the device.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            f"device={str(device)!r} is no device ({_first_line(error)}): give cpu, cuda or cuda:1"
        ) from None
    if found.type == "meta":
        raise OptionError(f"device={str(device)!r} holds no numbers, so nothing is computed there: give cpu or cuda")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise OptionError(
            f"device={str(device)!r} is not available here ({_why_not(found) or _first_line(error)}): "
            "leave it out to compute on the CPU"
        ) from None
    return found


def _why_not(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA"
    count = torch.cuda.device_count()
    return f"torch sees {count} CUDA devices" if count != 1 else "torch sees one CUDA device, cuda:0"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
