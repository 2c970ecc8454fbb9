"""serve.py: OpenAI's own client makes a video across a SIGKILL and cancels one; bad requests, the key and the bound of the queue."""

import contextlib
import dataclasses
import http.client
import io
import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from engine.batch.driver import Done, Driver, Failed
from engine.batch.files import BatchFiles
from engine.batch.queue import Failure
from engine.decode.preview import PreviewFactors, vae_digest
from engine.errors import UserError
from launch.arguments import serve as arguments
from launch.commands import serve
from launch.serving import guard
from launch.serving.app import make_app
from launch.serving.dispatch import Listener, make_driver
from launch.serving.extra import names_of, with_extra
from launch.serving.guard import MOST_BODY
from launch.serving.jobs import Jobs
from launch.serving.metrics import Metrics
from launch.serving.rates import MOST_BODIES, MOST_CLIENTS, Rates, client_of
from launch.serving.requests import MOST_TEXT, RefusedError
from tests.engine.batch.cases import Clock, FakeReplica, write_item
from tests.launch.conftest import SMALL, Run
from tests.launch.forked import PATIENCE_SECONDS, start_forked
from tests.tiny_pipelines import random_wan

# Its `videos` are marked as deprecated, since the service that they were made for has ended.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPT = "a red circle"
KEY = "k" * arguments.LEAST_KEY
EXTRA = {"sampler.num_steps": 12, "sampler.guidance_scale": 3.5, "sampler.negative_prompt": "green"}
SETTINGS = SMALL | {"sampler.num_steps": 16, "video.fps": 8, "snapshot_every": 1, "port": 0}


def words(folder: Path, out: Path, **settings: object) -> list[str]:
    return [
        f"--{name}={value}" for name, value in ({"model.path": folder, "folder": out} | SETTINGS | settings).items()
    ]


def wait_for(what: Callable[[], Any]) -> Any:
    until = time.monotonic() + PATIENCE_SECONDS
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def started(folder: Path, out: Path, printed: Path, **settings: object) -> Iterator[tuple[Any, openai.OpenAI]]:
    """The command in a process of its own, and a client of it."""
    printed.mkdir()
    process = start_forked(["serve", *words(folder, out, **settings)], printed, place={"OMP_NUM_THREADS": 1})
    try:
        line = wait_for(lambda: (printed / "rank0.out").is_file() and (printed / "rank0.out").read_text())
        assert line.startswith("http://127.0.0.1:"), (line, (printed / "rank0.err").read_text())
        with openai.OpenAI(base_url=f"{line.split()[0]}/v1", api_key="any", max_retries=0) as client:
            yield process, client
    finally:
        process.kill()
        process.join()


def test_a_video_outlives_a_kill_and_another_is_cancelled(
    wan_folder: Path, tmp_path: Path, make: Callable[..., Run]
) -> None:
    """Bytes are those of generate.py on one rank, for a shorter video than the preset's, whose steps the killed server had begun.

    The next server has replicas of two ranks, which end a cancelled item together.
    """
    out = tmp_path / "served"

    def unfinished() -> list[Path]:
        return list(out.glob("*/*/unfinished/*.safetensors"))

    with started(wan_folder, out, tmp_path / "first") as (process, client):
        made = client.videos.create(
            prompt=PROMPT, seconds="1", size="32x32", extra_body={"seed": 3, "method": "direct", "extra": EXTRA}
        )
        assert (made.status, made.seconds) == ("queued", "1")
        wait_for(unfinished)
        kill_as_an_older_version(process, out)
    assert "no previews for this VAE" in (tmp_path / "first/rank0.out").read_text()
    previews = {"preview_every": 1, "preview_factors": save_factors(tmp_path)}
    with started(wan_folder, out, tmp_path / "second", nproc=2, **previews) as (process, client):
        wait_for(lambda: client.videos.retrieve(made.id).status == "completed")
        video = client.videos.download_content(made.id).read()
        assert (
            client.videos.create(
                prompt=PROMPT,
                seconds="1",
                extra_body={"seed": 3, "method": "direct", "extra": json.dumps(EXTRA)},
            ).progress
            == 100
        )
        kinds = [
            client.videos.download_content(made.id, variant=each).read()[:12] for each in ("thumbnail", "spritesheet")
        ]
        assert (kinds[0][8:], kinds[1][:4]) == (b"WEBP", b"\x89PNG")
        assert json.loads(next(BatchFiles(root=out).sidecars()).read_text())["run"]["resumed_at"] >= 1

        picture = io.BytesIO()
        Image.new("RGB", (40, 30), (255, 0, 0)).save(picture, "PNG")
        other = client.videos.create(prompt=PROMPT, input_reference=("a.png", picture.getvalue(), "image/png"))
        wait_for(lambda: client.videos.retrieve(other.id).progress > 0)
        check_preview(client, other.id)
        lines = events_of(client, other.id)
        assert next(lines)["status"] == "in_progress"
        assert client.videos.delete(other.id).deleted
        assert list(lines)[-1] == {"id": other.id}  # the stream has ended
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(other.id)
        wait_for(lambda: not unfinished() and not list(out.glob("pictures/*")) and not list(out.rglob("*.webp")))
        assert [(each.id, each.model) for each in client.videos.list()] == [
            (client.videos.poll(made.id).id, client.models.list().data[0].id)
        ]
        counted = client.with_options(base_url=client.base_url.join("/")).get("/metrics", cast_to=str)
        # cancelled at a step, not after the last
        assert all(line in counted for line in ("freespec_cancelled_total 1.0", "freespec_video_seconds_count 1.0"))
        process.terminate()
        process.join(PATIENCE_SECONDS)
        said = (tmp_path / "second/rank0.err").read_text()
        assert (process.exitcode, said) == (143, "stopped: 0 jobs are left; the same command continues\n")
    settings = {
        "video.fps": 8,
        "video.num_frames": 9,
        "sampler.seed": 3,
        "method.name": "direct",
    } | EXTRA
    assert make(settings, "--prompt", PROMPT).code == 0
    assert video == (tmp_path / "a.mp4").read_bytes()
    assert not list(out.glob("*/*/videos/*.part"))


def kill_as_an_older_version(process: Any, out: Path) -> None:
    """Kill a service; its snapshots get the name of older versions, and one more is of no job."""
    process.kill()
    process.join()
    for path in list(out.glob("*/*/unfinished/*.safetensors")):
        path.rename(path.with_name(path.name.replace(".snapshot.", ".checkpoint.")))
        path.with_name("gone.checkpoint.safetensors").write_text("left")


def save_factors(folder: Path) -> Path:
    """Colours for the VAE of `wan_folder`."""
    path = folder / "factors.safetensors"
    factors = PreviewFactors(weight=torch.ones(4, 12) / 9, bias=torch.zeros(12), vae=vae_digest(random_wan().vae))
    factors.save(path, {})
    return path


def check_preview(client: openai.OpenAI, name: str) -> None:
    """Wait for the preview of a running video, and look at it; one that is done has none."""
    wait_for(lambda: client.videos.retrieve(name).to_dict()["preview"])
    with Image.open(io.BytesIO(client.videos.download_content(name, variant="preview").read())) as shown:
        assert (shown.format, shown.n_frames, shown.size) == ("WEBP", 5, (16, 16))
    done = next(each.id for each in client.videos.list() if each.status == "completed")
    with pytest.raises(openai.NotFoundError, match="is completed and has no preview"):
        client.videos.download_content(done, variant="preview")


def events_of(client: openai.OpenAI, name: str) -> Iterator[dict[str, Any]]:
    """The data of a job's server-sent events, until their end."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", f"/v1/videos/{name}/events")
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def jobs_of(folder: Path, out: Path, **settings: object) -> Jobs:
    """The jobs of a service without replicas: what is accepted waits."""
    _, jobs = serve.plan(arguments.read(words(folder, out, **settings)))
    out.mkdir(exist_ok=True)
    jobs.open()
    return jobs


@contextlib.contextmanager
def answered(
    jobs: Jobs, key: str | None = None, rates: tuple[float, float] = (0, 0)
) -> Iterator[Callable[..., tuple[int, Any, http.client.HTTPResponse]]]:
    """`ask(method, path, body, headers)` of an HTTP server over these jobs; a dict is sent as JSON."""
    with serve.listening("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]

        def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, http.client.HTTPResponse]:
            if isinstance(body, dict | list):
                body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
            with contextlib.closing(connection):
                connection.request(
                    method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
                )
                answer = connection.getresponse()
                data = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(data) if is_json else data, answer

        ask.port = port
        with serve.answering(make_app(jobs, Metrics(), lambda: {"status": "ok"}, key=key, rates=Rates(*rates)), sock):
            yield ask


def form(**fields: str | bytes) -> dict[str, Any]:
    """A form as the arguments of `ask`; bytes are files."""
    parts = b""
    for name, value in fields.items():
        file = '; filename="../../a.png"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        parts += f'--B\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"
    return {"body": parts + b"--B--\r\n", "Content_Type": "multipart/form-data; boundary=B"}


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, kind)
    return data.getvalue()


def bomb() -> bytes:
    """A picture of 10^10 pixels, in its header."""
    head = b"IHDR" + (100_000).to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    return picture()[:8] + (13).to_bytes(4) + head + zlib.crc32(head).to_bytes(4)


# What is sent, and what is said.
BAD: list[tuple[Any, str]] = [
    ({}, "give one of prompt and timeline"),
    ([], "the body must be a JSON object"),
    ({"prompt": PROMPT, "timeline": "a [0-]"}, "give one of prompt and timeline"),
    ({"prompt": 5}, "prompt must be a text with words, got 5"),
    ({"prompt": "x" * (MOST_TEXT + 1)}, f"prompt has {MOST_TEXT + 1} characters"),
    ({"prompt": "a " * 600}, "tokens, and sampler.max_text_tokens is 32"),
    ({"prompt": "\ud800"}, "prompt is not valid Unicode"),
    ({"\ud800": 1}, r"unknown field '\ud800'"),
    ({"timeline": "/etc/passwd.yaml"}, "has no range"),
    ({"timeline": "a [0-4s] | b [5s-]"}, "nothing covers 4s to 5s"),
    ({"prompt": PROMPT, "method": "os:system"}, "unknown method 'os:system'; choose one of freespec"),
    ({"prompt": PROMPT, "model": "../other"}, "the model '../other' is not served here"),
    ({"prompt": PROMPT, "config": "/etc/passwd"}, "unknown field 'config'"),
    ({"prompt": PROMPT, "size": "64"}, "size must look like 832x480"),
    ({"prompt": PROMPT, "size": "20x20"}, "video.height must be a multiple of 16, got 20"),
    ({"prompt": PROMPT, "size": "0x0"}, "video.height must"),
    ({"prompt": PROMPT, "size": "64x32"}, "this service makes at most 17408, as 2 seconds of 32x32"),
    ({"prompt": PROMPT, "seconds": "1e9"}, "seconds must look like 8 or 4.5"),
    ({"prompt": PROMPT, "seconds": float("nan")}, "seconds must look like 8 or 4.5"),
    ({"prompt": PROMPT, "seed": 2**63}, "seed must be less than 2**63"),
    ({"prompt": PROMPT, "seed": True}, "seed must look like 7, got True"),
    ({"prompt": PROMPT, "extra": 5}, "extra must be an object of settings by name, got 5"),
    ({"prompt": PROMPT, "extra": "[" * 9000}, "extra must be an object"),
    ({"prompt": PROMPT, "extra": {"output.path": "/etc/passwd"}}, "unknown setting 'output.path' of extra; known are"),
    ({"prompt": PROMPT, "extra": {"method.name": "os:system"}}, "unknown setting 'method.name' of extra"),
    ({"prompt": PROMPT, "extra": {"model.path": "../other"}}, "unknown setting 'model.path' of extra"),
    ({"prompt": PROMPT, "extra": {"method.freespec.basis": "global"}}, "unknown setting"),
    ({"prompt": PROMPT, "extra": {"method.freepca.fused_share": 1}}, "unknown setting"),
    ({"prompt": PROMPT, "extra": {"method.window_frames": 1}}, "unknown setting"),
    ({"prompt": PROMPT, "extra": {"__class__": 1}}, "unknown setting '__class__'"),
    ({"prompt": PROMPT, "extra": {"sampler.num_steps": 51}}, "sampler.num_steps must be a whole number in [1, 50]"),
    ({"prompt": PROMPT, "extra": {"sampler.num_steps": 2.5}}, "sampler.num_steps must be a whole number"),
    ({"prompt": PROMPT, "extra": {"sampler.num_steps": True}}, "sampler.num_steps must look like 20, got True"),
    ({"prompt": PROMPT, "extra": {"sampler.num_steps": 10**4000}}, "sampler.num_steps must look like 20"),
    ({"prompt": PROMPT, "extra": {"sampler.guidance_scale": 1}}, "sampler.guidance_scale must be more than 1"),
    (
        {"prompt": PROMPT, "extra": {"sampler.guidance_scale": "1e999"}},
        "sampler.guidance_scale must be a finite number",
    ),
    ({"prompt": PROMPT, "extra": {"sampler.guidance_scale": float("nan")}}, "sampler.guidance_scale must look like"),
    ({"prompt": PROMPT, "extra": {"sampler.negative_prompt": ["a"]}}, "sampler.negative_prompt must be a text"),
    ({"prompt": PROMPT, "extra": {"sampler.negative_prompt": "a " * 600}}, "the negative prompt has"),
    ({"prompt": PROMPT, "extra": {"sampler.negative_prompt": "a [0-4s] | b"}}, "has no range"),
    ({"prompt": PROMPT, "extra": {"method.freespec.fused_share": 2}}, "fused_share must lie in [0, 1], got 2"),
    ({"prompt": PROMPT, "extra": {"method.freespec.alpha": -1}}, "alpha must be a finite number, 0 or more"),
    (form(**{"prompt": PROMPT, "extra": '{"a": 1}', "extra[a]": "2"}), "extra has 'a' twice"),
    (form(**{"prompt": PROMPT, "extra[sampler.seed]": "2"}), "unknown setting 'sampler.seed'"),
    (form(**{"prompt": PROMPT, "extra[x": "2"}), "unknown field 'extra[x'"),
    (form(**{f"extra[{i}]": "2" for i in range(60)}), "Too many fields"),
    ({"prompt": PROMPT, "input_reference": "/etc/passwd"}, "send input_reference as a file of a form"),
    (form(prompt=PROMPT, input_reference=b"no picture"), "input_reference is not a whole picture"),
    (form(prompt=PROMPT, input_reference=picture()[:40]), "input_reference is not a whole picture"),
    (form(prompt=PROMPT, input_reference=picture(kind="BMP")), "input_reference is not a whole picture"),
    (form(prompt=PROMPT, input_reference=bomb()), "input_reference"),
    (form(prompt=PROMPT, input_reference=picture("RGBA")), "input_reference has transparent pixels"),
    (form(prompt=PROMPT, input_reference="first=/etc/passwd"), "input_reference must be a file"),
    ({"body": b"{", "Content_Type": "application/json"}, "the body is not JSON"),
    ({"body": b"[" * 100_000, "Content_Type": "application/json"}, "the body is not JSON"),
    ({"body": b"x", "Content_Type": "text/plain"}, "send multipart/form-data or application/json"),
    ({"body": b"x", "Content_Type": "multipart/form-data; boundary=B"}, ""),
    ({"body": b"x", "Content_Type": "multipart/form-data"}, ""),
    ({"body": bytes(MOST_BODY + 1), "Content_Type": "application/json"}, "larger than 16 MiB"),
    (
        {"body": (bytes(1 << 20) for _ in range(17)), "Content_Type": "application/json"},
        "larger than 16 MiB",
    ),  # of no told length
]
WRONG_PATHS = {
    "/v1/videos/video_0000": 404,
    "/v1/videos/..%2F..%2Fetc%2Fpasswd/content": 404,
    "/v1/videos/video_x/events": 404,
    "/v1/videos?limit=0": 400,
    "/v1/videos?limit=many": 400,
    "/v1/videos?after=video_x": 404,
    "/v1/models/other": 404,
    "/docs": 404,
}


def test_bad_requests_are_answered_in_one_line_and_write_nothing(wan_folder: Path, tmp_path: Path) -> None:
    jobs = jobs_of(wan_folder, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with answered(jobs) as ask:
        for body, said in BAD:
            sent = body if isinstance(body, dict) and "Content_Type" in body else {"body": body}
            status, answer, _ = ask("POST", "/v1/videos", **sent)
            assert_refused(status, answer, said)
        for path, expected in WRONG_PATHS.items():
            status, answer, _ = ask("GET", path)
            assert_refused(status, answer)
            assert status == expected
        good = {"body": {"prompt": PROMPT}}
        for method, headers in (
            ("PUT", {}),
            ("POST", {"Host": "evil.test"}),
            ("POST", {"Origin": "http://evil.test"}),
            ("POST", {"Host": "["}),
        ):
            assert_refused(*ask(method, "/v1/videos", **good, **headers)[:2])
        assert sorted(tmp_path.rglob("*")) == before

        # The same without its mistake is accepted, which the bound allows once.
        assert ask("POST", "/v1/videos", **good)[0] == 200
        for page in ("/", "/health", "/metrics"):
            assert ask("GET", page)[0] == 200


def assert_refused(status: int, answer: Any, said: str = "") -> None:
    assert 400 <= status < 500, answer
    assert answer.keys() == {"error"}
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert said in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert answer["error"]["message"]


def test_the_queue_is_bounded_and_a_key_is_asked_for(wan_folder: Path, tmp_path: Path) -> None:
    jobs = jobs_of(wan_folder, tmp_path / "out", most_jobs=2)
    bearer = {"Authorization": f"Bearer {KEY}"}
    with answered(jobs, key=KEY) as ask:
        for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}, {"Authorization": "Bearer é"}):
            assert ask("GET", "/v1/videos", **headers)[0] == 401
            assert ask("GET", "/metrics", **headers)[0] == 401
        assert ask("GET", "/", **{"Host": "example.org"})[0] == 200  # the page, which asks for the key
        names = []
        for seed in (0, 1, 1):
            status, answer, _ = ask("POST", "/v1/videos", {"prompt": PROMPT, "seed": seed}, **bearer)
            names.append(answer["id"])
        assert (status, names[1]) == (200, names[2])  # an equal request is the same job
        status, answer, refused = ask("POST", "/v1/videos", {"prompt": PROMPT, "seed": 2}, **bearer)
        assert_refused(status, answer, "2 jobs wait or run, and --most_jobs is 2")
        assert (status, refused.headers["Retry-After"]) == (429, "10")
        assert ask("GET", f"/v1/videos/{names[0]}/content", **bearer)[0] == 409
        for query, expected in (("limit=1", names[1:2]), (f"order=asc&after={names[0]}", names[1:2])):
            found = ask("GET", f"/v1/videos?{query}", **bearer)[1]
            assert ([each["id"] for each in found["data"]], found["has_more"]) == (expected, query == "limit=1")
        assert ask("DELETE", f"/v1/videos/{names[1]}", **bearer)[0] == 200
        assert ask("POST", "/v1/videos", {"prompt": PROMPT, "seed": 2}, **bearer)[0] == 200
    again = jobs_of(wan_folder, tmp_path / "out")
    assert [job.name for job in again.take_new()] == [names[0], answer_id(jobs)]


def answer_id(jobs: Jobs) -> str:
    """The newest job."""
    return jobs.page(limit=1, newest_first=True, after=None)[0][0]["id"]


def test_failures_are_tried_again_and_given_up_alone(wan_folder: Path, tmp_path: Path) -> None:
    """Three equal failures in a row would halt a batch; a service continues, and a failed job may be requested again."""
    jobs = jobs_of(wan_folder, tmp_path / "out")
    fault, clock, fails = Failure("fault", "it broke"), Clock(), True

    def script(item_id: str, _attempt: int) -> tuple[float, Any]:
        if fails:
            item = jobs.job_of(item_id).planned.item
            jobs.files.of(item).make_folders()
            jobs.files.of(item).part("token").write_bytes(b"half")
            return 1.0, Failed(failure=fault, broken=False)
        write_item(jobs.files, jobs.job_of(item_id).planned.item)
        return 1.0, Done(record={})

    class Journal:
        listener = Listener(jobs=jobs, metrics=Metrics())

        def event(self, name: str, **fields: Any) -> None:
            self.listener.event({"event": name, **fields})

        def tick(self, driver: Driver) -> None:
            clock.wait()
            jobs.wake.set()

    def is_open() -> bool:
        return any(job["status"] in ("queued", "in_progress") for job in shown()) or bool(jobs.leaving)

    def shown() -> list[dict[str, Any]]:
        return jobs.page(limit=9, newest_first=False, after=None)[0]

    replica: Any = FakeReplica(name="replica-0", clock=clock)
    replica.script = script
    requests = [serving_request(jobs, seed) for seed in range(4)]
    for request in requests:
        jobs.accept(request)
    driver = make_driver(jobs, [replica], Journal(), arguments_options(wan_folder, tmp_path), is_open)
    driver.clock = clock
    driver.run()
    assert driver.halted is None
    assert [(job["status"], job["error"]["message"]) for job in shown()] == [("failed", "it broke")] * 4
    assert len(replica.made) == 12
    assert [job.status for job in jobs_of(wan_folder, tmp_path / "out").take_new()] == []

    fails = False
    jobs.accept(requests[1])
    jobs.delete(shown()[0]["id"])
    jobs.accept(requests[0])
    jobs.wake.set()
    driver.run()
    assert [job["status"] for job in shown()] == ["failed", "failed", "completed", "completed"]
    assert not list(jobs.files.root.rglob("*.part"))  # left by attempts that were killed
    assert len(list(jobs.files.quarantine.glob("*.json"))) == 2


def test_a_client_may_ask_only_so_often() -> None:
    clock = Clock()
    rates = Rates(2, 60, clock)

    def passed(client: str, count: int, *, is_post: bool = False) -> int:
        done = 0
        with contextlib.suppress(RefusedError):
            for done in range(count):  # noqa: B007 - how many came through
                rates.check(client, is_post=is_post)
            done = count
        return done

    assert [passed("a", 9), passed("a", 9), passed("b", 9)] == [4, 0, 4]  # two seconds' worth, each for itself
    clock.wait()
    assert passed("a", 9) == 2
    with pytest.raises(RefusedError, match=r"more than 2 requests a second; ask again in 1 s") as refused:
        rates.check("a", is_post=False)
    assert (refused.value.status, refused.value.wait) == (429, 1)
    clock.now += 60
    rates.requests_per_second = 0
    assert passed("a", 99, is_post=True) == 60
    for i in range(MOST_CLIENTS + 9):
        rates.check(f"other {i}", is_post=True)
    assert len(rates._buckets) == MOST_CLIENTS
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_BODIES):
            stack.enter_context(rates.reading())
        with pytest.raises(RefusedError), rates.reading():
            pass
    with rates.reading():
        pass
    hosts = ("::ffff:10.0.0.1", "10.0.0.1", "2001:db8::1", "2001:db8::2:1", "2001:db8:0:1::1", None)
    assert len({client_of(host, has_key=True) for host in hosts}) == 4
    assert client_of("10.0.0.1", has_key=False) != client_of("10.0.0.1", has_key=True)


def test_floods_without_the_key_do_not_hold_up_those_with_it(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers do not change the address, and a missing body blocks no one."""
    monkeypatch.setattr(guard, "SILENT_LONGEST", 0.1)
    bearer = {"Authorization": f"Bearer {KEY}"}
    with answered(jobs_of(wan_folder, tmp_path / "out"), key=KEY, rates=(0.01, 1)) as ask:
        assert ask("GET", "/v1/videos", Origin="http://evil.test")[0] == 403  # which counts for nobody
        assert ask("GET", "/v1/videos")[0] == 401
        status, answer, refused = ask("GET", "/v1/videos", **{"X_Forwarded_For": "192.0.2.7"})
        assert_refused(status, answer, "more than 0.01 requests a second")
        assert (status, refused.headers["Retry-After"]) == (429, "100")
        assert ask("POST", "/v1/videos", b"{", Content_Type="application/json", Content_Length="9", **bearer)[0] == 408
        assert ask("POST", "/v1/videos", {}, **bearer)[0] == 429


def test_only_weights_of_the_method_are_settings_of_a_request(wan_folder: Path, tmp_path: Path) -> None:
    read = arguments.read(words(wan_folder, tmp_path))
    shown = {variant.label: names_of(variant.config)[3:] for variant in read.variants}
    assert shown["direct"] == ()
    assert shown["freelong"] == ("method.freelong.cutoff_time", "method.freelong.cutoff_space")
    assert shown["freepca"] == ("method.freepca.fused_share",)
    assert "method.freespec.alpha" in shown["freespec"]
    config = read.variants[0].config
    assert with_extra(config, {}) == config
    changed = with_extra(config, {"method.freespec.alpha": "2e-1", "sampler.num_steps": "3"})
    assert (changed.method.freespec.alpha, changed.sampler.steps, changed.model) == (0.2, 3, config.model)
    alone = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, guidance_scale=1.0))
    assert names_of(alone)[:2] == ("sampler.num_steps", "method.freespec.fused_share")


def serving_request(jobs: Jobs, seed: int) -> Any:
    from launch.serving.requests import read_request  # noqa: PLC0415

    return read_request({"prompt": PROMPT, "seed": seed}, jobs.planner.offer)


def arguments_options(folder: Path, tmp_path: Path) -> Any:
    return arguments.read(words(folder, tmp_path / "out")).options


def test_wrong_options_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "key"
    short.write_text("short\n")
    many = tmp_path / "many.txt"
    many.write_text("one\ntwo\nthree\n")
    for settings, said in (
        ({"prompts": many, "most_jobs": 2}, r"many\.txt has 3 prompts, and --most_jobs is 2; give --most_jobs 3 or"),
        ({"host": "0.0.0.0"}, "accepts other machines, which requires --api_key_file"),
        ({"api_key_file": short}, "must hold one key of at least 16 ASCII characters"),
        ({"api_key_file": tmp_path / "none"}, "cannot read --api_key_file"),
        ({"posts_per_minute": -1}, r"--posts_per_minute must lie in \[0, 1e\+06\], 0 for no limit"),
        ({"preview_every": -1}, r"--preview_every must lie in \[0, 10000\]"),
        ({"port": 70000}, r"--port must lie in \[0, 65535\]"),
        ({"output.path": "a.mp4"}, "is not used by serve.py"),
    ):
        with pytest.raises(UserError, match=said):
            arguments.read(words(wan_folder, tmp_path / "out", **settings))
    short.write_text(f"{KEY}\n")
    assert arguments.read(words(wan_folder, tmp_path, host="0.0.0.0", api_key_file=short)).key == KEY
    with pytest.raises(UserError, match=r"^cannot write to the folder .*/many\.txt/out: .*/many\.txt is not a folder$"):
        serve.run(arguments.read(words(wan_folder, many / "out")))  # not --out, which this command does not have
    with pytest.raises(UserError, match="holds no factors of a preview"):
        jobs_of(wan_folder, tmp_path / "out", preview_factors=short)
    with serve.listening("127.0.0.1", 0) as sock, pytest.raises(UserError, match="choose another --port"):
        with serve.listening("127.0.0.1", sock.getsockname()[1]):
            pass
