"""A study of compared methods: its parts, the claims that are judged, and the sections and figures of its page."""
