"""Commands: read argv and the environment, start ranks, run the engine."""
