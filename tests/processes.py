"""Fresh processes that do not pay for the import of Lightning: forks of one that has done nothing else.

An interpreter of its own, which takes seconds, is left to the tests of the import itself and to those whose processes
start each other.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]


def run_fresh(*words: str, path: Path | None = None, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Runs ``python WORDS`` in a process that has imported ``lightning_optim`` and no more; waits for what it starts.

    Args:
        words: ``-c CODE ...``, ``-m MODULE ...`` or ``SCRIPT ...``.
        path: Where packages are looked for first.
        timeout: Seconds after which it is killed.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "stdout", Path(folder) / "stderr"]
        request = {
            "words": words,
            "path": str(path) if path else None,
            "timeout": timeout,
            "environment": {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
            "folder": os.getcwd(),
            "files": [str(file) for file in files],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess(words, status, *(file.read_text() for file in files))


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.processes"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.terminate)
    return server


def _serve(requests: IO[str], answers: IO[str]) -> None:
    import torch

    import lightning_optim as lightning_optim

    torch.set_num_threads(1)  # a fork keeps no other thread
    for line in requests:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(request)
        _, status = os.waitpid(child, 0)
        # What it has started belongs to its group, and may still be at work.
        with suppress(ProcessLookupError):
            for _ in range(100):
                os.killpg(child, 0)
                time.sleep(0.1)
            os.killpg(child, signal.SIGKILL)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _become(request: dict[str, Any]) -> None:
    """Does what is asked, as the interpreter does with its command line, and exits."""
    status = 1
    try:
        os.setpgrp()
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        for file, descriptor in zip(request["files"], (1, 2), strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = (open(descriptor, "w", 1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115
        signal.alarm(request["timeout"])
        if request["path"]:
            sys.path.insert(0, request["path"])
        first, *rest = request["words"]
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
