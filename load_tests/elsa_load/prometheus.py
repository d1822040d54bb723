"""A real Prometheus server for the time of a run: it scrapes both sides and computes the gain a second time."""

from __future__ import annotations

import json
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml

from elsa_load.processes import Program
from elsa_serve.errors import ElsaError

SETTLE_S = 30.0  # patience with a Prometheus on a busy machine
PHASES = ("prefill", "decode", "end_to_end")


def missing() -> str | None:
    """Why there is no Prometheus here, or None."""
    if shutil.which("prometheus") is None:
        return "no `prometheus` program on the PATH (Debian: apt install prometheus)"
    return None


class Prometheus:
    """A context manager. `targets`: side -> base URL of a server with /metrics; `api_keys`: side -> key it wants."""

    def __init__(
        self,
        targets: Mapping[str, str],
        folder: Path,
        *,
        interval_s: float = 1.0,
        api_keys: Mapping[str, str | None] | None = None,
    ) -> None:
        self.targets, self.folder, self.interval_s = dict(targets), folder, interval_s
        self._api_keys = dict(api_keys or {})
        self._stack = ExitStack()

    def __enter__(self) -> Prometheus:
        self.folder.mkdir(parents=True, exist_ok=True)
        rules = self._stack.enter_context(as_file(files("elsa_load") / "gain_rules.yml"))
        config = self.folder / "prometheus.yml"
        config.touch(mode=0o600)  # it may hold keys
        config.write_text(yaml.safe_dump(self._config(rules), sort_keys=False))
        command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            "--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        program = Program(command, self.folder / "prometheus.log", ready_paths=("/-/ready",), startup_s=60, stop_s=30)
        try:
            self.url = self._stack.enter_context(program).url
            self._wait_for_targets()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _config(self, rules: Path) -> dict[str, Any]:
        interval = f"{round(self.interval_s * 1000)}ms"
        return {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": [str(rules)],
            "scrape_configs": [self._job(side, url) for side, url in self.targets.items()],
        }

    def _job(self, side: str, url: str) -> dict[str, Any]:
        parts = urllib.parse.urlsplit(url)
        job: dict[str, Any] = {
            "job_name": f"elsa-{side}",
            "scheme": parts.scheme,
            "static_configs": [{"targets": [parts.netloc], "labels": {"side": side}}],
        }
        key = self._api_keys.get(side)
        return job | ({"authorization": {"credentials": key}} if key else {})

    def _wait_for_targets(self) -> None:
        until = time.monotonic() + 30 + 5 * self.interval_s
        while self.value("count(elsa:prefill_seconds:sum)") != len(self.targets):
            if time.monotonic() > until:
                raise ElsaError(f"Prometheus does not see both sides' metrics: {self.value('sum(up)')} of them are up")
            time.sleep(self.interval_s / 2)

    def settle(self) -> float:
        """Wait until all that has happened is scraped and the rules have seen it. Returns a time to query at.

        Raises ElsaError where Prometheus does not get that far.
        """
        for series in ("up", "elsa:prefill_seconds:count"):
            self._wait_for(series, time.time())
        return time.time()

    def _wait_for(self, series: str, after: float) -> None:
        """Wait for a sample of each side that is younger than `after`."""
        until = time.monotonic() + SETTLE_S + 5 * self.interval_s
        while (self.value(f"count(timestamp({series}) > {after:.3f})") or 0) < len(self.targets):
            if time.monotonic() > until:
                raise ElsaError(f"Prometheus has had no new {series} for {SETTLE_S:.0f} s; its log: {self.folder}")
            time.sleep(self.interval_s / 2)

    def value(self, query: str, at: float | None = None) -> float | None:
        """The single number that a query gives; None where it gives none."""
        fields = {"query": query} | ({"time": f"{at:.3f}"} if at is not None else {})
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode(fields)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=30) as response:
                result = json.load(response)["data"]["result"]
        except OSError as error:
            raise ElsaError(f"Prometheus did not answer {query!r}: {error}") from error
        return float(result[0]["value"][1]) if result else None

    def growth(self, series: str, side: str, start: float, end: float) -> str:
        """The PromQL of how much a recorded sum grew between two times (seconds since the epoch)."""
        selected = f'{series}{{side="{side}"}}'
        return f"sum({selected} @ {end:.3f} - {selected} @ {start:.3f})"

    def seconds(
        self, phase: str, start: float, end: float, requests: int
    ) -> tuple[dict[str, float] | None, str | None]:
        """What each side's `requests` took between two settled times, computed by Prometheus; or None and why not."""
        found = {}
        for side in self.targets:
            seen = self.value(self.growth(f"elsa:{phase}_seconds:count", side, start, end), end)
            if seen is None or round(seen) != requests:
                return None, f"Prometheus saw {seen} of {requests} requests on the {side} side"
            spent = self.value(self.growth(f"elsa:{phase}_seconds:sum", side, start, end), end)
            if not spent:
                return None, f"Prometheus has no time of this phase on the {side} side"
            found[side] = spent
        return found, None
