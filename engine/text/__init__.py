"""Prompts: from files, against a tokenizer, as timelines, and their embeddings."""
