"""Runs inside the user's VBench environment, by path: checks it, cuts videos into clips, or scores one dimension.

It stands alone: Python 3.10, the standard library, and what that environment has. Nothing of this project is
imported, and this folder is taken off the module path, where its names would hide others.
"""

import argparse
import ctypes
import importlib
import json
import os
import signal
import sys
from importlib import metadata
from pathlib import Path

_PACKAGES = ("vbench", "torch", "torchvision", "transformers", "timm", "pyiqa", "dreamsim", "decord", "av", "numpy")


def main() -> None:
    """`probe`, `split` or `score`; see the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("probe", "split", "score"))
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--out", required=True, help="probe: the JSON file; score: the folder of the results")
    parser.add_argument("--parent", type=int, required=True, help="process that this one ends with")
    parser.add_argument("--videos", help="the view")
    parser.add_argument("--dimension", nargs="+", default=[])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    end_with(arguments.parent)
    sys.path[0] = arguments.checkout
    if arguments.verb == "probe":
        probe(Path(arguments.out), arguments.dimension)
    else:
        run(arguments)


def end_with(parent: int) -> None:
    """Ask the kernel to end this process if its parent dies."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the kernel was asked
        sys.exit("the process that started this one is gone")


def probe(out: Path, dimensions: list) -> None:
    """Write versions, and whether everything that the dimensions need can be imported."""
    found = {"python": list(sys.version_info[:3]), "versions": {}, "error": None, "cuda": None}
    try:
        for package in _PACKAGES:
            try:
                found["versions"][package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                found["versions"][package] = None
        long = importlib.import_module("vbench2_beta_long")
        found["vbench2_beta_long"] = str(Path(long.__file__).resolve().parent)
        for dimension in dimensions:
            importlib.import_module("vbench2_beta_long." + dimension)
        torch = importlib.import_module("torch")
        found["cuda"] = torch.cuda.is_available()
    except Exception as error:  # noqa: BLE001  whatever a foreign environment raises is what is reported
        found["error"] = f"{type(error).__name__}: {error}"
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(out)


def run(arguments: argparse.Namespace) -> None:
    """Cut all videos of a view into clips, or score one dimension on the clips that are there."""
    torch, long = (importlib.import_module(name) for name in ("torch", "vbench2_beta_long"))
    package = Path(arguments.checkout) / "vbench2_beta_long"
    settings = {
        "category": None,
        "sb_clip2clip_feat_extractor": "dinov2",
        "bg_clip2clip_feat_extractor": "dreamsim",
        "imaging_quality_preprocessing_mode": "longer",
        "clip_length_config": "clip_length_mix.yaml",
        "w_inclip": 1.0,
        "w_clip2clip": 0.0,
        "use_semantic_splitting": False,
        "slow_fast_eval_config": str(package / "configs" / "slow_fast_params.yaml"),
        # Without it, the part that compares clips with each other is left out without a word.
        "dev_flag": True,
        "sb_mapping_file_path": str(package / "configs" / "subject_mapping_table.yaml"),
        "bg_mapping_file_path": str(package / "configs" / "background_mapping_table.yaml"),
        "num_of_samples_per_prompt": 5,
        "static_filter_flag": False,
    }
    mode = "long_custom_input"
    bench = long.VBenchLong(torch.device(arguments.device), str(package / "VBench_full_info.json"), arguments.out)
    if arguments.verb == "split":
        bench.preprocess(arguments.videos, mode, preprocess_dimension_flag=arguments.dimension, **settings)
        return
    (name,) = arguments.dimension
    bench.evaluate(
        arguments.videos, name, [], dimension_list=[name], local=True, read_frame=False, mode=mode, **settings
    )


if __name__ == "__main__":
    main()
