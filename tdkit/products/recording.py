"""Whether a call is recorded as a graph or transformed, in which it consists of plain operations on tensors only."""

from __future__ import annotations

import torch

from tdkit.support.compatibility import in_transform, is_jit_traced


def is_recorded() -> bool:
    """Returns whether torch.compile, torch.export or torch.jit.trace records the operations of this call."""
    return torch.compiler.is_compiling() or is_jit_traced()


def is_for_all_sizes() -> bool:
    """Returns whether the record must serve inputs of other sizes too: that of torch.export or torch.jit.trace.

    Code that torch.compile makes is made again for other sizes; in a program that is exported, or traced, the sizes
    of the example must decide nothing.
    """
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else is_jit_traced()


def needs_plain_operations() -> bool:
    """Returns whether autograd functions, caches and writes in place must be avoided in this call.

    They are not part of an exported or traced program, and not defined for the transforms of ``torch.func``, such as
    ``vmap``, nor for derivatives in forward mode.
    """
    return is_for_all_sizes() or (not torch.compiler.is_compiling() and in_transform())
