"""Compared videos: variants on the same prompts and seeds, their measures, kept or not, and the report, page and plots of them."""
