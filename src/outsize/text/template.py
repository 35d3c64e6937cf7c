"""Chat templates, rendered where they can do no harm: in a process of its own (`template_child.py`).

One such process serves all renders of this one; it is started with the first.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from outsize.errors import OptionError, TemplateError

MAX_TEXT = 8 << 20  # characters of all rendered chats
MAX_LINE = 6 * MAX_TEXT  # of a reply, in which a character is written as up to six
MAX_SAID = 1 << 20  # characters of what the process says at its end
TIME_LIMIT_S = 10
# What the process gets of the environment: the time zone, and where an interpreter's own libraries are
# (modules of clusters, toolchains of build services).
PASSED = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
CHILD = Path(__file__).with_name("template_child.py")
Message = Mapping[str, object]
Messages = Sequence[Message]


def render(
    template: str, chats: Sequence[Messages], names: Mapping[str, object], unfinished: bool = False
) -> list[str]:
    """The prompt of each chat, ready for the model's reply; if `unfinished`, for more of the last message,
    which has a text. `names` are the template's variables beside the messages. Raises TemplateError."""
    variables = {
        "tools": None, "documents": None, **names, "add_generation_prompt": not unfinished,
    }  # fmt: skip
    job = {
        "unfinished": unfinished,
        "template": template, "chats": [[dict(m) for m in c] for c in chats], "names": variables,
        "seconds": TIME_LIMIT_S, "most": MAX_TEXT,
    }  # fmt: skip
    try:
        json.dumps(job["chats"]), json.dumps(variables)
    except (TypeError, ValueError, RecursionError) as e:
        raise OptionError(f"messages and template arguments must be JSON: {e}") from None
    reply = _worker.ask(job)
    if "refusal" in reply:
        said = " ".join(str(reply["refusal"]).split())
        raise TemplateError(f"the model's chat template refuses these messages: {said}")
    if "error" in reply:
        raise TemplateError(
            f"the chat template failed: {reply['error']}; use --raw to do without it"
        )
    texts: list[str] = reply["texts"]
    return texts


def pythons() -> Iterator[str]:
    """Interpreters of this version: this one, or, inside another program, the one it was built from."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.executable and Path(sys.executable).name.startswith(("python", "pypy")):
        yield sys.executable
    folders = [Path(sys.prefix, "bin"), Path(sys.base_prefix, "bin")]
    folders += [Path(bindir)] if (bindir := sysconfig.get_config_var("BINDIR")) else []
    yield from (str(f / version) for f in folders if (f / version).is_file())
    yield from (str(p) for p in (Path(sys.base_prefix, "python.exe"),) if p.is_file())


class Worker:
    """The rendering process, started when it is needed and again when it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, job: Mapping[str, object]) -> dict[str, Any]:
        """One job, one reply. Raises TemplateError."""
        with self._lock:
            line = self._alone(job)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _alone(self, job: Mapping[str, object]) -> str:
        """With the lock held."""
        try:
            return self._exchanged(job)
        except BaseException:  # interrupted: its reply must not become another's
            self.close()
            raise

    def _exchanged(self, job: Mapping[str, object]) -> str:
        """The reply's line; asked once more if the process had just ended for want of work."""
        text = json.dumps(job)
        for is_last in (False, True):
            process = self._running()
            line, is_late = _exchange(process, text)
            if len(line) > MAX_LINE:
                self.close()
                raise TemplateError(f"the chat template made more than {MAX_TEXT:,} characters")
            if line.endswith("\n"):
                return line
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
            if is_late or is_last or process.returncode != 0:
                break
            self.close()
        process.kill()
        said, status = _last_words(process), process.wait()
        self.close()
        raise TemplateError(
            f"the chat template ran longer than {TIME_LIMIT_S} s"
            if is_late
            else f"the chat template's process ended with status {status}{said}"
        )

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = _start()
        return self._process

    def close(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        process.wait()


def _start() -> subprocess.Popen[str]:
    """Isolated from this process's environment, but with its search path: what it can import, the other can,
    however it was installed."""
    path = json.dumps([p for p in sys.path if os.path.isabs(p)])
    python = next(pythons(), None)
    if python is None:
        raise TemplateError(
            "chat templates are rendered in a Python process of their own, and no Python "
            f"{sys.version_info[0]}.{sys.version_info[1]} was found beside {sys.prefix}; use --raw"
        )
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            [python, "-I", "-S", str(CHILD), path], stdin=pipe, stdout=pipe, stderr=pipe,
            text=True, encoding="utf-8", env={k: v for k, v in os.environ.items() if k in PASSED},
            start_new_session=True,  # a terminal's Ctrl-C is this process's, from the first moment
        )  # fmt: skip
    except OSError as e:
        raise TemplateError(
            f"the chat template's process cannot start: {python}: {e.strerror}"
        ) from None


def _exchange(process: subprocess.Popen[str], job: str) -> tuple[str, bool]:
    """The reply, or nothing; and whether time ran out."""
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(TIME_LIMIT_S, stop)
    timer.start()
    try:
        process.stdin.write(job + "\n")
        process.stdin.flush()
        return process.stdout.readline(MAX_LINE + 1), late.is_set()
    except OSError:
        with suppress(OSError):  # it may have said why before it read
            return process.stdout.readline(MAX_LINE + 1), late.is_set()
        return "", late.is_set()
    finally:
        timer.cancel()


def _last_words(process: subprocess.Popen[str]) -> str:
    with suppress(OSError, ValueError):
        process.wait(TIME_LIMIT_S)
        said = process.stderr.read(MAX_SAID) if process.stderr is not None else ""
        lines = said.strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""
    return ""


def _after_fork() -> None:
    """A fork has no part in its parent's process, nor in a lock that another thread held."""
    global _worker
    _inherited.append(_worker)  # kept, so that nothing ends the parent's
    _worker = Worker()


_worker, _inherited = Worker(), list[Worker]()
atexit.register(lambda: _worker.close())
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
