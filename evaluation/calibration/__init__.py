"""The search of FreeSpec's open settings: its space, its videos, its scores and their judgement."""
