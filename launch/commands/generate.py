"""generate.py: prompts to videos, on one rank or several."""

import contextlib

from engine.engine import LongVideoEngine
from engine.shown import quoted
from launch.arguments.generate import Arguments
from launch.process.stopping import ignoring_signals
from launch.ranks.join import open_ranks
from launch.video.make import make_video, summary
from launch.video.outputs import claim_outputs, frame_folders
from launch.video.prompts import look_at_given, look_at_prompts
from launch.video.remaining import find_stages


def run(given: Arguments) -> None:
    """Join the ranks, claim the files, load the model once, and make all missing videos."""
    config, prompts, outputs = given.config, given.prompts, given.outputs
    if given.is_example:
        print(
            f"no --prompt and no --config: the embedded model makes its example, {quoted(prompts.texts[0])}", flush=True
        )
    with (
        contextlib.ExitStack() as last,
        open_ranks(config, prompts=prompts.texts, verbose=given.verbose, given=given.given) as context,
        contextlib.ExitStack() as stack,
    ):
        every, folders = [path for files in outputs for path in files.all], frame_folders(outputs)
        context.check_on_first(lambda: stack.enter_context(claim_outputs(every, flag="--output.path", folders=folders)))
        notes = context.compute_on_first(lambda: look_at_given(config, given.given))
        stages = context.compute_on_first(lambda: find_stages(prompts.texts, outputs, config, given.given))
        left = [each for each in zip(prompts.named, outputs, stages, strict=True) if each[2] != "finished"]
        if not left:
            return
        look_at_prompts(config, [named for named, _, _ in left], context, given=given.given)
        for note in notes:
            print(f"note: {note}", flush=True)
        engine = stack.enter_context(LongVideoEngine(config, context.ranks))
        for index, ((_, prompt), files, stage) in enumerate(left):
            if index > 0:
                context.wait_for_first(f"video {index - 1}")
            record = make_video(
                engine, config, prompt, files, given=given.given, stage=stage, replace=config.output.overwrite
            )
            if record is not None:
                print(summary(record, files), flush=True)
        last.enter_context(ignoring_signals())
