"""Spectra of attention, recorded while a run goes on."""
