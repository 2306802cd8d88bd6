"""What each weight sees and what the loss asks of it: second moments measured on calibration batches."""

from tdkit.calibration.calibration import Batch, Calibration, Loss
from tdkit.calibration.measure import calibrate

__all__ = ["Batch", "Calibration", "Loss", "calibrate"]
