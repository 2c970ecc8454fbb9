"""Options of other programs and their equivalents: Wan's generate.py, LTX-Video's inference.py, diffusers, xDiT, FastVideo, SGLang.

Names have underscores; those that only lack our group (`--seed`, `--height`) are not listed.
"""

import re
from collections.abc import Callable

_FILE = ("out", "page", "output.path", "output")
_RANKS = ("gpus_per_replica", "nproc", "gpus")
_MODEL = ("model.path",)
# Settings with another meaning in a command that has the second too: evaluate.py's `gpus` are device indices, not a count.
MEANS_OTHERWISE = {"gpus": "vbench"}

# Settings with the same meaning and value; a command has at most one of them.
RENAMED: dict[str, tuple[str, ...]] = {
    name: targets
    for names, targets in {
        "frame_num frames n_frames num_frame nframes video_length length infer_frames num_video_frames": (
            "video.num_frames",
        ),
        "frame_rate framerate save_fps output_fps": ("video.fps",),
        "sample_steps num_inference_steps infer_steps inference_steps denoising_steps num_sampling_steps steps": (
            "sampler.num_steps",
        ),
        "sample_guide_scale guide_scale cfg_scale guidance text_guidance_scale": ("sampler.guidance_scale",),
        "guidance_scale_2 sample_guide_scale_2": ("sampler.guidance_scale_2",),
        "sample_shift shift time_shift timestep_shift": ("sampler.flow_shift",),
        "base_seed random_seed manual_seed generator_seed": ("sampler.seed",),
        "neg_prompt n_prompt uncond_prompt sample_neg_prompt negative neg": ("sampler.negative_prompt",),
        "max_sequence_length text_len max_length": ("sampler.max_text_tokens",),
        "ckpt_dir model_path pretrained_model_name_or_path pretrained_model model_id model_dir model_name checkpoint_dir "
        "checkpoint ckpt model_base repo_id": _MODEL,
        "text text_prompt caption": ("prompt",),
        "prompt_path prompt_list prompts_file prompt_txt txt_file input_file prompt_file suite": ("prompts",),
        "save_file save_path save_result_path output_path output_file output_file_name output_dir outfile out_file out_dir "
        "out o folder save_dir result_path video_path": _FILE,
        "gpus num_gpus n_gpus ngpus num_gpu gpu_num nproc nproc_per_node num_processes world_size gpu_count": _RANKS,
        "ulysses_size ulysses_degree sp_ulysses_degree parallel.tp": ("parallel.ulysses",),
        "ring_size ring_degree sp_ring_degree": ("parallel.ring",),
        "sp_size sp_degree sequence_parallel_degree sequence_parallel_size context_parallel_size cp_size": (
            "parallel.ulysses",
        ),
        "cfg_degree cfg_size cfg_parallel_size": ("parallel.cfg",),
        "decode_timestep": ("decode.timestep",),
        "decode_noise_scale": ("decode.noise_scale",),
        "attention_backend attn_backend attention_type attn_mode": ("attention.kernel",),
        "window_size window context_length context_frames native_length": ("method.window_frames",),
        "ray_address cluster": ("ray",),
        "model.offload model.cpu_offload": ("model.weights",),
        "quantization quantize quant quant_type": ("model.storage",),
        "gguf gguf_path gguf_file": ("model.single_file",),
        "parallel.degrees degrees": ("parallel.plan",),
        "methods": ("methods", "method.name"),
        "model_dtype weight_dtype": ("model.dtype",),
        "safetensors checkpoint_file": ("model.single_file",),
    }.items()
    for name in names.split()
}

# Switches, and the equivalent settings.
FLAGS: dict[str, dict[str, str]] = {
    name: settings
    for names, settings in {
        "offload_model offload_to_cpu cpu_offload enable_model_cpu_offload enable_sequential_cpu_offload low_vram use_cpu_offload "
        "dit_cpu_offload offload": {"model.weights": "cpu_offload"},
        "block_offload enable_group_offload group_offload blocks_to_swap block_swap layerwise_offload dit_layerwise_offload": {
            "model.weights": "block_offload"
        },
        "fp8 use_fp8 enable_layerwise_casting layerwise_casting": {"model.storage": "fp8"},
        "int8 load_in_8bit": {"model.storage": "torchao_int8"},
        "dit_fsdp t5_fsdp use_fsdp_inference use_fsdp fsdp zero3": {"model.weights": "zero3"},
        "t5_cpu text_encoder_cpu_offload text_encoder_cpu": {"parallel.text_device": "cpu"},
        "use_torch_compile enable_torch_compile torch_compile use_compile compile_model": {"model.compile": "true"},
        "use_parallel_vae enable_vae_tiling enable_tiling vae_tiling vae_tiled": {"decode.mode": "tiled"},
        "use_cfg_parallel enable_cfg_parallel cfg_parallel": {"parallel.cfg": "2"},
        "cpu no_cuda force_cpu": {"model.device": "cpu"},
        "cuda use_cuda use_gpu": {"model.device": "cuda"},
        "bfloat16 bf16 use_bf16 convert_model_dtype": {"model.dtype": "bfloat16"},
        "fp16 half float16": {"model.dtype": "float16"},
        "fp32 float32": {"model.dtype": "float32"},
        "force yes y overwrite_output": {"output.overwrite": "true"},
        "quiet q silent disable_progress_bar no_progress": {"output.progress": "off"},
        "local_files_only offline_mode": {"model.offline": "true"},
    }.items()
    for name in names.split()
}

_GIVEN = "see docs/given-frames.md"
_OWN_PIPELINE = "load it into a diffusers pipeline of your own, and add the method with apply_method (README.md)"
_RANKS_SHARE = "ranks share a video by Ulysses and ring attention, see docs/parallel.md"

# Options that are not supported, or are set in another way.
ANSWERS: dict[str, str] = {
    name: reason
    for names, reason in {
        "lora loras lora_path lora_paths lora_dir lora_weights lora_scale lora_alpha lora_nickname use_relighting_lora": (
            "--model.loras '[FILE@SCALE, ...]' adds LoRAs to the weights; see docs/models.md"
        ),
        "dit_high_noise high_noise_diffusion_model high_noise_model low_noise_model high_noise_model_path low_noise_model_path": (
            "--model.single_file '[high:FILE, low:FILE]' replaces the two transformers; see docs/models.md"
        ),
        "image images image_path img first_frame last_frame input_image input_image_path init_image start_image end_image "
        "image_or_video_path i2v conditioning_media_paths conditioning_start_frames input_media_path": (
            f"generate.py --given WHERE=FILE shows a picture at a moment of the video, such as first=FILE; {_GIVEN}"
        ),
        "conditioning_strengths image_cond_noise_scale src_ref_images ref_image reference_image": (
            f"not supported: a picture can only be shown unchanged, with generate.py --given WHERE=FILE; {_GIVEN}"
        ),
        "video_input input_video input_video_path": (
            f"generate.py --extend FILE continues a video; videos are not converted; {_GIVEN}"
        ),
        "src_video src_mask src_root_path video2video v2v strength denoise_strength pose_video control_video refert_num "
        "replace_flag": f"not supported: a video can only be continued, with generate.py --extend FILE; {_GIVEN}",
        "audio audio_path enable_tts tts_prompt_audio tts_prompt_text tts_text num_clip start_from_ref": (
            "not supported: videos are made without audio"
        ),
        "use_prompt_extend prompt_extend_method prompt_extend_model prompt_extend_target_lang prompt_enhancer rewrite_prompt "
        "enhance_prompt use_prompt_enhancer": "not supported: prompts are used as given; write the longer prompt into --prompt",
        "use_teacache enable_teacache teacache teacache_thresh use_fbcache fbcache use_cache cache_dit first_block_cache": (
            "--sampler.cache first_block, mag or taylorseer skips what changes little between steps; see docs/caches.md"
        ),
        "nf4 load_in_4bit use_fp8_t5_encoder": (
            f"not supported: --model.storage stores a transformer in 8 bits, and --model.single_file takes a .gguf file; {_OWN_PIPELINE}"
        ),
        "sample_solver scheduler scheduler_type solver sampler_name sample_method": (
            "--sampler.scheduler is checkpoint, euler, unipc or lcm; see docs/models.md"
        ),
        "timesteps sigmas denoising_step_list dmd_denoising_steps": (
            "--sampler.timesteps or --sampler.sigmas names the steps one by one, after any shift; see docs/models.md"
        ),
        "stg_scale stg_rescale stg_mode stg_skip_layers guidance_rescale embedded_cfg_scale embedded_guidance_scale cfg_trunc": (
            "not supported: guidance is classifier-free, with sampler.guidance_scale"
        ),
        "pipefusion_parallel_degree num_pipeline_patch attn_layer_num_for_pp pp_size": f"not supported: {_RANKS_SHARE}",
        "tensor_parallel_degree tp_size tp_degree tp tensor_parallel_size": (
            "not supported: ranks share a video; model.weights zero3 shards the weights (docs/memory.md)"
        ),
        "data_parallel_degree dp_size dp_degree data_parallel_size dp": "batch.py --replicas makes several videos at once",
        "nnodes node_rank master_addr master_port rdzv_backend rdzv_endpoint rdzv_id rank local_rank standalone": (
            "it is an option of torchrun; give it before the script (README.md)"
        ),
        "num_videos num_videos_per_prompt num_samples n_samples num_images_per_prompt batch_size": (
            "a prompt makes one video; batch.py --seeds 0,1 makes one for each seed"
        ),
        "enable_slicing enable_vae_slicing vae_slicing enable_xformers pin_cpu_memory trust_remote_code warmup_steps": (
            "it is not needed; leave it out"
        ),
        "resume resume_from resume_from_checkpoint continue": "the same command continues by itself, leave it out",
        "task": (
            "give the preset of the task, such as --config wan2.1-i2v-14b-480p or wan2.1-i2v-14b-720p (docs/models.md); editing and "
            "control of videos are not supported"
        ),
        "gpu gpu_id gpu_ids device_id device_ids cuda_device cuda_visible_devices visible_devices": (
            "set CUDA_VISIBLE_DEVICES in the environment to choose GPUs, and give --nproc for how many"
        ),
        "boundary boundary_ratio low_noise_checkpoint high_noise_checkpoint": (
            "both transformers and their boundary are read from the folder or hub name in model.path, see docs/models.md"
        ),
        "vae_path vae text_encoder_path text_encoder t5_path t5_checkpoint clip_path tokenizer_path transformer_path vae_checkpoint "
        "dit_path unet_path": "all parts are read from the folder or hub name in model.path, see docs/models.md",
        "tile tile_size vae_tile_size tile_sample_min_size tile_overlap overlap vae_tile_overlap": (
            "give decode.mode tiled and the settings decode.* of tiles, see --help_all"
        ),
        "aspect_ratio ratio": "give video.height and video.width",
        "total total_score": "VBench's total is of sixteen dimensions, of which evaluate.py scores six; see docs/vbench.md",
        "token hf_token use_auth_token": "set HF_TOKEN in the environment",
        "cache_dir hf_home hf_cache": "set HF_HOME in the environment",
        "output_type save_type format": "the suffix of output.path selects the format",
        "cfg": "give sampler.guidance_scale for classifier-free guidance, or parallel.cfg for its two passes on two groups of ranks",
        "model_cls pipeline_config config_json model_type": (
            "give a preset of the model instead, such as --config wan2.1-t2v-1.3b"
        ),
    }.items()
    for name in names.split()
}

_SIZES = {"480p": ("832", "480"), "720p": ("1280", "720")}
_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float": "float32",
    "float32": "float32",
}
_TASKS = {
    "t2v-1.3b": "wan2.1-t2v-1.3b",
    "t2v-14b": "wan2.1-t2v-14b",
    "t2v-a14b": "wan2.2-t2v-a14b",
    "ti2v-5b": "wan2.2-ti2v-5b",
    "i2v-a14b": "wan2.2-i2v-a14b",
    "flf2v-14b": "wan2.1-flf2v-14b-720p",
}


def converted(name: str, value: str | None) -> dict[str, str] | None:
    """Convert an option whose value has another form here to settings; "" for unknown values, None for other options."""
    convert = _CONVERTED.get(name)
    return None if convert is None else convert(value or "")


def as_video(name: str, value: str) -> str:
    """Convert the output file or folder of another program to a video file."""
    if name.endswith("_dir") or value.endswith("/"):
        return f"{value.rstrip('/')}/video.mp4"
    return value if "." in value.rpartition("/")[2] else f"{value}.mp4"


def _size(value: str) -> dict[str, str]:
    found = re.fullmatch(r"(\d+)\s*[*xX×]\s*(\d+)", value)
    width, height = found.groups() if found else _SIZES.get(value.lower(), ("", ""))
    return {"video.width": width, "video.height": height}


def _dtype(value: str) -> dict[str, str]:
    return {"model.dtype": _DTYPES.get(value.lower().removeprefix("torch."), "")}


def _task(value: str) -> dict[str, str] | None:
    preset = _TASKS.get(value.lower())
    return None if preset is None else {"config": preset}


def _checkpoint_file(value: str) -> dict[str, str]:
    return {"model.single_file" if value.endswith(".safetensors") else "model.path": value}


def _prompt(value: str) -> dict[str, str]:
    """Commands without `--prompt` read prompts from a file."""
    return {"prompts": ""}


def _duration(value: str) -> dict[str, str]:
    return {"video.num_frames": ""}


_CONVERTED: dict[str, Callable[[str], dict[str, str] | None]] = {
    "size": _size,
    "resolution": _size,
    "image_size": _size,
    "video_size": _size,
    "torch_dtype": _dtype,
    "precision": _dtype,
    "dit_precision": _dtype,
    "task": _task,
    "ckpt_path": _checkpoint_file,
    "checkpoint_path": _checkpoint_file,
    "prompt": _prompt,
    "duration": _duration,
    "seconds": _duration,
}
