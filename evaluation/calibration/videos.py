"""The videos of the search and of the judgement, with the steps and seeds of each."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.batch.variants import Variant
from engine.config import RunConfig
from evaluation.comparison.store import Comparison, ModelFacts

Part = Literal["search", "judged"]


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """The trials by label, and the steps and seeds of each part; `config` is that of the judgement."""

    folder: Path
    model: ModelFacts
    config: RunConfig
    trials: Mapping[str, Mapping[str, Any]]
    num_steps: Mapping[Part, int]
    seeds: Mapping[Part, Sequence[int]]
    kept_folder: Path | None = None
    """Folder of the kept measures of each part."""

    def compared(self, part: Part, labels: Sequence[str], prompts: list[str]) -> Comparison:
        """The videos of these trials on these prompts."""
        return Comparison(
            folder=self.folder / part,
            model=self.model,
            variants=[self._variant(part, label) for label in labels],
            prompts=prompts,
            seeds=list(self.seeds[part]),
            kept_file=None if self.kept_folder is None else self.kept_folder / f"{part}.jsonl",
        )

    def _variant(self, part: Part, label: str) -> Variant:
        config = self.config
        method = dataclasses.replace(
            config.method, freespec=dataclasses.replace(config.method.freespec, **self.trials[label])
        )
        sampler = dataclasses.replace(config.sampler, num_steps=self.num_steps[part])
        return Variant(label=label, config=dataclasses.replace(config, method=method, sampler=sampler))
