"""The dimensions of VBench: the six of the paper's tables, the sixteen of a total, and why there is none of six."""

from collections.abc import Iterable

from engine.errors import UserError

CONSISTENCY = ("subject_consistency", "background_consistency")
DIMENSIONS = (*CONSISTENCY, "motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality")
ALL_DIMENSIONS = (
    *DIMENSIONS,
    "temporal_flickering",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
# imaging_quality is the one dimension whose rows are on another scale, 0..100, than its headline.
ROW_SCALE = dict.fromkeys(DIMENSIONS, 1.0) | {"imaging_quality": 0.01}


def check_total(dimensions: Iterable[str]) -> None:
    """Raise UserError unless all sixteen dimensions are there, which VBench's total is a weighted sum of.

    VBench's own script takes a missing dimension for 0 and normalises it to a negative number: its total of six
    dimensions looks like a score and is none.
    """
    given = set(dimensions)
    missing = [dimension for dimension in ALL_DIMENSIONS if dimension not in given]
    if missing:
        raise UserError(
            f"a VBench total needs {len(ALL_DIMENSIONS)} dimensions and {len(ALL_DIMENSIONS) - len(missing)} "
            "were evaluated; "
            f"missing: {', '.join(missing)}"
        )


def parse_dimensions(text: str) -> tuple[str, ...]:
    """Dimensions of a comma-separated list, in the order of `DIMENSIONS`; UserError for others and for none."""
    given = [word.strip() for word in text.split(",") if word.strip()]
    unknown = next((word for word in given if word not in DIMENSIONS), None)
    if unknown is not None or not given:
        raise UserError(f"--dimensions must be of {','.join(DIMENSIONS)}, got {unknown or 'none'!r}")
    return tuple(dimension for dimension in DIMENSIONS if dimension in given)
