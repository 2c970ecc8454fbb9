"""Files of deploy/ against the project: they parse, their commands are read, their versions are exact, and they agree with one another."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.arguments import serve
from launch.serving.guard import OPEN_PATHS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GPU = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
[_, SERVICE, JOB] = yaml.safe_load_all((DEPLOY / "kuberay/serve.yaml").read_text())
SBATCH = (DEPLOY / "slurm/serve.sbatch").read_text()


def instruction(name: str) -> list[str]:
    """The words of the Dockerfile's last instruction of this name, whose value is a list."""
    text = DOCKERFILE.replace("\\\n", " ")
    return yaml.safe_load(re.findall(rf"^(?:.* )?{name} (\[.*\])$", text, re.M)[-1])


def commands() -> dict[str, list[str]]:
    """The words after `freespec serve` of every file, with what a person or the shell puts in."""
    _, _, *entry = instruction("ENTRYPOINT")
    sbatch = re.findall(r"freespec serve (.*?) &$", SBATCH.replace("\\\n", " "), re.M | re.S)[0]
    usage = re.findall(r"serve\.sbatch (--config.*)$", SBATCH, re.M)[0]
    put_in = {
        "$@": usage,
        "$address:$ray_port": "10.0.0.1:20001",
        "$address": "10.0.0.1",
        "$SLURM_NNODES": "4",
        "$gpus": "8",
    }
    for name, value in put_in.items():
        sbatch = sbatch.replace(f'"{name}"', value)
    gpu = [word.replace("${FREESPEC_GPUS:-1}", "8") for word in GPU["services"]["freespec"]["command"]]
    return {
        "image": entry + instruction("CMD"),
        "compose": entry + COMPOSE["services"]["freespec"]["command"],
        "compose on GPUs": entry + gpu,
        "slurm": shlex.split(sbatch),
        "kuberay": shlex.split(JOB["spec"]["entrypoint"])[2:],
    }


@pytest.mark.parametrize("name", ["image", "compose", "compose on GPUs", "slurm", "kuberay"])
def test_the_service_reads_every_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = commands()[name]
    key = tmp_path / "key"
    key.write_text("k" * 32)
    words[words.index("--api_key_file") + 1] = str(key)
    monkeypatch.setattr(serve, "check_model", lambda _: None)  # published weights are not here
    read = serve.read(words)
    assert read.key is not None
    assert not serve.is_loopback(read.host)
    assert read.port == 8000
    if name in ("slurm", "kuberay"):
        assert (read.options.ray is not None, read.options.ranks) == (True, 8)


def test_negative_control_wrong_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="api_key"):
        serve.read([*commands()["image"], "--api_keys", "x"])


def images(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [
            found for key, value in tree.items() for found in ([value] if key in ("image", "BASE") else images(value))
        ]
    return [found for each in tree for found in images(each)] if isinstance(tree, list) else []


def test_versions_are_exact() -> None:
    foreign = re.findall(r"^ARG BASE=(.*)$", DOCKERFILE, re.M) + images([COMPOSE, GPU, JOB])
    foreign = [name for name in foreign if not name.startswith("freespec-engine:")]  # built here
    assert len(foreign) == 6
    assert [name for name in foreign if not re.search(r":v?\d+\.\d+[\w.-]*$", name)] == []
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == constraints["ray"]
    assert DOCKERFILE.count("constraints.txt") == 3  # copied, torch, the rest


def test_the_files_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extras] = re.findall(r"^ARG EXTRAS=(.*)$", DOCKERFILE, re.M)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert "freespec" in project["scripts"]
    sources = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    packages = {
        pattern.rstrip("*")
        for pattern in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"][
            "include"
        ]
    }
    assert packages | {
        project["readme"],
        *project["license-files"],
        "constraints.txt",
        "setup.py",
        "configs",
        "tiny",
    } <= set(sources)

    assert re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M) == ["8000"]
    assert re.findall(r"^USER (\d+)$", DOCKERFILE, re.M) == ["10001"]
    assert JOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] == 10001
    assert re.findall(r"127\.0\.0\.1:8000(/\w+)", DOCKERFILE)[0] in OPEN_PATHS
    key = instruction("ENTRYPOINT")[-1]
    [scrape] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["authorization"]["credentials_file"] == key == f"/run/secrets/{next(iter(COMPOSE['secrets']))}"
    assert scrape["static_configs"] == [{"targets": ["freespec:8000"]}]
    assert all(port.startswith("127.0.0.1:") for each in COMPOSE["services"].values() for port in each["ports"])
    assert all(each["secrets"] == list(COMPOSE["secrets"]) for each in COMPOSE["services"].values())

    head = JOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert SERVICE["spec"]["selector"].items() <= head["metadata"]["labels"].items()
    workers = [group["replicas"] for group in JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    assert f"--replicas {sum(workers)} " in JOB["spec"]["entrypoint"]


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "slurm/serve.sbatch"], check=True)
