"""Second moments of each layer's inputs and output gradients, measured on calibration batches."""

from tdkit.calibration.batches import Batch, Weighted
from tdkit.calibration.calibration import Calibration, Loss
from tdkit.calibration.measure import calibrate

__all__ = ["Batch", "Calibration", "Loss", "Weighted", "calibrate"]
