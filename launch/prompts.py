"""What a command says of its prompts before it loads anything."""

from collections.abc import Sequence

from engine.config import RunConfig
from engine.prompts import Named, check_prompts
from launch.ranks import Party


def look_at_prompts(config: RunConfig, prompts: Sequence[Named], party: Party | None = None) -> None:
    """Say what there is to know of the prompts, on rank 0; UserError, on all ranks, for prompts that are too long.

    Every rank of `party` calls this.
    """

    def look() -> None:
        for note in check_prompts(config.model, config.sampler, config.video, prompts):
            print(f"note: {note}", flush=True)

    (party or Party()).check_on_first(look)
