"""A process's end, whatever it leaves behind; how it can end in VBench's place is in test_run.py."""

import os
import sys
import threading
from pathlib import Path

from evaluation.vbench.process import run_process
from tests.evaluation.vbench.fake_vbench import ends


def test_what_a_process_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    script = f"import subprocess, sys; print(subprocess.Popen({sleeper}).pid, flush=True)"
    command = [sys.executable, "-c", script]
    log = tmp_path / "log"
    assert run_process(command, env=os.environ, log=log, time_limit=30, stop=threading.Event()) is None
    assert ends(int(log.read_text().split()[-1]))
