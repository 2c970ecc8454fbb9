"""Every cell of the table in docs/models.md has its tests, one of them of what the cell says is refused."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS = ("Wan2.1", "Wan2.2 A14B", "Wan2.2 5B", "Wan I2V, FLF2V", "LTX-Video")
RANKS = "test_any_arrangement_of_ranks_makes_the_same_video"
METHODS = "test_methods_on_ranks::test_two_ranks_make_the_video_of_one"
STOCK = "test_the_engine_has_the_bits_of_the_stock_pipeline"
KNOWN = "given/test_given::test_known_frames_keep_their_value_and_the_others_go_with_them"  # of pictures and of a video

SHARDED = "load/test_sharded_weights::test_two_ranks_make_the_video_of_whole_weights_with_half_of_them"
ONE_OF_TWO = "test_two_experts::test_settings_for_the_other_number_of_transformers"
GGUF = "load/test_quantised::test_a_gguf_file_is_the_video_of_its_values"
FP8 = "load/test_quantised::test_fp8_is_the_video_of_rounded_weights"
PEAKS, WEIGHTS = (
    f"test_planner_given::test_{what}_of_the_other_models_of_wan_are_within_15_percent" for what in ("peaks", "weights")
)
PUBLISHED = "load/test_single_file::test_files_of_the_real_sizes_fit_the_published_configurations"
SINGLE = "load/test_single_file::test_every_tensor_is_that_of_the_folder"
COMPILED = "test_compiled::test_no_block_writes_windows_out"  # of Wan and LTX-Video, by every method but one

# By row, in the order of the columns: a test in tests/engine/, or several.
TESTS: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "`direct` and native length": (
        "hooks/test_apply::test_direct_is_the_stock_pipeline_bit_for_bit",
        f"test_two_experts::{STOCK}",
        f"test_token_timesteps::{STOCK}",
        f"test_pictures::{STOCK}",
        "test_ltx::test_direct_is_the_stock_pipeline_bit_for_bit",
    ),
    "every method on 2 ranks, FreeSpec on 3": (
        f"test_ranks::{RANKS}",
        *((METHODS, f"{file}::{RANKS}") for file in ("test_two_experts", "test_token_timesteps", "test_pictures")),
        (METHODS, f"test_ltx_ranks::{RANKS}"),
    ),
    "timelines, `--given`": (
        (KNOWN, f"test_ranks::{RANKS}"),
        "test_two_experts::test_the_public_command_with_a_given_picture_and_a_timeline",
        "test_token_timesteps::test_the_public_command_with_a_given_picture_and_a_timeline",
        "test_pictures::test_the_public_command_with_a_timeline_and_its_record",
        (f"test_ltx_pictures::{STOCK}", f"test_ltx_ranks::{RANKS}"),
    ),
    "`--extend`": (
        KNOWN,
        "test_two_experts::test_a_video_is_continued",
        "test_token_timesteps::test_a_video_is_continued_with_the_rule_of_the_first_frame",
        "test_pictures::test_commands_without_pictures_say_so_before_anything_is_loaded",
        "test_ltx_pictures::test_a_video_is_continued_as_the_stock_pipeline_does",
    ),
    "LoRAs": (
        "load/test_loras::test_weights_are_changed_by_the_rule",
        "test_two_experts::test_a_lora_changes_its_own_transformer",
        "test_token_timesteps::test_a_lora_changes_the_video_by_its_rule",
        "test_pictures::test_a_lora_changes_the_projections_of_pictures_too",
        "load/test_loras::test_weights_are_changed_by_the_rule",
    ),
    "resume within a video": (
        "denoise/test_denoise::test_a_resumed_run_is_bit_equal",
        "test_two_experts::test_a_run_that_was_stopped_continues_across_the_switch",
        "test_token_timesteps::test_pictures_elsewhere_stay_known_and_the_id_says_which_are_conditions",
        "test_pictures::test_a_run_that_was_stopped_continues",
        "test_ltx_pictures::test_a_run_that_was_stopped_continues",
    ),
    "`model.weights zero3`": (
        (SHARDED, "test_compiled::test_a_kind_of_step_is_compiled_once"),
        (f"test_two_experts::{RANKS}", "test_compiled::test_two_transformers_share_their_graphs"),
        (f"test_token_timesteps::{RANKS}", "test_compiled::test_videos_of_pictures"),
        (f"test_pictures::{RANKS}", "test_compiled::test_videos_of_pictures"),
        (SHARDED, COMPILED),
    ),
    "memory": (
        "test_planner::test_peak_of_a_forward_is_within_15_percent_of_what_the_allocator_gave_out",
        *((PEAKS, WEIGHTS),) * 3,
        (
            "test_planner_ltx::test_peak_of_a_forward_is_within_15_percent_of_what_the_allocator_gave_out",
            "test_planner_given::test_peak_of_a_forward_with_pictures_is_within_15_percent_of_what_the_allocator_gave_out",
        ),
    ),
    "operations of a forward": (
        "test_planner::test_flops_of_the_stock_model_are_exactly_what_torch_counts",
        "test_two_experts::test_operations_are_those_of_one_transformer",
        "test_token_timesteps::test_operations_are_exactly_what_torch_counts",
        "test_pictures::test_operations_are_exactly_what_torch_counts",
        "test_planner_ltx::test_flops_of_the_stock_model_are_exactly_what_torch_counts",
    ),
    "`model.single_file`": (
        (SINGLE, PUBLISHED),
        ("load/test_two_files::test_two_files_are_the_video_of_the_folder", ONE_OF_TWO, PUBLISHED),
        (SINGLE, PUBLISHED),
        (SINGLE, "load/test_two_files::test_every_tensor_is_that_of_the_folder", PUBLISHED),
        (SINGLE, PUBLISHED),
    ),
    "`model.storage`, GGUF": (
        (GGUF, FP8, "load/test_quantised::test_torchao_is_what_diffusers_loads_and_the_video_of_its_values"),
        (GGUF, FP8, "load/test_quantised::test_torchao_is_the_video_of_its_values"),
        (GGUF, FP8, "load/test_quantised::test_torchao_is_the_video_of_its_values"),
        (
            "load/test_quantised::test_torchao_of_models_of_pictures",
            "load/test_quantised::test_gguf_files_of_models_of_pictures",
            "load/test_block_offload::test_videos_of_pictures",  # in fp8
        ),
        (GGUF, FP8, "load/test_quantised::test_torchao_is_what_diffusers_loads_and_the_video_of_its_values"),
    ),
    "`model.weights block_offload`": (
        "load/test_block_offload::test_the_video_of_resident_weights_in_every_layout",
        "load/test_block_offload::test_the_video_of_resident_weights_in_every_layout",
        "load/test_block_offload::test_the_video_of_resident_weights_in_every_layout",
        "load/test_block_offload::test_videos_of_pictures",
        "load/test_block_offload::test_the_video_of_resident_weights_in_every_layout",
    ),
    "`sampler.cache`": (
        "hooks/test_step_cache::test_any_arrangement_of_ranks_decides_alike_and_makes_the_same_video",
        "hooks/test_step_cache::test_each_of_two_transformers_has_its_own_steps",
        "hooks/test_step_cache::test_videos_of_pictures_are_those_of_the_stock_pipeline_with_the_same_cache",
        "hooks/test_step_cache::test_videos_of_pictures_are_those_of_the_stock_pipeline_with_the_same_cache",
        "hooks/test_step_cache::test_any_arrangement_of_ranks_decides_alike_and_makes_the_same_video",
    ),
}


def rows() -> dict[str, list[str]]:
    """The table's cells by its first column."""
    page = (ROOT / "docs/models.md").read_text().partition("## What works")[2].partition("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines() if line.startswith("|")
    ]
    assert lines[0] == ["", *COLUMNS] or tuple(lines[0][-5:]) == COLUMNS
    return {line[0]: line[1:] for line in lines[2:]}


def source_of(test: str) -> str:
    """The source of a test, from its name on; empty if it is not in its file."""
    file, _, name = test.partition("::")
    path = ROOT / "tests/engine" / f"{file}.py"
    found = path.is_file() and re.search(rf"^def {name}\(.*?(?=^\S|\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


def test_every_cell_has_its_tests() -> None:
    found = rows()
    by_row = {start: [name for name in found if name.startswith(start)] for start in TESTS}
    assert sorted(name for names in by_row.values() for name in names) == sorted(found)  # each row once
    for start, tests in TESTS.items():
        for column, cell, each in zip(COLUMNS, found[by_row[start][0]], tests, strict=True):
            sources = [source_of(test) for test in ((each,) if isinstance(each, str) else each)]
            assert all(sources), (start, column, each)
            assert any(map(refuses, sources)) or not says_no(cell), (start, column, cell)


def says_no(cell: str) -> bool:
    """Whether a cell names something that is refused."""
    return re.search(r"\b(refused|but|no|untested)\b", cell) is not None


def refuses(source: str) -> bool:
    """Whether a test ends in the one line of a UserError; `refused` and its kin check that it is one."""
    return "refused(" in source or "raises(UserError" in source


def test_what_is_not_there_would_be_found() -> None:
    assert not source_of("test_ranks::test_of_nothing")
    assert not source_of("test_nowhere::test_of_nothing")
    assert not refuses(source_of(GGUF))
    assert says_no("fp8; GGUF but A14B")
    assert not says_no("yes, `first` as trained")
