"""Files of results: written whole or not at all, claimed by one process at a time, and checked before anything is computed."""
