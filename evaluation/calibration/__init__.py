"""calibrate.py: a seeded search of FreeSpec's open settings, and its judgement on other prompts."""
