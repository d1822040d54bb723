"""The command line: strict flags, configuration files, exit codes."""

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from elsa_serve.cli import build_parser
from elsa_serve.demo import make_document
from elsa_serve.offload import measure
from elsa_serve.offload.machine import Rates


@pytest.fixture
def parser():
    return build_parser()


def error_of(capsys, parser, *argv):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_unknown_flag_names_the_nearest(capsys, parser):
    message = error_of(capsys, parser, "plan", "model", "--gpu-memry", "24GiB")
    assert "--gpu-memry" in message
    assert "did you mean --gpu-memory" in message


def test_flags_are_not_abbreviated(capsys, parser):
    assert "--gpu" in error_of(capsys, parser, "plan", "model", "--gpu", "24GiB")


def test_config_file_gives_defaults_and_flags_win(tmp_path, parser):
    config = tmp_path / "c.yaml"
    config.write_text("gpu-memory: 8GiB\ncontext: 4096\nmax_batch: 2\n")
    args = parser.parse_args(["plan", "model", "--config", str(config), "--context", "8192"])
    assert (args.gpu_memory, args.context, args.max_batch) == ("8GiB", 8192, 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gpu-memry: 8GiB", "gpu-memory"),
        ("dtype: float8", "float8"),
        ("context: long", "long"),
        ("- a\n- b", "mapping"),
        ("a: [", "cannot read"),
        ("max-batch: 3.7", "max-batch: invalid value 3.7"),
        ("max-batch: true", "max-batch: invalid value True"),
        ("gpu-memory: [1, 2]", "gpu-memory: invalid value [1, 2]"),
        ("model: ./llama", "MODEL_DIR is no flag"),
        ("serial: true\nno-fused: true", "write fused: true or false"),
        ("serial: 'no'", "serial: invalid value 'no': choose true or false"),
    ],
)
def test_bad_config_file_names_what_is_wrong(capsys, parser, tmp_path, text, named):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert named in error_of(capsys, parser, "generate", "model", "--prompt", "x", "--config", str(config))


def test_a_config_file_that_is_no_text_is_refused(capsys, parser, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_bytes(b"\xff\xfe")
    assert "cannot read" in error_of(capsys, parser, "plan", "model", "--config", str(config))


def test_every_kind_of_flag_can_stand_in_a_file(tmp_path, parser, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        "prompt: from the file\nstop: one\nserial: true\nfused: false\nprefix-caching: true\ncontext:\n"
        "temperature: 0.5\nmax-tokens: 7\n"
    )
    args = parser.parse_args(["generate", "model", f"--config={config}"])
    assert (args.prompt, args.stop, args.serial, args.fused, args.prefix_caching) == (
        "from the file", ["one"], True, False, True,
    )  # fmt: skip
    assert (args.context, args.temperature, args.max_tokens) == (None, 0.5, 7)
    assert (
        parser.parse_args(["generate", "model", "--config", str(config), "--no-prefix-caching"]).prefix_caching is False
    )
    config.write_text("served-model-name: [a, b]\ncors-origin: https://a.example\n")
    args = parser.parse_args(["serve", "model", "--config", str(config)])
    assert (args.served_model_name, args.cors_origin) == (["a", "b"], ["https://a.example"])
    # the command line's take the place of the file's
    assert parser.parse_args(["serve", "m", "--config", str(config), "--served-model-name", "c"]).served_model_name == [
        "c"
    ]
    assert capsys.readouterr().err == ""


def test_one_file_serves_several_commands(tmp_path, parser, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("# all of it\ncontext: 4096\nport: 8001\napi-key-file: keys\n")
    assert parser.parse_args(["plan", "model", "--config", str(config)]).context == 4096
    assert "left out, flags of other commands: --port, --api-key-file" in capsys.readouterr().err
    config.write_text("# nothing\n")
    assert parser.parse_args(["plan", "model", "--config", str(config)]).context is None


def test_a_wrong_choice_is_not_taken_for_a_wrong_flag(capsys, parser):
    assert "did you mean" not in error_of(capsys, parser, "plan", "model", "--dtype", "fp8")


def test_shipped_configs_parse(parser):
    files = sorted((Path(__file__).parents[2] / "configs").glob("llama-*.yaml"))
    assert files
    for file in files:
        args = parser.parse_args(["plan", "model", "--config", str(file)])
        assert args.gpu_memory.lower().removesuffix("gib") in file.name


@pytest.mark.parametrize("command", ["serve", "generate", "plan", "doctor", "bench"])
def test_help_of_every_command(capsys, parser, command):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([command, "--help"])
    assert stop.value.code == 0
    assert ("--config" in capsys.readouterr().out) == (command != "bench")  # which has none but its commands' flags


@pytest.fixture
def run(capsys):
    """Run a command in this process: (exit status, standard output, standard error)."""

    def call(*argv):
        from elsa_serve.cli import main

        status = main([str(word) for word in argv])
        return status, *capsys.readouterr()

    return call


DEMO = Path(__file__).parents[2] / "configs" / "demo_model"


def test_plan_shows_tiers_and_times_without_loading(run):
    status, out, _ = run("plan", DEMO, "--context", 4096, "--gpu-memory", "64MiB", "--device", "cpu")
    assert status == 0
    assert "5 layers" in out
    assert "of 5" in out
    assert "first token after 4096 of prompt" in out


def test_plan_for_a_gpu_that_is_not_here(run):
    status, out, _ = run("plan", DEMO, "--device", "cuda", "--gpu-memory", "24GiB")
    assert status == 0
    assert "CUDA context" in out


def test_doctor_names_kernels_with_reasons(run):
    status, out, _ = run("doctor", "--no-bandwidth", "--device", "cpu")
    assert status == 0
    assert "FP32 prefill: cpu" in out
    assert "no  gluon: " in out
    assert "vLLM plugin" in out


def test_doctor_shows_the_rates_and_measures_them_again_on_demand(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    taken = []

    def measure_rates(device, dtype, **_):
        taken.append(dtype)
        return Rates(cpu_attention=len(taken) * 1e9, source="measured by this test")

    monkeypatch.setattr(measure, "measure_rates", measure_rates)
    for flags, expected in (((), 1), ((), 1), (("--measure",), 2), (("--dtype", "bfloat16"), 3)):
        status, out, _ = run("doctor", "--device", "cpu", *flags)
        assert status == 0
        assert "measured by this test" in out
        assert f"CPU attention {expected:.1f} GB/s of KV" in out
    assert taken == [torch.float32, torch.float32, torch.bfloat16]


def test_generate_answers_from_a_file(run, tmp_path):
    document = make_document(2000, seed=1)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(document.prompt)
    status, out, err = run(
        "generate",
        DEMO,
        "--chat",
        "--prompt-file",
        prompt,
        "--device",
        "cpu",
        "--context",
        2048,
        "--resident-layers",
        0,
    )
    assert status == 0
    assert document.answer in out
    assert "tokens/s" in err


def test_a_terminal_shows_how_far_the_prompt_has_come(run, monkeypatch):
    monkeypatch.setattr("elsa_serve.offload.engine.PROGRESS_S", 0.0)
    flags = (
        "--prompt",
        "def f():\n" * 30,
        "--max-tokens",
        1,
        "--device",
        "cpu",
        "--context",
        256,
        "--chunk-tokens",
        64,
    )
    _, _, plain = run("generate", DEMO, *flags)
    assert "prompt: " not in plain
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, out, err = run("generate", DEMO, *flags)
    shown = [line for line in err.split("\r") if line.startswith("prompt: ")]
    assert len(shown) > 5
    assert "prompt: " not in out
    assert err.split("\r")[-1].startswith("\x1b[K")  # wiped before the answer


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("generate", "/nowhere", "--prompt", "x"), "/nowhere"),
        (("generate", DEMO, "--prompt-file", "/nowhere"), "/nowhere"),
        (("generate", DEMO, "--prompt", "x", "--device", "cuda:77"), "cuda:77"),
        (("generate", DEMO, "--prompt", "x", "--device", "tpu"), "tpu"),
        (("generate", DEMO, "--prompt", "x", "--gpu-memory", "lots"), "lots"),
        (("generate", DEMO, "--prompt", "x", "--device", "cpu", "--resident-layers", "9"), "--resident-layers 9"),
        (("generate", DEMO, "--prompt", "x", "--device", "cpu", "--linear", "elsa"), "--dtype float32"),
        (("generate", DEMO, "--prompt", "x", "--temperature", "-1"), "temperature is -1"),
        (("generate", DEMO, "--prompt", "x", "--max-tokens", "0"), "max_tokens is 0"),
        (("generate", DEMO, "--prompt", ""), "--prompt is empty"),
        (("generate", DEMO, "--prompt", "\udcff"), "cannot read --prompt"),
        (("generate", DEMO, "--prompt-file", os.devnull), "is empty"),
        (("plan", DEMO, "--host-threads", "0"), "--host-threads 0"),
        (("plan", DEMO, "--linear", "elsa"), "--dtype float32"),
        (("plan", DEMO, "--context", "99999"), "32768"),
        (("plan", DEMO, "--gpu-memory", "1MiB"), "1.0 MiB"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_status_2(run, argv, named):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1


def test_bytes_on_standard_input_that_are_no_text_are_refused(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"abc \xff")))
    status, _, err = run("generate", DEMO, "--prompt-file", "-")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot read --prompt-file -: 'utf-8' codec" in err


def test_a_damaged_generation_config_is_refused_before_weights_are_read(run, tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{")
    status, _, err = run("generate", tmp_path / "model", "--prompt", "x", "--device", "cpu", "--context", 256)
    assert (status, err.count("\n")) == (2, 1)
    assert "generation_config.json" in err


def test_chat_without_a_template_and_a_tokenizer_of_another_model_are_named(run, tmp_path, caplog):
    shutil.copytree(DEMO, tmp_path / "model")
    for name, change in (("tokenizer_config.json", {"chat_template": None}), ("config.json", {"vocab_size": 1000})):
        file = tmp_path / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    flags = ("--device", "cpu", "--context", 256, "--load-format", "dummy")
    status, _, err = run("generate", tmp_path / "model", "--chat", "--prompt", "x", *flags)
    assert status == 2
    assert "--chat: the model has no chat template that takes the prompt (Cannot use chat template functions" in err
    assert "knows 2048 tokens and the model 1000" in caplog.text
