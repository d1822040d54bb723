"""`elsa-serve bench gain --engine vllm` as a person runs it: two real vLLM servers on the CPU, theirs and ELSA."""

import json

from elsa_load import prometheus
from vllm_support import DEMO_MODEL, needs_vllm

from elsa_serve.cli import main

pytestmark = needs_vllm

PAIRS = 3


def test_gain_starts_vllm_twice_and_prometheus_sees_the_measured_requests_alone(tmp_path, monkeypatch):
    """No claim about speed. What vLLM measured itself, and a real Prometheus scraped, is within what the client saw."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "ELSA_VLLM_METRICS_DIR"):  # this process's own, not the servers'
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    arguments = ["bench", "gain", str(DEMO_MODEL), "--engine", "vllm", "--quiet", "--output", str(tmp_path)]
    arguments += ["--baseline", "attention-backend=CPU_ATTN", "--set", "dtype=float32,enforce-eager"]
    arguments += ["--set", "kv-cache-memory-bytes=128M", "--context", "700", "--pairs", str(PAIRS)]
    assert main([*arguments, "--output-tokens", "12", "--scrape-interval", "0.5"]) == 0
    data = json.loads((tmp_path / "gain.json").read_text())
    assert [row["phase"] for row in data["rows"]] == list(prometheus.PHASES)
    for row in data["rows"]:
        assert (row["engine"], row["dtype"], row["candidate"]) == ("vllm", "float32", "attention-backend=elsa")
        assert row["outputs_equal"] == row["pairs"] == PAIRS
    assert data["cells"][0]["prompt_tokens"] == [700] * PAIRS
    assert "ELSA attention is active: 5 layers" in (tmp_path / "candidate.log").read_text()
    assert "ELSA attention is active" not in (tmp_path / "baseline.log").read_text()
    if prometheus.missing() is None:
        for phase, told in data["cells"][0]["prometheus"].items():
            assert told["reason"] is None, phase
            for side, seconds in told["seconds"].items():
                seen = sum(pair["seconds"][side]["end_to_end"] for pair in data["cells"][0]["pairs"])
                assert 0 < seconds < seen, (phase, side)
