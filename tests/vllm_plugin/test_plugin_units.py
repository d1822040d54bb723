"""The plugin's parts that need no vLLM: phases, counters, the command line, version gate, the merge over ranks."""

import os
import struct
import subprocess
import sys

import pytest
import torch
from elsa_kernels import State
from vllm_support import ThreadGroup

from elsa_serve import cli
from elsa_serve.errors import UsageError
from elsa_serve.vllm_plugin import compat, metrics, serve, verify
from elsa_serve.vllm_plugin.context_parallel import local_lengths, merge_ranks, prove
from elsa_serve.vllm_plugin.step import describe


def tensor(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("starts", "keys", "prefilling", "options", "phase", "tokens", "lengths"),
    [
        ((0, 1, 2), (9, 5), (False, False), {}, "decode", (0, 2), ((1, 1), (9, 5))),
        ((0, 6, 7), (6, 9), (True, False), {}, "mixed", (6, 1), ((6, 1), (6, 9))),
        ((0, 1), (40,), (True,), {}, "prefill", (1, 0), ((1,), (40,))),  # the last token of a chunked prompt
        ((0, 4), (40,), (False,), {"decode_tokens_per_row": 4}, "decode", (0, 4), ((4,), (40,))),  # verification
        ((0, 4), (40,), (False,), {}, "prefill", (4, 0), ((4,), (40,))),  # more than a decode brings
        ((0, 1, 1, 1), (9, 0, 0), (False, False, False), {}, "decode", (0, 1), ((1, 0, 0), (9, 0, 0))),  # padding
        ((0, 6, 7), (6, 9), (True, False), {"exact_decode_lens": False}, "mixed", (6, 1), (None, None)),
        ((0, 6), (6,), (True,), {"exact_decode_lens": False}, "prefill", (6, 0), ((6,), (6,))),
    ],
)
def test_step_phases_and_known_lengths(starts, keys, prefilling, options, phase, tokens, lengths):
    step = describe(tensor(*starts), tensor(*keys), torch.tensor(prefilling), **options)
    assert step.phase == phase
    assert (step.prefill_tokens, step.decode_tokens) == tokens
    assert (step.query_lens, step.kv_lens) == lengths


def test_step_without_host_lengths_knows_none():
    step = describe(tensor(0, 1, 9), None, None)
    assert (step.phase, step.query_lens, step.kv_lens, step.decode_kv_lens) == ("mixed", None, None, ())


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc1"])
def test_supported_versions(version):
    assert compat.refusal(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "dev"])
def test_unsupported_versions_are_refused_by_name_with_the_remedy(version):
    reason = compat.refusal(version)
    assert f"this is vLLM {version}" in reason
    assert "supports vLLM 0.32 and 0.33" in reason
    assert "pip install" in reason


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("serve m --attention-backend elsa", True),
        ("serve m --attention-backend=ELSA --port 1", True),
        ("serve m --attention_backend elsa", True),
        ("serve m --attention-config.backend ELSA", True),
        ('serve m --attention-config {"backend":"ELSA"}', True),
        ("serve m --attention-backend flash_attn", False),
        ("serve elsa --port 1", False),
        ("serve m --attention-backend", False),
    ],
)
def test_a_command_line_that_asks_for_elsa(line, asked):
    assert compat.asks_for_elsa(line.split()) is asked


def test_counters_of_several_processes_add_up_on_the_page(tmp_path):
    prometheus_client = pytest.importorskip("prometheus_client")
    for decode in (1, 5):
        recorder = metrics.Recorder(tmp_path)
        recorder.add_layers(20)
        recorder.step(describe(tensor(0, 6, 7), tensor(6, decode), torch.tensor([True, False])), 3, "batch_invariant")
        recorder.add("elsa_vllm_attention_seconds", 0.25, phase="mixed")
    (tmp_path / "half-written.counters").write_bytes(b"\0" * 9)
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics.Collector(tmp_path))
    page = prometheus_client.generate_latest(registry).decode()
    for line in (
        'elsa_vllm_steps_total{phase="mixed"} 2.0',
        'elsa_vllm_steps_total{phase="decode"} 0.0',
        'elsa_vllm_tokens_total{phase="prefill"} 12.0',
        'elsa_vllm_tokens_total{phase="decode"} 2.0',
        "elsa_vllm_decode_splits_total 6.0",
        'elsa_vllm_attention_seconds_total{phase="mixed"} 0.5',
        'elsa_vllm_fallbacks_total{cause="batch_invariant"} 2.0',
        "elsa_vllm_attention_layers 40.0",
    ):
        assert line in page.splitlines()


def test_counters_also_go_to_the_multiprocess_page_where_vllm_uses_it(tmp_path):
    # prometheus_client decides on import, so a process of its own: as an engine process of vLLM is one.
    script = (
        "from elsa_serve.vllm_plugin import metrics\n"
        "recorder = metrics.Recorder(None)\n"
        "recorder.add('elsa_vllm_steps', 3, phase='decode')\n"
        "recorder.add_layers(40)\n"
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    page = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert 'elsa_vllm_steps_total{phase="decode"} 3.0' in page.stdout.splitlines()
    assert "elsa_vllm_attention_layers 40.0" in page.stdout.splitlines()


def test_the_stopwatch_counts_calls_and_seconds():
    recorder = metrics.Recorder(None)
    watch = metrics.Stopwatch(recorder, torch.device("cpu"))
    watch.stop(watch.start(), "decode")
    assert recorder.value("elsa_vllm_attention_calls", phase="decode") == 1
    assert 0 < recorder.value("elsa_vllm_attention_seconds", phase="decode") < 10


def test_activity_is_proved_from_counters_and_its_lack_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("ELSA_VLLM_METRICS_DIR", raising=False)
    with pytest.raises(verify.NotActive, match="has not loaded the plugin"):
        verify.assert_active()
    monkeypatch.setenv("ELSA_VLLM_METRICS_DIR", str(tmp_path))
    with pytest.raises(verify.NotActive, match="no attention layer"):
        verify.assert_active()
    recorder = metrics.Recorder(tmp_path)
    recorder.add_layers(5)
    with pytest.raises(verify.NotActive, match=r"5 attention layers .* no batch"):
        verify.assert_active()
    recorder.add("elsa_vllm_steps", 2, phase="prefill")
    assert verify.assert_active() == verify.Activity(layers=5, steps=2)


def test_verify_command_reports_a_server_that_is_not_there(capsys):
    assert verify.main(["http://127.0.0.1:9"]) == 1
    assert "cannot read http://127.0.0.1:9/metrics" in capsys.readouterr().err


def test_the_layout_of_the_files_is_what_readers_expect(tmp_path):
    recorder = metrics.Recorder(tmp_path)
    recorder.add("elsa_vllm_steps", 7, phase="prefill")
    (path,) = tmp_path.glob("*.counters")
    assert struct.unpack_from("d", path.read_bytes(), 0) == (7.0,)


@pytest.mark.parametrize("separate", [("--engine", "vllm"), ("--engine=vllm",)])
def test_serve_hands_every_other_flag_to_vllm(separate, monkeypatch):
    arguments = ["./model", *separate, "--config", "c.yaml", "--max-model-len", "32768"]
    assert serve.chosen_engine(arguments) == "vllm"
    monkeypatch.setattr(compat, "has_vllm_command", lambda: True)
    rest = ["--config", "c.yaml", "--max-model-len", "32768", "--attention-backend", "elsa"]
    assert serve.vllm_command(arguments) == [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        "./model",
        *rest,
    ]
    monkeypatch.setattr(compat, "has_vllm_command", lambda: False)
    module = "vllm.entrypoints.openai.api_server"
    assert serve.vllm_command(arguments) == [sys.executable, "-m", module, "--model", "./model", *rest]


def test_serve_leaves_a_chosen_backend_alone(monkeypatch):
    monkeypatch.setattr(compat, "has_vllm_command", lambda: True)
    command = serve.vllm_command(["m", "--engine", "vllm", "--attention-backend", "flash_attn"])
    assert command[-2:] == ["--attention-backend", "flash_attn"]


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"version": ImportError("no vllm")}, "pip install 'elsa-serve\\[vllm\\]'"),
        ({"version": "0.20.0"}, "supports vLLM 0.32"),
        ({"version": "0.32.0", "entries": ()}, "source tree on PYTHONPATH is not enough"),
        ({"version": "0.32.0", "plugins": "lora,other"}, "VLLM_PLUGINS is 'lora,other'"),
    ],
)
def test_serve_refuses_where_vllm_would_run_without_elsa(patch, message, monkeypatch, capsys):
    def version():
        if isinstance(patch["version"], Exception):
            raise patch["version"]
        return patch["version"]

    class Entry:
        value = "elsa_serve.vllm_plugin:register"

    monkeypatch.setattr(compat, "vllm_version", version)
    monkeypatch.setattr(serve.importlib.metadata, "entry_points", lambda group: patch.get("entries", (Entry,)))
    if "plugins" in patch:
        monkeypatch.setenv("VLLM_PLUGINS", patch["plugins"])
    with pytest.raises(UsageError, match=message):
        serve.check_installation()
    assert cli.main(["serve", "./model", "--engine", "vllm"]) == 2
    assert "elsa-serve serve:" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "interleave"), [(2, 1), (4, 1), (3, 16)])
def test_local_lengths_share_out_every_token_once(size, interleave):
    lengths = torch.arange(200, dtype=torch.int32)
    shares = torch.stack([local_lengths(lengths, size, rank, interleave) for rank in range(size)])
    assert torch.equal(shares.sum(0).int(), lengths)
    owner = torch.arange(200) // interleave % size  # who holds token t
    for rank in range(size):
        counted = torch.cat([torch.zeros(1), (owner == rank).cumsum(0)[:-1]])
        assert torch.equal(shares[rank].float(), counted)


def test_outputs_over_shares_of_the_keys_merge_to_the_output_over_all():
    torch.manual_seed(0)
    ranks, T, H, D, N = 2, 3, 4, 8, 31
    logits = torch.randn(H, T, N, dtype=torch.float64) * 8
    logits[:, 2] = -torch.inf  # a row without any key
    logits[0, 1, ::2] = -torch.inf  # a row whose keys all lie on rank 1
    values = torch.randn(H, N, D, dtype=torch.float64)
    expected = State.from_logits(logits, values)
    group = ThreadGroup(ranks)

    def rank_part(rank):
        part = State.from_logits(logits[..., rank::ranks], values[:, rank::ranks])
        out, lse = part.finalize().transpose(0, 1), part.logsumexp().transpose(0, 1)
        return merge_ranks(out.float(), lse.float(), group)

    outs, totals = zip(*group.run(rank_part))
    assert [out.shape for out in outs] == [(T, H // ranks, D)] * ranks  # each rank keeps its own heads
    torch.testing.assert_close(torch.cat(outs, 1).double(), expected.finalize().transpose(0, 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.cat(totals, 1).double(), expected.logsumexp().transpose(0, 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_group_proves_that_it_sums_before_requests_come(ranks):
    class Deaf(ThreadGroup):
        def reduce_scatter(self, input_, dim=-1):
            return torch.zeros_like(super().reduce_scatter(input_, dim))  # as memory that nobody wrote may look

    def rank_part(group):
        def one(rank):
            try:
                return prove(group, torch.device("cpu"))
            except RuntimeError as error:
                return str(error)

        return one

    assert (group := ThreadGroup(ranks)).run(rank_part(group)) == [None] * ranks
    for rank, said in enumerate((group := Deaf(ranks)).run(rank_part(group))):
        assert f"rank {rank} of {ranks} merges known states to 0 where" in said
        assert "--decode-context-parallel-size 1" in said


EXPOSE = """
import multiprocessing, os, subprocess, sys
from elsa_serve.vllm_plugin import metrics

def main():
    metrics.expose()
    print(os.environ["ELSA_VLLM_METRICS_DIR"], flush=True)

if __name__ == "__main__":
    main()
    if sys.argv[1:]:  # as vLLM starts its engine, and as a program starts a server
        engine = multiprocessing.get_context("spawn").Process(target=main)
        engine.start()
        engine.join()
        subprocess.run([sys.executable, __file__], check=True)
"""


def test_a_server_started_by_a_program_with_an_engine_counts_for_itself(tmp_path):
    pytest.importorskip("prometheus_client")
    script = tmp_path / "program.py"
    script.write_text(EXPOSE)
    environment = {key: value for key, value in os.environ.items() if key != "ELSA_VLLM_METRICS_DIR"}
    done = subprocess.run(
        [sys.executable, str(script), "both"], env=environment, capture_output=True, text=True, check=True
    )
    program, engine, server = done.stdout.split()
    assert program == engine
    assert server != program
    assert not metrics._of_a_program_above(tmp_path)  # set by hand
