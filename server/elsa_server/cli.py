"""`elsa-serve serve MODEL_DIR`: load a model behind the HTTP server, and drain cleanly when told to stop."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from elsa_serve.arguments import (
    add_engine_arguments,
    add_memory_arguments,
    add_model_arguments,
    check_model,
    engine_options,
)
from elsa_serve.envs import api_keys
from elsa_serve.errors import UsageError
from elsa_serve.metrics import LogSink, Metrics, Tee
from elsa_serve.offload.units import parse_size
from elsa_serve.protocol import Engine
from elsa_serve.stats import EngineStarted, MetricsSink
from elsa_server.settings import MAX_SEQUENCES, Settings

HELP = "serve a model over HTTP, compatible with the OpenAI API"
EPILOG = """\
examples:
  elsa-serve serve ./llama-13b --gpu-memory 24GiB --context 32768
  elsa-serve serve ./tiny --port 0 --resident-layers 0 --keep-alive-interval 5
  ELSA_API_KEY=secret elsa-serve serve ./llama-13b --host 0.0.0.0

SIGTERM and Ctrl-C drain: /readyz turns 503 at once, new requests are refused, open ones may finish. Twice: stop now.
"""
LOG_LEVELS = ("debug", "info", "warning", "error")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

logger = logging.getLogger("elsa_server")


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help=HELP, description=HELP, epilog=EPILOG, allow_abbrev=False)
    add_model_arguments(parser)
    add_memory_arguments(parser)
    add_engine_arguments(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=run)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add = group.add_argument
    add(
        "--engine",
        choices=("elsa", "vllm"),
        default="elsa",
        help="elsa: the engine that streams layers (default). vllm: vLLM's server with ELSA attention; all other flags "
        "are vLLM's then, and --config is a YAML file of its flags, such as configs/vllm-llama-13b-32k.yaml",
    )
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: 127.0.0.1)")
    add(
        "--port",
        type=int,
        default=8000,
        help="0 takes a free one; the line 'Listening on URL' names it (default: 8000)",
    )
    add(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="id that clients ask for; repeatable, answers carry the first (default: the directory's name)",
    )
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="accepted API keys, one a line; or set ELSA_API_KEY, comma-separated (default: no authentication)",
    )
    add("--open-metrics", action="store_true", help="let /metrics be read without an API key")
    add(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="web origin that may call from a browser, such as https://example.org; repeatable (default: none)",
    )
    add(
        "--max-queue",
        type=int,
        default=64,
        metavar="N",
        help="requests that may wait; more are answered 503 with Retry-After (default: 64)",
    )
    add(
        "--request-timeout",
        type=float,
        metavar="SECONDS",
        help="longest life of a request, queueing included (default: no limit)",
    )
    add("--max-body", default="8MiB", metavar="SIZE", help="largest request body; over it: 413 (default: 8MiB)")
    add(
        "--keep-alive-interval",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="comment sent in a silent stream, so that no proxy cuts a long prefill; 0: none (default: 15)",
    )
    add(
        "--drain-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="patience for open requests after SIGTERM (default: 60)",
    )
    add(
        "--stall-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="/readyz turns 503 when requests run and the engine gives no sign of life this long (default: 300)",
    )
    add("--log-level", choices=LOG_LEVELS, default="info", help="what goes to standard error (default: info)")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it. Raises UsageError for flags, checkpoints and budgets that cannot work."""
    if args.engine != "elsa":  # the command line alone is looked at for it, before any flag is parsed
        raise UsageError(f"engine: {args.engine} in a --config file comes too late: give --engine on the command line")
    check_model(args)
    settings = settings_from(args)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if not settings.api_keys and args.host not in LOCAL_HOSTS:
        logger.warning("listening on %s without an API key: anyone who reaches it can use it", args.host)
    try:
        from elsa_server.running import serve
    except ImportError as error:
        raise UsageError(f"the server needs its extra packages: pip install 'elsa-serve[server]' ({error})") from error
    listener = bind(args.host, args.port)
    metrics = Metrics()
    sink = Tee(metrics, LogSink())
    engine: Future[Engine] = Future()
    loader = threading.Thread(target=load, args=(args, settings, sink, engine), name="elsa-load", daemon=True)
    loader.start()
    with listener:
        serve(listener, engine, settings, metrics, sink)
    return finish(engine)


def settings_from(args: argparse.Namespace) -> Settings:
    for flag, least in (("max_queue", 1), ("keep_alive_interval", 0), ("drain_timeout", 0), ("stall_timeout", 1)):
        if getattr(args, flag) < least:
            raise UsageError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}: it must be at least {least}")
    if args.request_timeout is not None and args.request_timeout <= 0:
        raise UsageError(f"--request-timeout is {args.request_timeout}: it must be more than 0")
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port is {args.port}: it must be 0 … 65535")
    if "*" in (args.cors_origin or ()):
        raise UsageError("--cors-origin '*' would let every web site use this server: name the origins")
    return Settings(
        served_names=tuple(args.served_model_name or (args.model.resolve().name,)),
        api_keys=(*api_keys(), *keys_of(args.api_key_file)),
        open_metrics=args.open_metrics,
        cors_origins=tuple(args.cors_origin or ()),
        keep_alive_interval_s=args.keep_alive_interval,
        drain_timeout_s=args.drain_timeout,
        stall_timeout_s=args.stall_timeout,
        request_timeout_s=args.request_timeout,
        max_body_bytes=parse_size(str(args.max_body)),
        max_sequences=min(MAX_SEQUENCES, args.max_queue),
    )


def keys_of(path: Path | None) -> tuple[str, ...]:
    """The keys of a file. One without any is refused, since it would leave the server open."""
    if path is None:
        return ()
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --api-key-file {path}: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UsageError(f"--api-key-file {path} has no key: put one on a line")
    return keys


def bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot listen on {host} port {port}: {reason}; choose another --port, or 0") from error


def load(args: argparse.Namespace, settings: Settings, sink: MetricsSink, future: Future[Engine]) -> None:
    """Fill `future` with the engine, or with the reason why there is none. Runs on a thread of its own."""
    start = time.monotonic()
    try:
        from elsa_serve.offload import machine
        from elsa_serve.offload.engine import OffloadEngine  # torch and transformers, seconds to import

        name = settings.served_names[0]
        engine = OffloadEngine(args.model, name=name, sink=sink, max_queue=args.max_queue, **engine_options(args))
        engine.tokenizer.encode("elsa")  # its first use sets it up, which is not safe from two threads at once
    except BaseException as error:
        future.set_exception(error)
        return
    info = engine.info
    seconds = time.monotonic() - start
    sink.record(EngineStarted(info.name, info.dtype, info.attention, info.max_context, seconds, machine.software()))
    logger.info("ready: %s, context %d, %s, loaded in %.1f s", info.name, info.max_context, info.dtype, seconds)
    future.set_result(engine)


def finish(engine: Future[Engine]) -> int:
    """Free the engine; raise why it never came, if it did not. While one still loads, the process ends here."""
    if not engine.done():
        logger.info("stopped while the model was loading")
        logging.shutdown()
        # The loader cannot be interrupted, and the interpreter would wait for its compilers and reading threads.
        os._exit(0)
    engine.result().shutdown()
    return 0
