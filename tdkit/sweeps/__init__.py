"""Sweeps: one model compressed by each of several policies, which share a calibration and its error curves."""
