"""Servers and other programs that a benchmark starts, waits for, and stops."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

from elsa_serve.errors import ElsaError

LOG_TAIL = 1500  # characters of a failed program's log in the error


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def elsa_serve_command(model: Path | str, flags: Sequence[str] = (), python: Path | str = sys.executable) -> list[str]:
    """`elsa-serve serve` under an interpreter (default: this one), with a place for the port."""
    return [str(python), "-m", "elsa_serve", "serve", str(model), *flags, "--port", "{port}"]


def split_command(text: str) -> list[str]:
    return shlex.split(text)


class Program:
    """A program that listens on a port of 127.0.0.1. `{port}` in its command becomes the number.

    A context manager; `restart` stops it and starts it on the same port. `ready_paths`: it is ready when one of them
    answers 200. Raises ElsaError, with the end of its log, where it does not come up.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        ready_paths: Sequence[str] = ("/readyz", "/health"),
        startup_s: float = 1800.0,
        stop_s: float = 90.0,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [part.replace("{port}", str(self.port)) for part in command]
        self.log, self._ready_paths, self._startup_s, self._stop_s = log, ready_paths, startup_s, stop_s
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def __enter__(self) -> Program:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            try:
                self._process = subprocess.Popen(self.command, stdout=out, stderr=subprocess.STDOUT)
                self._asked = False
            except OSError as error:
                raise ElsaError(f"cannot start {self.command[0]}: {error.strerror}") from error

    def wait_ready(self) -> None:
        assert self._process is not None
        until = time.monotonic() + self._startup_s
        while not any(answers(self.url + path) for path in self._ready_paths):
            code = self._process.poll()
            if code is not None:
                raise ElsaError(f"{shlex.join(self.command)} ended with status {code}:\n{self.log_tail()}")
            if time.monotonic() > until:
                raise ElsaError(f"{shlex.join(self.command)} was not ready in {self._startup_s:.0f} s; log: {self.log}")
            time.sleep(0.1)

    def ask_to_stop(self) -> None:
        """SIGTERM, once: some programs end at once, their work undone, at a second."""
        if self._process is not None and self._process.poll() is None and not self._asked:
            self._process.send_signal(signal.SIGTERM)
            self._asked = True

    def stop(self) -> int | None:
        """SIGTERM, then SIGKILL. Returns the exit status."""
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            self.ask_to_stop()
            try:
                process.wait(self._stop_s)
            except subprocess.TimeoutExpired:
                process.kill()
        self._process = None
        return process.wait()

    def restart(self) -> int | None:
        code = self.stop()
        self.start()
        self.wait_ready()
        return code

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL:]


def stop_all(programs: Iterable[Program]) -> None:
    """All at the same time: a server of vLLM's takes seconds to end."""
    running = list(programs)
    for program in running:
        program.ask_to_stop()
    for program in running:
        program.stop()


def answers(url: str) -> bool:
    """Whether a GET is answered with 200. No proxy of the environment is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False
