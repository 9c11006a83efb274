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
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
#: Whether what takes minutes in several processes runs for every name: `make test-sharded`. Else for one of each kind.
EVERY = bool(os.environ.get("LIGHTNING_OPTIM_SHARDED_TESTS"))


def run_fresh(
    *words: str,
    path: Path | None = None,
    timeout: int = 300,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs ``python WORDS`` in a process that has imported ``lightning_optim`` and no more; waits for what it starts.

    Args:
        words: ``-c CODE ...``, ``-m MODULE ...`` or ``SCRIPT ...``.
        path: Where packages are looked for first.
        timeout: Seconds after which it is killed.
        ranks: Runs it in so many processes at once, for Trainers with as many devices: the ranks of one job, as a
            cluster would start them. If one fails, the others are killed. Their outputs are one.
        environment: Variables that were set before it imported anything.
    """
    server, (port,) = _server(tuple((environment or {}).items())), free_ports(1)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "stdout", Path(folder) / "stderr"]
        request = {
            "words": words,
            "path": str(path) if path else None,
            "timeout": timeout,
            "environments": [_variables(environment or {}, rank, ranks, port) for rank in range(ranks)],
            "folder": os.getcwd(),
            "files": [str(file) for file in files],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess(words, status, *(file.read_text() for file in files))


def _variables(given: Mapping[str, str], rank: int, ranks: int, port: str) -> dict[str, str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))), **given}
    if ranks > 1:
        variables |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return variables


def free_ports(count: int) -> list[str]:
    """Returns different ports that nobody listens at."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(server.getsockname()[1]) for server in servers]


@functools.cache
def _server(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.processes"],
        cwd=ROOT,
        env={**os.environ, **dict(environment)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.terminate)
    return server


def _serve(requests: IO[str], answers: IO[str]) -> None:
    import torch

    import lightning_optim as lightning_optim

    torch.set_num_threads(1)  # a fork keeps no other thread
    for line in requests:
        request = json.loads(line)
        children: list[int] = []
        for environment in request["environments"]:
            child = os.fork()
            if not child:
                _become(request, environment, children[0] if children else 0)
            children.append(child)
            os.setpgid(child, children[0])
        group, statuses = children[0], []
        while len(statuses) < len(children) and not any(statuses):
            statuses.append(_reap(group))
        # What they have started belongs to their group, and may still be at work; so may ranks that wait for one.
        with suppress(ProcessLookupError):
            for _ in range(100):
                os.killpg(group, 0)
                with suppress(ChildProcessError):
                    os.waitpid(-group, os.WNOHANG)
                time.sleep(0.1)
            os.killpg(group, signal.SIGKILL)
        with suppress(ChildProcessError):
            while True:
                _reap(group)
        answers.write(f"{statuses[-1]}\n")
        answers.flush()


def _reap(group: int) -> int:
    """Waits for a child of the group to end; returns its exit status."""
    _, status = os.waitpid(-group, 0)
    return os.waitstatus_to_exitcode(status)


def _become(request: dict[str, Any], environment: dict[str, str], group: int) -> None:
    """Does what is asked, as the interpreter does with its command line, and exits."""
    status = 1
    try:
        os.setpgid(0, group)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(environment)
        for file, descriptor in zip(request["files"], (1, 2), strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
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
