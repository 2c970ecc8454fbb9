"""The record of a run: complete, valid JSON, whole or absent."""

import hashlib
import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from engine import record as module
from engine.paths import git_revision
from engine.record import (
    PACKAGE,
    describe_device,
    describe_video,
    peak_memory,
    running_revision,
    versions,
    video_facts,
    write_record,
)


def test_a_record_is_json_that_reads_back_the_same(tmp_path: Path) -> None:
    record = {"prompt": "ein grüner Stern ★", "seed": 2**62, "seconds": {"load": 0.1}, "steps": [], "git": None}
    write_record(tmp_path / "a.json", record)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == record
    assert "grüner" in text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_no_word_for_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path / "a.json", {"seconds": {"load": value}})
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_fails_keeps_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path / "a.json", {"seed": 1})

    def fill_disk(self: Path, text: str, **settings: object) -> None:
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_disk)
    with pytest.raises(OSError, match="No space"):
        write_record(tmp_path / "a.json", {"seed": 2})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_metadata_of_a_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"some bytes")
    assert describe_video(tmp_path / "a.mp4", num_frames=129, fps=16) == {
        "file": "a.mp4",
        "sha256": hashlib.sha256(b"some bytes").hexdigest(),
        "bytes": 10,
        "num_frames": 129,
        "fps": 16,
        "seconds": 129 / 16,
    }


def test_metadata_depends_on_settings_only(tmp_path: Path) -> None:
    settings = {
        "prompt": "a red circle",
        "negative_prompt": "blur",
        "seed": 3,
        "sampler": {"num_steps": 4, "seed": 0, "negative_prompt": ""},
        "method": {"name": "freespec", "settings": {"alpha": 5.0}},
        "height": 32,
    }
    record = {
        "prompt": "a red circle",
        "negative_prompt": "blur",
        "seed": 3,
        "config": {
            "model": {"path": "/home/somebody/models/wan"},
            "video": {"fps": 16},
            "decode": {"mode": "auto"},
            "output": {"path": "/home/somebody/a.mp4", "crf": 12},
        },
        "identity": {"id": "0", "settings": settings},
        "versions": {PACKAGE: "0.1.0"},
    }
    facts = video_facts(record)
    assert facts == {
        "prompt": "a red circle",
        "negative_prompt": "blur",
        "seed": 3,
        "model": "wan",
        "method": {"name": "freespec", "settings": {"alpha": 5.0}},
        "settings": {
            "sampler": {"num_steps": 4},
            "height": 32,
            "fps": 16,
            "decode": {"mode": "auto"},
            "crf": 12,
        },
        "version": f"{PACKAGE} 0.1.0",
    }
    elsewhere = record | {"seconds": {"denoise": 3.0}, "parallel": {"ranks": 4}, "device": {"name": "a CPU"}}
    elsewhere["config"] = elsewhere["config"] | {"model": {"path": "wan"}, "parallel": {"ring": 2}}
    assert video_facts(elsewhere) == facts
    assert video_facts(record | {"seed": 4}) != facts  # negative control
    # Records of other versions and origins.
    assert video_facts({"seed": 3, "config": {}, "identity": 5, "versions": []})["seed"] == 3


def test_memory_device_and_versions_are_of_this_process() -> None:
    cpu = torch.device("cpu")
    before = peak_memory(cpu)["host_bytes"]
    block = torch.ones(2**26)  # 256 MiB
    after = peak_memory(cpu)["host_bytes"]
    assert 2**20 < before <= after < 2**40
    assert after >= block.nbytes
    assert describe_device(cpu)["type"] == "cpu"
    told = Path("/proc/cpuinfo")
    if told.is_file() and "model name" in told.read_text():
        assert f": {describe_device(cpu)['name']}\n" in told.read_text()
    assert describe_device(cpu)["cpu_threads"] == torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    assert [describe_device(cpu)[name] for name in ("cpu_capability", "fp32_matmul")] == [capability, "highest"]
    found = versions()
    assert found["torch"] == torch.__version__
    assert all(found[name] for name in ("python", "diffusers", "transformers", "av"))


def test_a_cpu_without_a_model_s_name_is_called_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ("processor\t: 0\n", OSError()):

        def read_text(_path: Path, told: str | OSError = told, **_how: str) -> str:
            if isinstance(told, OSError):
                raise told
            return told

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", read_text)
            name = describe_device(torch.device("cpu"))["name"]
        assert name == (platform.processor() or platform.machine())


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", "freespec-no-such-package")
    assert versions()["freespec-no-such-package"] is None


def test_the_revision_is_the_checkout_s_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    assert git_revision(tmp_path) is None

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    assert git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "modified": False}
    running_revision.cache_clear()  # of this process, which asked before
    begun = running_revision()
    assert begun == git_revision(tmp_path)
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "modified": True}
    assert running_revision() == begun  # what runs was read before
    running_revision.cache_clear()

    monkeypatch.setattr("shutil.which", lambda name: None)
    assert git_revision(tmp_path) is None
