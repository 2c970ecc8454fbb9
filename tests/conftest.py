"""What all tests share: a process that imports torch, diffusers and every test, and whose collector does not look through them again."""

import gc

gc.disable()


def pytest_collection_finish() -> None:
    """What is collected so far is never garbage."""
    gc.freeze()
    gc.enable()
