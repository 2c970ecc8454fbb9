"""Spectra of attention, recorded during a run."""
