"""Fits: the factors nearest to a matrix, in the Frobenius norm or in a calibrated metric."""
