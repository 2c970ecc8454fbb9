"""Ranks and process groups: meshes, shard plans, collectives, parallel attention. Knows no model."""
