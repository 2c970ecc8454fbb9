"""A study of compared methods: its parts, measures summarised, claims judged, and the pages and plots that show them."""
