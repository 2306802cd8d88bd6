"""Tensor decompositions that compress any PyTorch model.

policy = Policy([Rule("*.mlp.*", LowRank())], budget=0.8)
print(tdkit.plan(model, policy))
model = tdkit.compress(model, policy)
tdkit.save(model, "smaller")
"""

from tdkit.auto import Auto
from tdkit.calibration import Calibration, calibrate
from tdkit.checkpoint import load, save
from tdkit.compression import compress
from tdkit.decompositions import Decomposition, FactorizedMatrix, Kronecker, LowRank, PermutedKronecker, TTMatrix
from tdkit.errors import TdkitError
from tdkit.metric import Metric
from tdkit.plan import Plan
from tdkit.planning import applied_plan, plan
from tdkit.policy import Policy, Rule
from tdkit.prepare import prepare

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Calibration",
    "Decomposition",
    "FactorizedMatrix",
    "Kronecker",
    "LowRank",
    "Metric",
    "PermutedKronecker",
    "Plan",
    "Policy",
    "Rule",
    "TTMatrix",
    "TdkitError",
    "applied_plan",
    "calibrate",
    "compress",
    "load",
    "plan",
    "prepare",
    "save",
]
