"""Helpers for all packages: atomic file writes, progress bars, tables, devices, distributed processes."""
