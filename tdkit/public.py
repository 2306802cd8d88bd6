"""The names of ``import tdkit``, which loads them when the first is used."""

from tdkit.calibration.calibration import Calibration
from tdkit.calibration.measure import calibrate
from tdkit.calibration.stream import calibrate_folder
from tdkit.compression.apply import compress
from tdkit.compression.stream import compress_folder
from tdkit.decompositions import (
    CanonicalPolyadic,
    Decomposition,
    FactorizedMatrix,
    Kronecker,
    LowRank,
    PermutedKronecker,
    SpatialLowRank,
    TTMatrix,
    Tucker,
)
from tdkit.decompositions.auto import Auto
from tdkit.decompositions.quantized import Quantized
from tdkit.decompositions.shrink import Shrink
from tdkit.decompositions.stacked import Stacked
from tdkit.errors import TdkitError
from tdkit.fitting.metric import Metric
from tdkit.models.card import Card
from tdkit.models.checkpoint import load, save
from tdkit.models.conversion import to_dense, to_sequential
from tdkit.models.hub import push_to_hub
from tdkit.models.preparation import prepare
from tdkit.models.quantization import quantize
from tdkit.planning.plan import Plan
from tdkit.planning.planner import applied_plan, plan
from tdkit.planning.policy import Policy
from tdkit.planning.rule import Rule
from tdkit.sweeps.sweep import sweep

__all__ = [
    "Auto",
    "Calibration",
    "CanonicalPolyadic",
    "Card",
    "Decomposition",
    "FactorizedMatrix",
    "Kronecker",
    "LowRank",
    "Metric",
    "PermutedKronecker",
    "Plan",
    "Policy",
    "Quantized",
    "Rule",
    "Shrink",
    "SpatialLowRank",
    "Stacked",
    "TTMatrix",
    "TdkitError",
    "Tucker",
    "applied_plan",
    "calibrate",
    "calibrate_folder",
    "compress",
    "compress_folder",
    "load",
    "plan",
    "prepare",
    "push_to_hub",
    "quantize",
    "save",
    "sweep",
    "to_dense",
    "to_sequential",
]
