"""Variants of a batch: methods with their settings."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.config import RunConfig
from engine.errors import UserError, as_user_error
from engine.identity import flat

MAY_DIFFER = ("method.", "sampler.noise", "attention.riflex", "attention.far")
"""Settings in which variants may differ; with all others shared, the model stays loaded and videos are comparable."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method with its settings.

    Attributes:
        label: unique within a batch; names the folder of its videos.
        config: the whole run.
    """

    label: str
    config: RunConfig

    @classmethod
    def of(cls, config: RunConfig, method: str) -> "Variant":
        """The same run with another method, whose name is the label; UserError for an unknown one."""
        with as_user_error():
            return cls(label=method, config=replace(config, method=replace(config.method, name=method)))

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.config.method.name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in which variants may differ, by dotted name."""
        tree = flat(asdict(self.config)) | {"sampler.noise_stride": self.config.noise_stride}
        return {key: value for key, value in tree.items() if key.startswith(MAY_DIFFER)}

    @property
    def acts_by(self) -> tuple[Any, ...]:
        """The settings that the method reads: variants with equal ones make the same videos."""
        config = self.config
        kind, stride = config.noise
        noise = (kind, stride if kind == "freenoise" else None)
        return config.method.method, config.method.window_frames, noise, config.attention.riflex, config.attention.far

    def sharing(self, config: RunConfig) -> "Variant":
        """The same variant with model, ranks and output of another configuration."""
        return replace(
            self, config=replace(self.config, model=config.model, parallel=config.parallel, output=config.output)
        )


def check_variants(variants: Sequence[Variant]) -> None:
    """Raise UserError for two variants with one label, or with equal settings that their methods read."""
    for index, variant in enumerate(variants):
        for other in variants[:index]:
            if other.label.lower() == variant.label.lower():
                raise UserError(
                    f"two variants have the label {variant.label}; name one with --methods NAME=METHOD or NAME=METHOD:PRESET.yaml"
                )
            if other.acts_by == variant.acts_by:
                raise UserError(
                    f"{other.label} and {variant.label} have the same settings, as far as their method reads them; leave one out"
                )
