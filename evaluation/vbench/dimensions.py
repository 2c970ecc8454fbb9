"""The six dimensions of VBench that the paper's tables have."""

from engine.errors import UserError

CONSISTENCY = ("subject_consistency", "background_consistency")
DIMENSIONS = (*CONSISTENCY, "motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality")
# Rows of imaging_quality are on the scale 0..100, its headline on 0..1.
ROW_SCALE = dict.fromkeys(DIMENSIONS, 1.0) | {"imaging_quality": 0.01}


def parse_dimensions(text: str) -> tuple[str, ...]:
    """Dimensions of a comma-separated list, in the order of `DIMENSIONS`; UserError for others and for none."""
    given = [word.strip() for word in text.split(",") if word.strip()]
    unknown = next((word for word in given if word not in DIMENSIONS), None)
    if unknown is not None or not given:
        raise UserError(f"--dimensions must be of {','.join(DIMENSIONS)}, got {unknown or 'none'!r}")
    return tuple(dimension for dimension in DIMENSIONS if dimension in given)
