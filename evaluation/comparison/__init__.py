"""Compared videos: variants on the same prompts and seeds, their measures, and measures that outlive them."""
