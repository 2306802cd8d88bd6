"""The nearest factors of a matrix, in the Frobenius norm or in a calibrated metric."""
