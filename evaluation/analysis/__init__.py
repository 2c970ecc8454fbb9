"""Spectra of attention windows and videos of low rank: kept rows, tables and plots."""
