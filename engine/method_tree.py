"""The method of a run as plain values, for ids: only the method in use."""

import dataclasses
import json
from typing import Any

from engine.config import MethodConfig


def method_tree(method: MethodConfig) -> dict[str, Any]:
    """The method's name, its settings with defaults resolved, and what all methods share."""
    made = method.method
    shared = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    settings = dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else {}
    # A user's own class may have settings of types that JSON lacks.
    settings = json.loads(json.dumps(settings, default=repr))
    return {name: value for name, value in shared.items() if not dataclasses.is_dataclass(value)} | {
        "settings": settings
    }
