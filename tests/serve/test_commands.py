"""The command line: strict flags, configuration files, exit codes."""

from pathlib import Path

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
    ],
)
def test_bad_config_file_names_what_is_wrong(capsys, parser, tmp_path, text, named):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert named in error_of(capsys, parser, "plan", "model", "--config", str(config))


def test_shipped_configs_parse(parser):
    files = sorted((Path(__file__).parents[2] / "configs").glob("llama-*.yaml"))
    assert files
    for file in files:
        args = parser.parse_args(["plan", "model", "--config", str(file)])
        assert args.gpu_memory.lower().removesuffix("gib") in file.name


@pytest.mark.parametrize("command", ["serve", "generate", "plan", "doctor"])
def test_help_of_every_command(capsys, parser, command):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([command, "--help"])
    assert stop.value.code == 0
    assert "--config" in capsys.readouterr().out


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
