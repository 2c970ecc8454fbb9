"""The options of each command and their checks; without torch, so that mistakes are reported at once."""
