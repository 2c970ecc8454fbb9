"""Options of other programs, and slips: the setting's name, "not supported", or no suggestion at all."""

from collections.abc import Callable

import pytest

from launch.cli.foreign import ANSWERS, FLAGS, RENAMED, converted
from tests.launch.conftest import Run

GENERATE = {
    # the table of Wan's generate.py
    "--task t2v-1.3B": "did you mean --config wan2.1-t2v-1.3b?",
    "--task i2v-14B": "give the preset of the task, such as --config wan2.1-i2v-14b-480p",
    "--task i2v-A14B": "did you mean --config wan2.2-i2v-a14b?",
    "--size 832*480": "did you mean --video.width 832 --video.height 480?",
    "--size huge": "did you mean video.width and video.height?",
    "--frame_num 81": "did you mean --video.num_frames 81?",
    "--ckpt_dir ./Wan2.1": "did you mean --model.path ./Wan2.1?",
    "--offload_model True": "did you mean --model.weights cpu_offload?",
    "--offload_model False": "leave it out",
    "--ulysses_size 4": "did you mean --parallel.ulysses 4?",
    "--ring_size 2": "did you mean --parallel.ring 2?",
    "--t5_fsdp": "did you mean --model.weights zero3?",
    "--t5_cpu": "did you mean --parallel.text_device cpu?",
    "--dit_fsdp": "did you mean --model.weights zero3?",
    "--save_file a b": "did you mean --output.path 'a b.mp4'?",
    "--use_prompt_extend": "not supported: prompts are used as given",
    "--base_seed 42": "did you mean --sampler.seed 42?",
    "--image a.png": "generate.py --given WHERE=FILE shows a picture at a moment of the video, such as first=FILE",
    "--sample_solver unipc": "--sampler.scheduler is checkpoint, euler, unipc or lcm; see docs/models.md",
    "--sample_steps 50": "did you mean --sampler.num_steps 50?",
    "--sample_shift 5": "did you mean --sampler.flow_shift 5?",
    "--sample_guide_scale 6": "did you mean --sampler.guidance_scale 6?",
    # LTX-Video's inference.py
    "--output_path outputs": "did you mean --output.path outputs.mp4?",
    "--ckpt_path a/ltxv.safetensors": "did you mean --model.single_file a/ltxv.safetensors?",
    "--ckpt_path a/ltxv": "did you mean --model.path a/ltxv?",
    "--num_inference_steps 40": "did you mean --sampler.num_steps 40?",
    "--frame_rate 25": "did you mean --video.fps 25?",
    "--bfloat16": "did you mean --model.dtype bfloat16?",
    "--stg_scale 1": "not supported: guidance is classifier-free",
    "--conditioning_media_paths a": "generate.py --given WHERE=FILE shows a picture",
    "--input_video a.mp4": "generate.py --extend FILE continues a video",
    "--pose_video a.mp4": "not supported: a video can only be continued, with generate.py --extend FILE",
    "--pipeline_config x.yaml": "such as --config wan2.1-t2v-1.3b",
    # diffusers, xDiT, FastVideo, SGLang
    "--num-inference-steps 30": "did you mean --sampler.num_steps 30?",
    "--model-path a/b": "did you mean --model.path a/b?",
    "--torch_dtype torch.float16": "did you mean --model.dtype float16?",
    "--enable-model-cpu-offload": "did you mean --model.weights cpu_offload?",
    "--ulysses_degree 2": "did you mean --parallel.ulysses 2?",
    "--use_cfg_parallel": "did you mean --parallel.cfg 2?",
    "--pipefusion_parallel_degree 2": "not supported: ranks share a video by Ulysses and ring",
    "--tp-size 2": "not supported: ranks share a video; model.weights zero3",
    "--sp-size 4": "did you mean --parallel.ulysses 4?",
    "--num-gpus 8": "did you mean --nproc 8?",
    "--gpus 2": "did you mean --nproc 2?",
    "--enable-torch-compile": "did you mean --model.compile true?",
    "--attention-backend fa": "did you mean --attention.kernel fa?",
    "--high-noise-diffusion-model a.gguf": "--model.single_file '[high:FILE, low:FILE]' replaces the two transformers",
    "--lora x": "--model.loras '[FILE@SCALE, ...]' adds LoRAs to the weights; see docs/models.md",
    "--output_dir out/": "did you mean --output.path out/video.mp4?",
    "-o x.mp4": "unknown setting -o; did you mean --output.path x.mp4?",
    "--cfg 7": "sampler.guidance_scale for classifier-free guidance, or parallel.cfg",
    "--nnodes 2": "an option of torchrun",
    # our own, in other words or of other commands
    "--seed 3": "did you mean sampler.seed?",
    "--negative-prompt x": "did you mean sampler.negative_prompt?",
    "--video.num-frames 3": "did you mean video.num_frames?",
    "--path x": "did you mean model.path or output.path?",
    "--prompt_list a.txt": "did you mean --prompts a.txt?",
    "--num_points 2": "it is an option of analyze; this command does not use it",
    "--shard 1/2": "it is an option of batch and compare; this command does not use it",
    "--methods direct": "did you mean --method.name direct?",
    "--num_judge_seeds 2": "--judge_seeds is an option of calibrate; this command does not use it",
    "--checkpoint_every 4": "unknown setting checkpoint_every; did you mean output.snapshot_every?",
    "--num_seeds 2": "unknown setting num_seeds; this command does not use it; leave it out",
    "--guidance_scale_2 3": "sampler.guidance_scale_2",
    "--boundary 0.9": "both transformers and their boundary are read from the folder or hub name in model.path",
    "--convert_model_dtype": "did you mean --model.dtype bfloat16?",
    "--gpu 0": "set CUDA_VISIBLE_DEVICES in the environment",
    "--gpu_ids 0,1": "set CUDA_VISIBLE_DEVICES in the environment",
    "--vae_path a": "all parts are read from the folder or hub name in model.path",
    "--tile 256": "give decode.mode tiled and the settings decode.* of tiles",
    "--aspect_ratio 16:9": "give video.height and video.width",
    "--negative x": "did you mean --sampler.negative_prompt x?",
    # nothing is better than a wrong one
    "--nonsense 3": "unknown setting nonsense; see --help",
    "--temperature 3": "unknown setting temperature; see --help",
    "--top_k 3": "unknown setting top_k; see --help",
    "-x 3": "unknown setting -x; see --help",
}


@pytest.mark.parametrize("words", GENERATE)
def test_generate(run: Callable[..., Run], words: str) -> None:
    assert GENERATE[words] in run("generate", "--prompt", "x", *words.split(" ", 1)).error


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("plan", "--nproc 8", "did you mean --gpus 8?"),
        ("plan", "--num_gpus 8", "did you mean --gpus 8?"),
        ("plan", "--out a.mp4", "this command does not use it; leave it out"),
        ("batch", "--prompt x", "did you mean prompts?"),
        ("calibrate", "--prompt x", "did you mean prompts?"),
        ("evaluate", "--shard 1/2", "it is an option of batch and compare; this command does not use it"),
        ("plan", "--seeds 0,1", "this command does not use it"),
        ("batch", "--gpus 8", "did you mean --gpus_per_replica 8?"),
        ("batch", "--folder a", "did you mean --out a?"),
        ("batch", "--output_dir a", "did you mean --out a?"),
        ("compare", "--output_dir a", "did you mean --out a?"),
        ("decode", "--output_dir a", "did you mean --output a/video.mp4?"),
        ("decode", "--num_inference_steps 3", "this command does not use it; leave it out"),
    ],
)
def test_the_command_s_own_name_of_it(run: Callable[..., Run], command: str, words: str, said: str) -> None:
    assert said in run(command, *words.split()).error


def test_a_name_stands_in_one_table() -> None:
    tables = (RENAMED, FLAGS, ANSWERS)
    for index, table in enumerate(tables):
        for other in tables[index + 1 :]:
            assert not table.keys() & other.keys()
    assert not [name for name in (*RENAMED, *FLAGS) if converted(name, "1") is not None]


def test_every_answer_names_settings_that_there_are(run: Callable[..., Run]) -> None:
    """`--help_all` of some command has every option that a table leads to."""
    shown = "".join(run(command, "--help_all").out for command in ("generate", "plan", "batch", "decode", "compare"))
    targets = {target for targets in RENAMED.values() for target in targets} | {
        key for flag in FLAGS.values() for key in flag
    }
    assert [target for target in targets - {"folder", "page"} if f"--{target} " not in shown] == []
