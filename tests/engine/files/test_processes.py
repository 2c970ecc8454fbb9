"""Whether the process that wrote a file still runs."""

import os
import signal
import subprocess
import sys

from engine.files.processes import is_running, start_time


def test_a_process_runs_until_it_has_ended_whether_or_not_it_was_waited_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = start_time(process.pid)
    assert is_running(process.pid)
    assert is_running(process.pid, started)
    assert not is_running(process.pid, started + 1)  # a later process of the same number
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    assert not is_running(process.pid)
    process.wait()
    assert not is_running(process.pid)


def test_this_process_runs() -> None:
    assert is_running(os.getpid(), start_time(os.getpid()))
