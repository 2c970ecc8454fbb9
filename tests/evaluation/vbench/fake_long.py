"""What tests/evaluation/vbench/fake_vbench.py puts into a checkout as `vbench2_beta_long`: it stands alone, in another interpreter.

What goes wrong is said in `plan.json` of its home: a dimension, or `split`, to one of the words of `misbehave` and `evaluate`.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import zlib
from pathlib import Path
from typing import Any

HOME = Path(os.environ["HOME"])
NEEDED = {
    "sb_clip2clip_feat_extractor",
    "bg_clip2clip_feat_extractor",
    "imaging_quality_preprocessing_mode",
    "clip_length_config",
    "w_inclip",
    "w_clip2clip",
    "use_semantic_splitting",
    "slow_fast_eval_config",
    "dev_flag",
    "sb_mapping_file_path",
    "bg_mapping_file_path",
    "num_of_samples_per_prompt",
    "static_filter_flag",
}


def plan() -> dict[str, Any]:
    """What shall go wrong."""
    path = HOME / "plan.json"
    return json.loads(path.read_text()) if path.exists() else {}


def misbehave(what: str) -> str | None:
    """Do what is planned for a dimension or the cutting, or return the word for later."""
    how = plan().get(what)
    if how == "fail":
        sys.stdout.write("CUDA out of memory\n")
        sys.exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "silent":
        sys.exit(0)
    if how == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (HOME / "pids.part").write_text(f"{os.getpid()} {child.pid}")
        (HOME / "pids.part").rename(HOME / "pids")
        time.sleep(600)
    if how == "download":
        urllib.request.urlopen("http://example.com/weights.pth", timeout=20)
    return how


def number(*words: str) -> float:
    """A score that the words decide, 0.5..0.9."""
    return 0.5 + (zlib.crc32("/".join(words).encode()) % 1000) / 2500


class VBenchLong:
    """The public class, as far as its contract with a caller goes."""

    def __init__(self, device: Any, full_info_dir: str, output_path: str) -> None:
        assert Path(full_info_dir).is_file()
        self.device, self.output_path = device, output_path

    def preprocess(self, videos_path: str, mode: str, **kwargs: Any) -> None:
        """Cut into clips, unless that was begun before: what is there is trusted."""
        assert mode == "long_custom_input", mode
        assert kwargs.keys() >= NEEDED, NEEDED - kwargs.keys()
        assert kwargs["preprocess_dimension_flag"]
        base = Path(videos_path)
        if (base / "split_clip").exists():
            return
        for number_of_video, video in enumerate(sorted(base.glob("*.mp4"))):
            if number_of_video == 1:  # when it ends in the middle, something is there
                misbehave("split")
            folder = base / "split_clip" / video.stem
            folder.mkdir(parents=True)
            for clip in range(plan().get("clips", 3)):
                (folder / f"{video.stem}_{clip:03d}.mp4").write_bytes(video.read_bytes())

    def evaluate(
        self,
        videos_path: str,
        name: str,
        prompt_list: list,
        *,
        dimension_list: list[str],
        local: bool,
        read_frame: bool,
        mode: str,
        **kwargs: Any,
    ) -> None:
        """Score one dimension and write the file that upstream would."""
        assert prompt_list == []
        (dimension,) = dimension_list
        call = {
            "dimension": dimension,
            "argv": sys.argv,
            "path": sys.path,
            "environment": dict(os.environ),
            "parent": os.getppid(),
            "device": self.device.name,
            "local": local,
            "read_frame": read_frame,
            "name": name,
            "dev_flag": kwargs["dev_flag"],
        }
        with (HOME / "calls.jsonl").open("a") as file:
            file.write(json.dumps(call) + "\n")
        self.preprocess(videos_path, mode, preprocess_dimension_flag=dimension_list, **kwargs)
        how = misbehave(dimension)
        base = Path(videos_path)
        # In the order of the directory, as upstream.
        clips = [clip for folder in (base / "split_clip").iterdir() for clip in folder.iterdir()]
        value = self.score(base, dimension, clips[:-1] if how == "drop_clip" else clips)
        if how == "nan":
            value[1][0]["video_results"] = float("nan")
        if how == "foreign":
            value[1][0]["video_path"] = str(base / "split_clip" / "other-0" / "other-0_000.mp4")
        text = json.dumps({dimension: value})
        path = Path(self.output_path) / f"{name}_eval_results.json"
        path.write_text(text[: len(text) // 2] if how == "cut" else text)

    def score(self, base: Path, dimension: str, clips: list[Path]) -> list:
        """Headline and rows, in upstream's shapes."""
        rows = [
            {"video_path": str(clip), "video_results": number(dimension, clip.stem, clip.read_bytes().hex()[-64:])}
            for clip in clips
        ]
        if dimension == "dynamic_degree":
            rows = [{**row, "video_results": row["video_results"] > 0.7} for row in rows]
        if dimension == "imaging_quality":
            rows = [{**row, "video_results": row["video_results"] * 100} for row in rows]
        # Upstream means to group by video here and does not.
        regrouped = [
            {"video_path": f"{clip}/{clip.name.split('_')[0]}.mp4", "video_results": float(row["video_results"])}
            for clip, row in zip(clips, rows, strict=True)
        ]
        if dimension.endswith("consistency"):
            return self.fuse(base, dimension, regrouped)
        mean = sum(row["video_results"] for row in regrouped) / len(rows)
        return [mean / 100 if dimension == "imaging_quality" else mean, rows, regrouped]

    def fuse(self, base: Path, dimension: str, rows: list[dict[str, Any]]) -> list:
        """Scores within clips and between their first frames; first frames that lie there are trusted."""
        frames = base / f"{dimension}_cat_firstframes_videos"
        if not frames.exists():
            frames.mkdir()
            for folder in (base / "split_clip").iterdir():
                if len(list(folder.iterdir())) > 1:
                    (frames / f"{folder.name}.mp4").write_bytes(b"")
            if plan().get(dimension) == "kill_after_frames":
                os.kill(os.getpid(), signal.SIGKILL)
        fused = [self.fuse_one(frames, row) for row in rows]
        return [sum(row["video_results"] for row in fused) / len(fused), fused]

    def fuse_one(self, frames: Path, row: dict[str, Any]) -> dict[str, Any]:
        """One row; without first frames of its video, the part between clips is silently left out."""
        inside = row["video_results"]
        known = (frames / Path(row["video_path"]).name).exists()
        between, mapped = (0.8, 0.9) if known else (0, 0)
        return {
            "video_path": row["video_path"],
            "inclip_score": inside,
            "clip2clip_score": between,
            "mapped_clip2clip_score": mapped,
            "video_results": (inside + mapped) / 2 if mapped else inside,
        }
