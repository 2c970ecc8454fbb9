"""The dimensions of VBench: the six of the paper's tables, and the sixteen that a total needs."""

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
# Rows of imaging_quality are on the scale 0..100, its headline on 0..1.
ROW_SCALE = dict.fromkeys(DIMENSIONS, 1.0) | {"imaging_quality": 0.01}


def check_total(dimensions: Iterable[str]) -> None:
    """Raise UserError unless all sixteen dimensions of VBench's weighted total are given.

    VBench's own script takes a missing dimension for 0 and normalises it to a negative number, so that its total of six
    dimensions is meaningless.
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
