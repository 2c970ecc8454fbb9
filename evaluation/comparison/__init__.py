"""compare.py: videos of variants, their measures, and the report."""
