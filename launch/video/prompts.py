"""Check prompts and given frames, and print notes about them and the expected time, before anything is loaded."""

from collections.abc import Sequence

from engine.batch.variants import Variant
from engine.checks import check_beside
from engine.config import RunConfig
from engine.given.frames import GivenFrames
from engine.given.known import check_given, check_needs
from engine.load.checkpoint import open_checkpoint
from engine.load.loras import describe_loras
from engine.planner.cpu import describe_expected
from engine.planner.split import describe_splits, describe_unused_cache
from engine.text.prompts import Named, check_prompts
from launch.ranks.join import DistContext


def look_at_prompts(
    config: RunConfig,
    prompts: Sequence[Named],
    context: DistContext | None = None,
    *,
    variants: Sequence[Variant] = (),
    given: GivenFrames | None = None,
) -> None:
    """Check the prompts on rank 0 and print notes; every rank of `context` calls this.

    `variants` are the methods, if there are several.

    Raises UserError, on all ranks, for prompts that are too long, and for a checkpoint that needs pictures which are not `given`.
    """
    ranks = 1 if context is None or context.ranks is None else context.ranks.mesh.world.size

    def look() -> None:
        for note in check_prompts(config.model, config.sampler, config.video, prompts):
            print(f"note: {note}", flush=True)
        checkpoint = open_checkpoint(config.model)
        check_needs(given, checkpoint.spec, num_frames=config.video.num_frames, fps=config.video.fps)
        where = checkpoint.folder / "transformer"
        for note in describe_loras(config.model, checkpoint.adapter, checkpoint.read("transformer/config.json"), where):
            print(f"note: {note}", flush=True)
        methods = {each.label: each.config.method for each in variants}
        for note in [*describe_splits(config, methods), *describe_unused_cache(config, methods)]:
            print(f"note: {note}", flush=True)
        expected = describe_expected(config, num_prompts=len(prompts), ranks=ranks, given=given)
        if expected is not None:
            print(f"note: {expected}", flush=True)

    (context or DistContext()).check_on_first(look)


def look_at_given(config: RunConfig, given: GivenFrames | None, *, variants: Sequence[Variant] = ()) -> list[str]:
    """Check the given frames before anything is loaded; returns notes for the user, one sentence each.

    `variants` are the methods, if there are several.
    """
    video, spec = config.video, open_checkpoint(config.model).spec
    size = {"num_frames": video.num_frames, "height": video.height, "width": video.width}
    notes = check_given(given, spec, **size, fps=video.fps)
    for each in [variant.config for variant in variants] or [config]:
        check_beside(each, spec, given, num_frames=video.num_frames)
    return notes
