"""The command line: strict flags, configuration files, exit codes."""

import pytest

from elsa_serve.cli import build_parser


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
    from pathlib import Path

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
