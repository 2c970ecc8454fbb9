"""FreeSpec as pure functions on tensors: windows, attention branches, spectra and their fusion. Knows no ranks, models or files."""
