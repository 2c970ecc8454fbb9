"""batch.py: make prompts x seeds x methods on fault-tolerant replicas; finished items are not made again."""

from collections.abc import Sequence

from engine.batch.files import BatchFiles
from engine.batch.items import Batch, Item, check_folder, claim_folder, plan_batch
from engine.batch.locks import own_shard
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.decode.tiling import check_tiles
from engine.files.checks import make_folder
from engine.files.storage import writing_to
from engine.load.checkpoint import open_checkpoint
from launch.arguments.batch import Arguments, Options
from launch.batching.devices import arrange_variants, check_devices
from launch.batching.messages import SUPPORT, check_room, say_plan, say_start
from launch.batching.runner import finish, make
from launch.batching.work import Work
from launch.video.prompts import look_at_given, look_at_prompts


def run(given: Arguments) -> None:
    """Plan, claim the output folder, make missing videos, and report."""
    options = given.options
    config, variants, arrangement = arrange_variants(
        given.config, given.variants, options, gpu=options.gpu, given=options.given
    )
    batch = read_batch(config, variants, given)
    mine = [item for item in batch.items if options.shard.owns(item.item_id)]
    notes = look_at_given(config, options.given, variants=variants)
    files = BatchFiles(root=options.out)
    check_devices(config, options)
    files.check()
    check_folder(options.out, batch)
    named = [(prompt.where(batch.suite.name), prompt.text) for prompt in batch.suite.prompts]
    look_at_prompts(config, named, variants=variants, given=options.given)
    for note in notes:
        print(f"note: {note}", flush=True)
    if given.dry_run:
        say_plan(config, options, batch, mine, f"{arrangement.degrees}: {arrangement.why}")
        return
    make_folder(options.out)
    with (
        writing_to(options.out, after=SUPPORT),
        own_shard(options.out, options.shard),
    ):
        work = find_work(files, mine, options)
        if work.todo:
            check_room(files, config, work.todo, replicas=options.replicas, keep_latents=options.keep_latents)
        say_start(options, files, batch, mine, work)
        if work.todo:
            make(config, options, batch, files, work)
        else:
            claim_folder(options.out, batch)
            finish(options, files, config, work, None)


def read_batch(config: RunConfig, variants: Sequence[Variant], given: Arguments) -> Batch:
    """Plan the items; their ids hash what decides them."""
    checkpoint = open_checkpoint(config.model)
    # Checks that the engine would only make once it is loaded.
    spec = checkpoint.spec
    spec.check_video(config.video.num_frames, config.video.height, config.video.width)
    check_tiles(config.decode, spec)
    frames, video = given.options.given, {"num_frames": config.video.num_frames, "fps": config.video.fps}
    return plan_batch(
        variants,
        given.suite,
        seeds=given.options.seeds,
        checkpoint=checkpoint.digest,
        dtype=config.model.dtype,
        given=None if frames is None else frames.settings(**video, step=spec.temporal_factor, pictures=spec.pictures),
    )


def find_work(files: BatchFiles, mine: Sequence[Item], options: Options) -> Work:
    """Sort the items by their files; delete leftovers of killed processes."""
    done, given_up, todo = [], [], []
    for item in mine:
        if files.is_done(item, options.verify):
            done.append(item)
        elif files.quarantined(item) is None:
            todo.append(item)
        elif options.retry_quarantined:
            files.release(item)
            todo.append(item)
        else:
            given_up.append(item)
    files.tidy(done=done, todo=todo)
    return Work(done=tuple(done), given_up=tuple(given_up), todo=tuple(todo))
