"""Multi-step distillation of any student by any teacher.

from tdkit_distill import distill, Stage

distill(student, teacher, [Stage(losses={"logits": {"temperature": 2.0}, "hidden": 0.5}, tokens="20M")], windows)
"""

from tdkit_distill.data.examples import Examples, Table, Windows
from tdkit_distill.data.masked import MaskedPairs, MaskedWindows
from tdkit_distill.data.text import text_windows
from tdkit_distill.errors import DistillError, HealingWarning
from tdkit_distill.healing.heal import InterruptedHealing, heal
from tdkit_distill.healing.report import Healing
from tdkit_distill.loop.engine import Result, distill
from tdkit_distill.loop.schedule import Schedule
from tdkit_distill.loop.stages import Optimizer, Running, Stage
from tdkit_distill.losses.loss import Loss, Needs, Term
from tdkit_distill.models.taps import tapped
from tdkit_distill.models.view import View
from tdkit_distill.teachers.cache import CachedTeacher, build_cache

__version__ = "0.1.0"

__all__ = [
    "CachedTeacher",
    "DistillError",
    "Examples",
    "Healing",
    "HealingWarning",
    "InterruptedHealing",
    "Loss",
    "MaskedPairs",
    "MaskedWindows",
    "Needs",
    "Optimizer",
    "Result",
    "Running",
    "Schedule",
    "Stage",
    "Table",
    "Term",
    "View",
    "Windows",
    "build_cache",
    "distill",
    "heal",
    "tapped",
    "text_windows",
]
