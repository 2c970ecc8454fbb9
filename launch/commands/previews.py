"""previews.py: fit the map from latents to colours of a VAE."""

from engine.decode.preview import PreviewFit, vae_digest
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.whole import describe_error
from launch.arguments.previews import Arguments
from launch.video.outputs import claim_outputs


def run(given: Arguments) -> None:
    """Make a video of each prompt, fit its pixels on its latents, and write the factors."""
    config, out = given.config, given.out
    with claim_outputs([out], flag="--out"), LongVideoEngine(config) as engine:
        spec = engine.spec
        # A picture of 1/4 of the video's sides for Wan, 1/8 for LTX-Video, whose latents are fewer.
        fit = PreviewFit(pixels=max(2, spec.spatial_factor // 8), step=spec.temporal_factor)
        for prompt in given.prompts:
            made = engine.generate(prompt)
            fit.add(made.latents[0], made.frames)
        factors, share = fit.solve(vae_digest(engine.pipe.vae))
        video = config.video
        facts = {"model": config.model.path, "videos": len(given.prompts), "explained": round(share, 4)}
        try:
            factors.save(out, facts | {"num_frames": video.num_frames, "size": f"{video.width}x{video.height}"})
        except OSError as error:
            raise UserError(describe_error(error, out)) from error
    print(
        f"{out}: {100 * share:.0f} % of the colours' variance in {len(given.prompts)} videos; for serve.py --preview_factors"
    )
