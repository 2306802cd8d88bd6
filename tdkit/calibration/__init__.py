"""Second moments of each layer's inputs and output gradients, measured on calibration batches."""

from tdkit.calibration.calibration import Batch, Calibration, Loss
from tdkit.calibration.measure import calibrate

__all__ = ["Batch", "Calibration", "Loss", "calibrate"]
