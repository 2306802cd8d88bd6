"""The decompositions that tdkit ships, and what a new one is made of."""

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, Point
from tdkit.decompositions.cp import CanonicalPolyadic
from tdkit.decompositions.kronecker import Kronecker
from tdkit.decompositions.low_rank import LowRank
from tdkit.decompositions.permuted_kronecker import PermutedKronecker
from tdkit.decompositions.spatial_low_rank import SpatialLowRank
from tdkit.decompositions.tt_matrix import TTMatrix
from tdkit.decompositions.tucker import Tucker

__all__ = [
    "CanonicalPolyadic",
    "Decomposition",
    "FactorizedMatrix",
    "Kronecker",
    "LowRank",
    "PermutedKronecker",
    "Point",
    "SpatialLowRank",
    "TTMatrix",
    "Tucker",
]
