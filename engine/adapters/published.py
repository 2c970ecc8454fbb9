"""Published numbers of checkpoints by hub name, and where they were published, of all families."""

from typing import Any

from engine.adapters import ltx_published, wan_published

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = wan_published.PUBLISHED | ltx_published.PUBLISHED
SOURCES: dict[str, str] = {name: file.SOURCE for file in (wan_published, ltx_published) for name in file.PUBLISHED}
