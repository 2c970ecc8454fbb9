"""What compare.py does: variants, kept videos, measures, and the report."""
