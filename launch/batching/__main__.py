"""`python -m launch.batching`: a rank of a replica; see `launch.batching.worker`."""

from launch.process.imports import uncollected
from launch.process.stopping import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    with uncollected():
        from launch.batching.worker import run
    run()
