"""What the engine must know of each model family, one file per family."""
