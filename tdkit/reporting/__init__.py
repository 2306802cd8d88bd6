"""The report of saved models, runs and sweeps: one HTML page that needs no network, its figures, and JSON."""
