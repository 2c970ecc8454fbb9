"""A study of compared methods: measures summarised, claims judged, and the pages and plots that show them."""
