"""A study: its parts, their reports, and the section on Wan2.1."""
