"""The method of a run as a tree of plain values, for ids: the method in use, and nothing of the others."""

import dataclasses
import json
from typing import Any

from engine.config import MethodConfig


def method_tree(method: MethodConfig) -> dict[str, Any]:
    """A method's name, its settings with their defaults resolved, and what all methods share."""
    made = method.method
    shared = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    settings = dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else {}
    # A class of the user's own may have settings that JSON does not know.
    settings = json.loads(json.dumps(settings, default=repr))
    return {name: value for name, value in shared.items() if not dataclasses.is_dataclass(value)} | {
        "settings": settings
    }
