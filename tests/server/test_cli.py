"""`elsa-serve serve` as a process: its line, its signals, its exit status; and the flags it refuses."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from elsa_server.cli import add_command, settings_from

from elsa_serve.cli import Parser
from elsa_serve.errors import UsageError

# The command as it is, with the tests' engine where the real one would be imported.
PROGRAM = """
import sys, time, types
sys.path.insert(0, {tests!r})
from fake_engine import FakeEngine
from elsa_serve.errors import CheckpointError
from elsa_serve.cli import Parser
from elsa_server.cli import add_command

def engine(model, *, name, sink, **options):
    if model.name == "broken":
        raise CheckpointError(f"{{model}}: no config.json")
    if model.name == "slow":
        from concurrent.futures import ThreadPoolExecutor
        ThreadPoolExecutor(1).submit(time.sleep, 300).result()  # as the pools of a compiler or of readers
    return FakeEngine(sink=sink)

sys.modules["elsa_serve.offload.engine"] = types.SimpleNamespace(OffloadEngine=engine)
parser = Parser(prog="elsa-serve")
add_command(parser.add_subparsers(parser_class=Parser))
args = parser.parse_args(sys.argv[1:])
try:
    sys.exit(args.run(args))
except CheckpointError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def launch(model: Path, **environment: str) -> subprocess.Popen[str]:
    model.mkdir()
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", program, "serve", str(model), "--port", "0"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def parse(*flags: str) -> argparse.Namespace:
    parser = Parser(prog="elsa-serve")
    commands = parser.add_subparsers(parser_class=Parser)
    add_command(commands)
    commands.choices["serve"].set_defaults(parser=commands.choices["serve"])
    return parser.parse_args(["serve", *flags])


def wait_ready(url: str) -> None:
    for _ in range(600):
        if httpx.get(url + "/readyz").status_code == 200:
            return
        threading.Event().wait(0.05)
    raise AssertionError("the server did not become ready")


def test_serve_drain_exit(tmp_path: Path) -> None:
    """SIGTERM during an answer: the answer is finished, the exit status is 0."""
    with launch(tmp_path / "model", ELSA_API_KEY="k1,k2") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Listening on http://127.0.0.1:")
        url = line.split()[-1]
        wait_ready(url)
        headers = {"Authorization": "Bearer k2"}
        body = {"model": "model", "prompt": "slow " * 10, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, headers=headers, timeout=20) as answer:
            process.send_signal(signal.SIGTERM)
            assert answer.read().decode().count(" slow") == 10
        metrics = process.communicate(timeout=20)
        assert process.returncode == 0, metrics
        assert "k1" not in metrics[1]
        assert "Traceback" not in metrics[1]


def test_a_broken_checkpoint_ends_the_process_with_its_reason(tmp_path: Path) -> None:
    with launch(tmp_path / "broken") as process:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 2
        assert errors.strip().splitlines()[-1] == f"{tmp_path}/broken: no config.json"
        assert "Traceback" not in errors


def test_a_signal_ends_a_server_that_still_loads(tmp_path: Path) -> None:
    with launch(tmp_path / "slow") as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert httpx.get(url + "/readyz", timeout=60).json()["error"]["code"] == "loading"
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0
        assert "stopped while the model was loading" in errors


def test_flags_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst\n\n second \n")
    monkeypatch.setenv("ELSA_API_KEY", "third")
    flags = ["m", "--api-key-file", str(keys), "--max-body", "1MiB", "--cors-origin", "https://a", "--open-metrics"]
    settings = settings_from(parse(*flags, "--served-model-name", "a", "--served-model-name", "b"))
    assert settings.api_keys == ("third", "first", "second")
    assert (settings.max_body_bytes, settings.cors_origins, settings.open_metrics) == (1 << 20, ("https://a",), True)
    assert settings.served_names == ("a", "b")
    assert (settings.max_sequences, settings_from(parse("m", "--max-queue", "500")).max_sequences) == (64, 128)
    assert "first" not in repr(settings)
    assert settings_from(parse("some/dir/model")).served_names == ("model",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--max-queue", "0"], "--max-queue is 0"),
        (["--drain-timeout", "-1"], "--drain-timeout is -1"),
        (["--request-timeout", "0"], "--request-timeout is 0"),
        (["--max-body", "much"], "not a size"),
        (["--cors-origin", "*"], "name the origins"),
        (["--api-key-file", "/nonexistent"], "cannot read --api-key-file /nonexistent"),
        (["--api-key-file", os.devnull], "has no key"),
    ],
)
def test_bad_values_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_from(parse("m", *flags))


def test_an_engine_named_too_late_is_refused() -> None:
    from elsa_server.cli import run

    with pytest.raises(UsageError, match="on the command line"):
        run(parse("m", "--engine", "vllm"))


def test_a_port_in_use_is_a_usage_error(running: Any, tmp_path: Path) -> None:
    from elsa_server.cli import run

    port = running.url.rsplit(":", 1)[1]
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}"):
        run(parse(str(tmp_path), "--port", port))
    with pytest.raises(UsageError, match="no such model directory"):
        run(parse(str(tmp_path / "nothing"), "--port", port))  # at once: before the port is taken, and anything loaded


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        parse("m", "--drain-timeou", "3")
    assert exit_status.value.code == 2
    assert "--drain-timeout" in capsys.readouterr().err
