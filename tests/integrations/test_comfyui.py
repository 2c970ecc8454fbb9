"""The ComfyUI node, loaded by ComfyUI's rule: a folder with an __init__.py, under any name, that has NODE_CLASS_MAPPINGS.

ComfyUI itself is no package: what it gives a node (`comfy.utils`, `comfy.model_management`, `comfy_api.latest`) is stood in for. The
service is the real one, without replicas: the test makes its jobs.
"""

import ast
import dataclasses
import importlib.util
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.media.read_video import read_video
from engine.media.write_video import write_video
from launch.serving.jobs import Jobs
from tests.engine.batch.cases import write_item
from tests.launch.conftest import wan_folder
from tests.launch.test_serve import KEY, PROMPT, answered, jobs_of, started, wait_for

__all__ = ["wan_folder"]

# The client's `videos` are marked as deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FOLDER = Path(__file__).parent.parent.parent / "integrations" / "comfyui"
FRAMES = np.zeros((5, 32, 32, 3), np.uint8) + 200


class InterruptProcessingException(Exception):  # noqa: N818 - ComfyUI's name
    pass


@dataclasses.dataclass
class Comfy:
    """What ComfyUI shows and decides: the progress so far, and whether a person has interrupted."""

    progress: list[int] = dataclasses.field(default_factory=list)
    interrupted: bool = False


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Comfy:
    state = Comfy()

    class ProgressBar:
        def __init__(self, total: int) -> None:
            assert total == 100

        def update_absolute(self, value: int) -> None:
            state.progress.append(value)

    class VideoFromFile:
        def __init__(self, file: Any) -> None:
            self.path = tmp_path / "received.mp4"
            self.path.write_bytes(file.read())

        def get_components(self) -> Any:
            return SimpleNamespace(images=torch.from_numpy(np.stack(list(read_video(self.path)))) / 255)

    def throw() -> None:
        if state.interrupted:
            raise InterruptProcessingException

    given: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": throw},
        "comfy_api": {},
        "comfy_api.latest": {"InputImpl": SimpleNamespace(VideoFromFile=VideoFromFile)},
    }
    for name, fields in given.items():
        module = ModuleType(name)
        module.__dict__.update(fields)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return state


@pytest.fixture
def node(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The node's module, loaded as ComfyUI's load_custom_node does."""
    name = "/some/where/custom_nodes/any_x_name"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        inner = sys.modules[f"{name}.node"]
        monkeypatch.setattr(inner, "POLL_SECONDS", 0.02)
        monkeypatch.setattr(inner, "AWAY_SECONDS", 0.0)
        yield SimpleNamespace(
            mappings=module.NODE_CLASS_MAPPINGS, module=inner, shown=module.NODE_DISPLAY_NAME_MAPPINGS
        )
    finally:
        for key in [key for key in sys.modules if key.startswith(name)]:
            del sys.modules[key]


def call(node: Any, **inputs: Any) -> Any:
    """As ComfyUI's executor: an object of the class, its FUNCTION, and the inputs by name."""
    made = node.mappings["FreeSpecVideo"]
    return getattr(made(), made.FUNCTION)(**{"prompt": PROMPT, "seed": 0, "seconds": 0.0} | inputs)


def test_the_node_is_what_comfyui_expects(node: Any) -> None:
    made = node.mappings["FreeSpecVideo"]
    inputs = made.INPUT_TYPES()
    names = [*inputs["required"], *inputs["optional"]]
    assert names == [*inspect.signature(getattr(made, made.FUNCTION)).parameters][1:]
    kinds = {given[0] for group in inputs.values() for given in group.values()}
    assert kinds == {"STRING", "INT", "FLOAT", "IMAGE"}
    assert len(made.RETURN_TYPES) == len(made.RETURN_NAMES) == 2
    assert node.shown.keys() == node.mappings.keys()


def test_the_node_imports_nothing_of_the_project_and_no_torch() -> None:
    trees = [ast.parse(path.read_text()) for path in FOLDER.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    assert {name.partition(".")[0] for name in named} - sys.stdlib_module_names == {
        "comfy",
        "comfy_api",
        "numpy",
        "PIL",
    }


def make_jobs(jobs: Jobs, become: Callable[[str], None]) -> threading.Thread:
    """The driver's part: the next job runs, and then becomes something."""

    def run() -> None:
        [job] = wait_for(jobs.take_new)
        item_id = job.planned.item.item_id
        jobs.move(item_id, 1, 4)
        time.sleep(0.1)
        become(item_id)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_video_comes_back_with_its_frames(node: Any, comfy: Comfy, wan_folder: Path, tmp_path: Path) -> None:
    jobs = jobs_of(wan_folder, tmp_path / "out")

    def finish(item_id: str) -> None:
        item = jobs.job_of(item_id).planned.item
        write_item(jobs.files, item)
        write_video(tmp_path / "made.mp4", FRAMES, fps=8)
        jobs.files.of(item).video.write_bytes((tmp_path / "made.mp4").read_bytes())
        jobs.end(item_id)

    with answered(jobs, key=KEY) as ask:
        thread = make_jobs(jobs, finish)
        given = {"seed": 7, "seconds": 1.0, "method": " direct ", "extra": '{"sampler.num_steps": 9}'}
        place = {"address": f"http://127.0.0.1:{ask.port}/", "api_key": KEY}
        video, frames = call(node, first_frame=torch.rand(1, 40, 30, 4), **given, **place)
        thread.join()
    assert video.path.read_bytes() == (tmp_path / "made.mp4").read_bytes()
    assert (frames.shape, frames.max() <= 1) == ((5, 32, 32, 3), True)
    assert (comfy.progress[-1], comfy.progress) == (100, sorted(comfy.progress))
    [job] = jobs.page(limit=9, newest_first=True, after=None)[0]
    assert (job["seed"], job["seconds"], job["method"], job["extra"]) == (7, "1", "direct", {"sampler.num_steps": 9})
    assert len(list(jobs.planner.pictures.iterdir())) == 1


def test_an_interruption_cancels_the_job(node: Any, comfy: Comfy, wan_folder: Path, tmp_path: Path) -> None:
    jobs = jobs_of(wan_folder, tmp_path / "out")

    def interrupt(item_id: str) -> None:
        comfy.interrupted = True

    with answered(jobs) as ask:
        thread = make_jobs(jobs, interrupt)
        with pytest.raises(InterruptProcessingException):
            call(node, address=f"http://127.0.0.1:{ask.port}")
        thread.join()
    assert len(jobs.leaving) == 1
    assert jobs.page(limit=9, newest_first=True, after=None)[0] == []


def test_errors_are_one_line(node: Any, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(wan_folder, tmp_path / "out")
    error = node.module.ServiceError
    with answered(jobs, key=KEY) as ask:
        address = f"http://127.0.0.1:{ask.port}"
        place = {"address": address, "api_key": KEY}
        for inputs, said in (
            (place | {"method": "os:system"}, "unknown method 'os:system'"),
            (place | {"extra": "{"}, "extra is not JSON"),
            (place | {"api_key": "wrong"}, "the API key is missing or wrong"),
            (place | {"api_key": "a\nb"}, "the API key has characters"),
            (place | {"address": f"{address}/elsewhere"}, "Not Found"),
            ({"address": "file:///etc/passwd"}, "the address must look like http://127.0.0.1:8000"),
            ({"address": "http://a:b@127.0.0.1"}, "the address must look like"),
            ({"address": "http://127.0.0.1:1"}, "does not answer"),
        ):
            with pytest.raises(error, match=said) as told:
                call(node, **inputs)
            assert "\n" not in str(told.value)
        thread = make_jobs(jobs, lambda item_id: jobs.end(item_id, error="it broke"))
        with pytest.raises(error, match="the video failed: it broke"):
            call(node, **place)
        thread.join()

        # The key of the environment is not sent to an address that a workflow names.
        monkeypatch.setenv("FREESPEC_API_KEY", KEY)
        with pytest.raises(error, match="the API key is missing or wrong"):
            call(node, address=address, method="x")
        monkeypatch.setenv("FREESPEC_ADDRESS", f"{address}/")
        with pytest.raises(error, match="unknown method 'x'"):
            call(node, method="x")


@pytest.mark.slow
def test_a_running_service_makes_the_video(
    node: Any, comfy: Comfy, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its replica: a video with a first frame, and one that is interrupted while it runs."""
    with started(wan_folder, tmp_path / "out", tmp_path / "printed") as (_, client):
        monkeypatch.setenv("FREESPEC_ADDRESS", str(client.base_url.join("/")))
        video, frames = call(node, seconds=1.0, first_frame=torch.full((1, 32, 32, 3), 0.8))
        assert frames.shape == (9, 32, 32, 3)
        [job] = client.videos.list()
        assert video.path.read_bytes() == client.videos.download_content(job.id).read()
        assert comfy.progress[-1] == 100

        def interrupt() -> None:
            wait_for(lambda: [each for each in client.videos.list() if each.status == "in_progress"])
            comfy.interrupted = True

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(InterruptProcessingException):
            call(node, seed=1)
        thread.join()
        assert [each.id for each in client.videos.list()] == [job.id]
