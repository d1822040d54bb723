"""Where there is no Prometheus: its scrapes are kept in a file, from which a real one computes the gain elsewhere.

`Recorder` stands in for `Prometheus` during the run. `replayed` loads its file into a real Prometheus: promtool makes
blocks of the samples and of the recording rules over them, and the server answers the same queries as it would have.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

from elsa_load.pages import Page
from elsa_load.processes import Program
from elsa_load.prometheus import Prometheus
from elsa_serve.errors import ElsaError, UsageError

EVALUATED_S = 1  # between two evaluations of the rules in a replay
FILE = "scrapes.om"  # OpenMetrics text with timestamps
FAMILIES = (
    "elsa_time_to_first_token_seconds", "elsa_request_decode_seconds", "elsa_request_duration_seconds",
    "vllm:time_to_first_token_seconds", "vllm:request_decode_time_seconds", "vllm:e2e_request_latency_seconds",
)  # fmt: skip
SAMPLES = frozenset(f"{family}_{part}" for family in FAMILIES for part in ("sum", "count"))


class Recorder:
    """A context manager. `targets`: side -> base URL of a server with /metrics, which must not want a key."""

    def __init__(self, targets: Mapping[str, str], file: Path, interval_s: float = 1.0) -> None:
        self._targets, self._file, self._interval_s = dict(targets), file, interval_s
        self._series: dict[str, dict[str, list[tuple[float, float]]]] = {}  # name -> labels -> (time, value)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrapes", daemon=True)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.settle()  # a replay evaluates no rule after the last sample
        self._write()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._scrape()

    def _scrape(self) -> None:
        with self._lock:
            for side, url in self._targets.items():
                now = time.time()
                try:
                    with self._opener.open(f"{url}/metrics", timeout=10) as response:
                        page = Page.parse(response.read().decode())
                except OSError:
                    continue  # as a Prometheus would: there is no sample of this moment
                for name, labels, value in page.samples:
                    if name in SAMPLES:
                        text = ",".join(f'{k}="{_escaped(v)}"' for k, v in (labels | {"side": side}).items())
                        self._series.setdefault(name, {}).setdefault(text, []).append((now, value))

    def settle(self) -> float:
        """Scrape once more, and wait until a replay has evaluated the rules over it. Returns a time to query at."""
        self._scrape()
        time.sleep(EVALUATED_S + 0.1)
        self._scrape()
        return time.time()

    def seconds(
        self, phase: str, start: float, end: float, requests: int
    ) -> tuple[dict[str, float] | None, str | None]:
        return None, f"recorded in {FILE}, for a Prometheus elsewhere"

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        earlier = self._file.read_text().removesuffix("# EOF\n") if self._file.exists() else ""
        with self._file.open("w") as out:
            out.write(earlier)
            for name, by_labels in self._series.items():
                for labels, samples in by_labels.items():
                    out.writelines(f"{name}{{{labels}}} {value!r} {at:.3f}\n" for at, value in samples)
            out.write("# EOF\n")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Replayed(Prometheus):
    """A real Prometheus over recorded scrapes."""

    def __init__(self, sides: tuple[str, ...], url: str, folder: Path) -> None:
        super().__init__(dict.fromkeys(sides, ""), folder)
        self.url = url


@contextmanager
def replayed(file: Path, sides: tuple[str, ...], folder: Path) -> Iterator[Replayed]:
    """Load a recorder's file into a real Prometheus in `folder`, which is emptied. Raises UsageError, ElsaError."""
    if not file.exists():
        raise UsageError(f"{file} is missing: there is nothing to replay")
    for program in ("prometheus", "promtool"):
        if shutil.which(program) is None:
            raise UsageError(f"no `{program}` program on the PATH (Debian: apt install prometheus)")
    shutil.rmtree(folder, ignore_errors=True)
    data = folder / "data"
    data.mkdir(parents=True)
    config = folder / "prometheus.yml"
    config.write_text("{}\n")
    _promtool("tsdb", "create-blocks-from", "openmetrics", str(file), str(data))
    times = [float(line.rsplit(" ", 1)[1]) for line in file.read_text().splitlines() if not line.startswith("#")]
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}", "--log.level=warn"]
    # Recorded earlier, perhaps long ago: nothing may be thrown away for its age.
    command += ["--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=100y"]
    with (
        as_file(files("elsa_load") / "gain_rules.yml") as rules,
        Program(command, folder / "log", ready_paths=("/-/ready",), startup_s=60, stop_s=30) as server,
    ):
        span = [
            f"--start={math.floor(min(times))}",
            f"--end={math.ceil(max(times))}",
            f"--eval-interval={EVALUATED_S}s",
        ]
        made = [f"--url={server.url}", f"--output-dir={data}"]
        _promtool("tsdb", "create-blocks-from", "rules", *span, *made, str(rules))
        server.restart()  # takes up the new blocks
        yield Replayed(sides, server.url, folder)


def _promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ElsaError(f"promtool {' '.join(arguments[:3])} failed: {(done.stderr or done.stdout).strip()[-1500:]}")
