"""analyze.py: spectra of attention windows, low-rank reconstructions, their tables and plots."""
