"""Multi-step distillation of any student by any teacher.

from tdkit_distill import distill, Stage

distill(student, teacher, [Stage(losses={"logits": {"temperature": 2.0}, "hidden": 0.5}, tokens="20M")], windows)
"""

from tdkit_distill.engine import Result, distill
from tdkit_distill.errors import DistillError
from tdkit_distill.examples import Examples, MaskedWindows, Table, Windows
from tdkit_distill.losses import Loss, Term
from tdkit_distill.next_sentence import MaskedPairs
from tdkit_distill.schedule import Schedule
from tdkit_distill.stages import Optimizer, Running, Stage
from tdkit_distill.taps import tapped
from tdkit_distill.teacher_cache import CachedTeacher, build_cache
from tdkit_distill.text import text_windows

__version__ = "0.1.0"

__all__ = [
    "CachedTeacher",
    "DistillError",
    "Examples",
    "Loss",
    "MaskedPairs",
    "MaskedWindows",
    "Optimizer",
    "Result",
    "Running",
    "Schedule",
    "Stage",
    "Table",
    "Term",
    "Windows",
    "build_cache",
    "distill",
    "tapped",
    "text_windows",
]
