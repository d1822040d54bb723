"""What configs/ ships for monitoring, against the real programs where they are installed."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from elsa_load import prometheus
from elsa_load.processes import Program

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RULES = [CONFIGS / "prometheus" / "recording.yml", CONFIGS / "prometheus" / "alerts.yml"]
RULES.append(ROOT / "load_tests" / "elsa_load" / "gain_rules.yml")
RULE_TESTS = [CONFIGS / "prometheus" / "recording_test.yml", CONFIGS / "prometheus" / "alerts_test.yml"]
RULE_TESTS.append(Path(__file__).with_name("gain_rules_test.yml"))

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no `promtool` program on the PATH")
needs_prometheus = pytest.mark.skipif(prometheus.missing() is not None, reason=str(prometheus.missing()))


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", CONFIGS / "grafana" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def promtool(*arguments):
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_configuration_and_rules():
    promtool("check", "config", CONFIGS / "prometheus.yml")
    promtool("check", "rules", *RULES)


@needs_promtool
@pytest.mark.parametrize("file", RULE_TESTS, ids=lambda path: path.stem)
def test_rules_do_what_their_unit_tests_say(file):
    promtool("test", "rules", file)


def test_every_alert_has_a_unit_test_that_fires():
    alerts = [r["alert"] for group in yaml.safe_load(RULES[1].read_text())["groups"] for r in group["rules"]]
    tests = yaml.safe_load(RULE_TESTS[1].read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == set(alerts)


def test_dashboards_are_as_generated_and_query_what_is_exported(generate):
    assert generate.problems() == []


def test_a_query_of_a_metric_that_is_gone_is_noticed(generate):
    known = generate.exported()
    assert generate.unknown_metrics(["rate(elsa_no_such_total[5m])"], known) == {"elsa_no_such_total"}
    assert generate.unknown_metrics(["elsa_request_duration_seconds_bucket"], known) == set()
    assert generate.unknown_metrics(["elsa:offload_stall_ratio:rate5m"], known) == set()


def test_panels_do_not_overlap_and_have_ids_of_their_own(generate):
    for one in generate.dashboards().values():
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in one["panels"]]
        assert len(set(places)) == len(places)
        assert len({p["id"] for p in one["panels"]}) == len(places)
        assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in one["panels"])


@pytest.fixture(scope="module")
def through_grafanas_model():
    """Reads a dashboard into the classes generated from Grafana's schemas and writes it again: what they do not know
    is left out."""
    reason = "no grafana-foundation-sdk here"
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason=reason)
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    return lambda data: json.loads(json.dumps(models.Dashboard.from_json(data), cls=JSONEncoder))


def left_out(data, read, path=""):
    """The paths of what `read` no longer holds of `data`."""
    if isinstance(data, dict) and isinstance(read, dict):
        return [lost for key in data for lost in left_out(data[key], read.get(key), f"{path}/{key}")]
    if isinstance(data, list) and isinstance(read, list) and len(data) == len(read):
        return [lost for i, (a, b) in enumerate(zip(data, read)) for lost in left_out(a, b, f"{path}/{i}")]
    return [] if data == read else [path]


def test_grafanas_own_schema_knows_every_key_of_the_dashboards(generate, through_grafanas_model):
    for name in generate.dashboards():
        data = json.loads((generate.FOLDER / f"{name}.json").read_text())
        assert left_out(data, through_grafanas_model(data)) == []


@pytest.mark.parametrize(
    "path",
    ["titel", "panels/0/gridPos/z", "panels/1/targets/0/legendformat", "panels/0/fieldConfig/defaults/custom/fill"],
)
def test_a_key_that_grafana_does_not_know_is_noticed(generate, through_grafanas_model, path):
    data = generate.dashboards()["overview"]
    inner = data
    *way, last = path.split("/")
    for key in way:
        inner = inner[int(key) if key.isdecimal() else key]
    inner[last] = 1
    assert left_out(data, through_grafanas_model(data)) == [f"/{path}"]


def test_compose_mounts_what_is_there():
    services = yaml.safe_load((CONFIGS / "compose.yaml").read_text())["services"]
    mounts = [volume for service in services.values() for volume in service["volumes"] if volume.startswith("./")]
    assert len(mounts) == 4
    for mount in mounts:
        assert (CONFIGS / mount.split(":")[0]).exists(), mount
        assert mount.endswith(":ro")
    provider = yaml.safe_load((CONFIGS / "grafana/provisioning/dashboards/elsa-serve.yml").read_text())["providers"][0]
    assert f":{provider['options']['path']}:ro" in mounts[3]


def shipped_prometheus(folder, target):
    """configs/prometheus.yml with this target, and quick enough for a test."""
    config = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(CONFIGS / file) for file in config["rule_files"]] + [str(RULES[2])]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target], "labels": {"side": "baseline"}}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    command = ["prometheus", *flags, "--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    return Program(command, folder / "prometheus.log", ready_paths=("/-/ready",), startup_s=60)


def ask(url, path, **fields):
    with urllib.request.urlopen(f"{url}{path}?{urllib.parse.urlencode(fields)}", timeout=10) as response:
        return json.load(response)


def complete(url, tokens):
    body = json.dumps({"model": "timed", "prompt": "x" * tokens, "max_tokens": 4, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.status == 200


@needs_prometheus
def test_every_query_of_the_dashboards_runs_in_a_real_prometheus(generate, tmp_path):
    """Variables replaced as Grafana would. Queries about requests must give numbers after some requests."""
    panels = [panel for one in generate.dashboards().values() for panel in one["panels"]]
    texts = [target["expr"] for panel in panels for target in panel["targets"]]
    for variable, value in (("$job", ".*"), ("$instance", ".*"), ("$__rate_interval", "5m")):
        texts = [text.replace(variable, value) for text in texts]
    assert not any("$" in text for text in texts)
    # The fake engine plans no memory and copies nothing; a single server makes no gain.
    may_be_empty = [text for text in texts if re.search(r"memory_bytes|kv_cache|bandwidth|last_step|_gain:ratio", text)]
    queries = [text for text in texts if text not in may_be_empty]
    assert len(queries) > len(may_be_empty) > 0
    server = [sys.executable, str(Path(__file__).with_name("timed_server.py")), "0.0001", "0.005", "{port}:1"]
    with (
        Program(server, tmp_path / "server.log", startup_s=60, stop_s=10) as served,
        shipped_prometheus(tmp_path, served.url.removeprefix("http://")) as program,
    ):
        until = time.monotonic() + 60  # it takes up its targets after some seconds
        while not ask(program.url, "/api/v1/query", query="up == 1")["data"]["result"]:
            assert time.monotonic() < until
            time.sleep(0.2)
        while True:  # a scrape that a busy machine delays for too long is none: asked again after more requests
            for _ in range(4):
                complete(served.url, 300)
                time.sleep(0.3)
            time.sleep(1)
            missing = [
                query for query in queries if not ask(program.url, "/api/v1/query", query=query)["data"]["result"]
            ]
            recorded = ask(program.url, "/api/v1/query", query="elsa:requests_unaccounted")["data"]["result"]
            active = ask(program.url, "/api/v1/alerts")["data"]["alerts"]
            if (recorded and not missing and not active) or time.monotonic() > until:
                break
        for query in may_be_empty:
            assert ask(program.url, "/api/v1/query", query=query)["status"] == "success", query
    assert missing == []
    assert active == []
    assert [float(one["value"][1]) for one in recorded] == [0.0]
