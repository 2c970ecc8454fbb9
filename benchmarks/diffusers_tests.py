"""diffusers' own tests with stock pipelines, and again with a method on every pipeline that they make."""

import argparse
import contextlib
import functools
import hashlib
import os
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from benchmarks.tables import table
from engine import UserError, apply_method
from engine.adapters import ADAPTERS
from engine.hooks.apply import MethodHandle
from engine.hooks.in_force import guard_of
from engine.hooks.self_attention import BranchProcessor
from freespec.methods import METHODS

CLASSES = tuple(kind for adapter in ADAPTERS for kind in adapter.pipeline_classes)
T5 = "hf-internal-testing/tiny-random-t5"


class MethodOnPipelines:
    """Applies a method to pipelines as they are made, and counts what goes through it.

    Attributes:
        method: its name; None for stock pipelines, whose videos are kept alike.
        applied: pipelines that got it.
        refused: reasons why others did not, and how often; their calls are stock.
        calls: finished calls with the method, and `attentions` its self-attentions in all calls.
        videos: digests of the results of all calls, in order.
    """

    def __init__(self, method: str | None, *, window_frames: int = 1) -> None:
        self.method = method
        self.window_frames = window_frames
        self.applied = self.calls = self.attentions = 0
        self.refused: Counter[str] = Counter()
        self.videos: list[str] = []
        self._handles: list[tuple[MethodHandle, list[Any]]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Wrap the constructors and calls of the supported classes until `patch` is undone."""
        for kind in CLASSES:
            patch.setattr(kind, "__init__", self._made(kind, kind.__init__))
            patch.setattr(kind, "__call__", self._called(kind.__call__))
        attend = BranchProcessor.__call__

        def counted(processor: BranchProcessor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.attentions += 1
            return attend(processor, *args, **kwargs)

        patch.setattr(BranchProcessor, "__call__", counted)

    def release(self) -> None:
        """Remove the method from all pipelines."""
        for handle, _ in self._handles:
            handle.remove()
        self._handles.clear()

    def _made(self, kind: type, init: Any) -> Any:
        @functools.wraps(init)
        def made(pipe: Any, *args: Any, **kwargs: Any) -> None:
            init(pipe, *args, **kwargs)
            if type(pipe) is kind and self.method is not None:
                self._apply(pipe, self.method)

        return made

    def _apply(self, pipe: Any, method: str) -> None:
        parts = [part for name in ("transformer", "transformer_2") if (part := getattr(pipe, name, None)) is not None]
        for handle, earlier in self._handles:  # of another pipeline with the same transformer
            if any(part is other for part in parts for other in earlier):
                handle.remove()
        try:
            handle = apply_method(pipe, method=method, window_frames=self.window_frames)
        except UserError as error:
            self.refused[str(error)] += 1
            return
        self.applied += 1
        self._handles.append((handle, parts))

    def _called(self, call: Any) -> Any:
        @functools.wraps(call)
        def called(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            before = self.attentions
            result = call(pipe, *args, **kwargs)
            if guard_of(pipe) is not None:
                assert self.attentions > before, f"no self-attention of the call went through {self.method}"
                self.calls += 1
            self.videos.append(digest(result[0]))
            return result

        return called


def digest(frames: Any) -> str:
    """SHA-256 of frames or latents: a tensor, an array, or lists of pictures."""
    if isinstance(frames, torch.Tensor):
        frames = frames.detach().cpu().float().numpy()
    content = frames.tobytes() if hasattr(frames, "tobytes") else b"".join(digest(part).encode() for part in frames)
    return hashlib.sha256(content).hexdigest()


@dataclass(kw_only=True)
class Results:
    """Of one run, by test.

    Attributes:
        outcomes: passed, failed or skipped.
        videos: digests of its videos.
        counts: pipelines, calls and self-attentions with the method.
        refused: see MethodOnPipelines.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    videos: dict[str, list[str]] = field(default_factory=dict)
    counts: tuple[int, int, int] = (0, 0, 0)
    refused: Mapping[str, int] = field(default_factory=dict)


class Session:
    """pytest hooks of one run, whose videos must equal those of `stock` bit for bit, if given."""

    def __init__(self, pipelines: MethodOnPipelines, stock: Results | None = None) -> None:
        self.pipelines = pipelines
        self.stock = stock
        self.results = Results(refused=pipelines.refused)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """Begin the videos of a test, with those of its fixtures."""
        self.pipelines.videos = self.results.videos[name_of(item)] = []
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Compare the videos of a test that passed with those of the stock pipelines."""
        result = yield
        if self.stock is not None:
            stock, made = self.stock.videos[name_of(item)], self.results.videos[name_of(item)]
            differing = sum(a != b for a, b in zip(stock, made, strict=True))
            assert not differing, f"{differing} of {len(made)} videos differ from those of stock pipelines"
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[Any]:
        """Keep the outcome: of the first phase that did not pass, else of the call."""
        report = yield
        if self.results.outcomes.get(name_of(item), "passed") == "passed":
            self.results.outcomes[name_of(item)] = report.outcome
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        """Let go of the pipelines of a test."""
        self.pipelines.release()
        return (yield)


def name_of(item: pytest.Item) -> str:
    """A test by folder, file, class and name."""
    return "/".join(item.path.parts[-2:]) + "::" + item.nodeid.partition("::")[2]


def run_tests(
    paths: Sequence[str],
    *,
    method: str | None = None,
    window_frames: int = 1,
    stock: Results | None = None,
    own_t5: bool = False,
) -> Results:
    """Run the tests once, with pytest's defaults in place of any project's settings."""
    session = Session(MethodOnPipelines(method, window_frames=window_frames), stock)
    with local_t5() if own_t5 else contextlib.nullcontext(), pytest.MonkeyPatch.context() as patch:
        session.pipelines.install(patch)
        pytest.main(["-q", "-c", os.devnull, "-p", "no:cacheprovider", "--tb=short", *paths], plugins=[session])
    seen = session.pipelines
    session.results.counts = seen.applied, seen.calls, seen.attentions
    return session.results


def in_new_process(run: Callable[..., Results], *args: Any, **kwargs: Any) -> Results:
    """Call it in a process of its own: pytest would take the test modules that a run before it in the same process imported."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, *args, **kwargs).result()


def table_of(stock: Results, made: Results, method: str) -> str:
    """Outcomes by test class; videos are those of tests that pass in both runs, all of them compared."""
    rows: dict[str, Counter[str]] = {}
    for name, outcome in stock.outcomes.items():
        row = rows.setdefault(name.rpartition("::")[0], Counter())
        row[outcome] += 1
        if outcome == made.outcomes.get(name) == "passed":
            row["both"] += 1
            row["videos"] += len(made.videos[name])
    rows["all"] = sum(rows.values(), Counter())
    head = ["tests", "passed stock", f"and with {method}", "failed stock", "skipped", "videos"]
    keys = ("passed", "both", "failed", "skipped", "videos")
    return table(head, [[name, *(str(row[key]) for key in keys)] for name, row in rows.items()])


def save_small_t5(folder: Path) -> None:
    """Write a T5 with random weights and a tokenizer of letters, of the sizes of diffusers' dummy encoder."""
    torch.manual_seed(0)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(x, -3.0) for x in string.ascii_lowercase]
    T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512).save_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "relative_attention_num_buckets": 8}
    T5EncoderModel(T5Config(vocab_size=1103, initializer_factor=0.002, **sizes)).save_pretrained(folder)


@contextlib.contextmanager
def local_t5() -> Iterator[None]:
    """Let `from_pretrained` find diffusers' dummy encoder here, not on the hub."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        save_small_t5(Path(folder))
        for kind in (AutoConfig, AutoTokenizer, T5EncoderModel):

            def load(name: Any, *args: Any, load: Any = kind.from_pretrained, **kwargs: Any) -> Any:
                return load(folder if name == T5 else name, *args, **kwargs)

            patch.setattr(kind, "from_pretrained", load)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests twice; 1 if a test passes with stock pipelines alone, or no call went through the method."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diffusers_tests", description=__doc__)
    parser.add_argument("--method", default="direct", choices=sorted(METHODS), help="only direct has the stock videos")
    parser.add_argument("--window_frames", type=int, default=1, help="latent frames of its local branch")
    parser.add_argument("--local_t5", action="store_true", help=f"make {T5} here with random weights, without the hub")
    parser.add_argument("tests", nargs="+", help="files or folders of tests in a checkout of diffusers")
    args = parser.parse_args(argv)
    stock = in_new_process(run_tests, args.tests, own_t5=args.local_t5)
    method = {"method": args.method, "window_frames": args.window_frames, "stock": stock}
    made = in_new_process(run_tests, args.tests, own_t5=args.local_t5, **method)
    pipelines, calls, attentions = made.counts
    print(f"\n{table_of(stock, made, args.method)}\n")
    print(f"{args.method}: {calls} calls and {attentions} self-attentions of {pipelines} pipelines")
    for reason, count in made.refused.items():
        print(f"{count} pipelines stayed stock: {reason}")
    lost = [name for name, outcome in stock.outcomes.items() if outcome == "passed" != made.outcomes.get(name)]
    for name in lost:
        print(f"passed with stock pipelines alone: {name}")
    return int(bool(lost) or not calls)


if __name__ == "__main__":
    sys.exit(main())
