"""Records: what was done to a model, by which call, and what was measured before and after, as JSON."""

from tdkit.records.before import Before
from tdkit.records.following import followed, record_of
from tdkit.records.record import RECORD, Data, Figures, Record, Sample
from tdkit.records.spectra import Spectrum, spectra_of
from tdkit.records.tree import Branch, render_tree, tree_of

__all__ = [
    "RECORD",
    "Before",
    "Branch",
    "Data",
    "Figures",
    "Record",
    "Sample",
    "Spectrum",
    "followed",
    "record_of",
    "render_tree",
    "spectra_of",
    "tree_of",
]
