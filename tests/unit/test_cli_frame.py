"""The frame of the program: verbs, one-line errors, exit codes, logging."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types

import pytest

from megatron_vlmr1 import __version__, errors
from megatron_vlmr1.cli import common, main
from megatron_vlmr1.cli.common import add_overrides, checked_overrides, find_config, print_json


def verb(run, overrides: bool = True) -> types.ModuleType:
    def add_parser(subparsers) -> None:
        parser = subparsers.add_parser("fake", help="a verb for the test")
        parser.add_argument("config")
        parser.add_argument("--nproc", type=int, default=1)
        if overrides:
            add_overrides(parser)
        parser.set_defaults(run=run)

    module = types.ModuleType("megatron_vlmr1.cli.fake")
    module.add_parser = add_parser
    return module


@pytest.fixture
def call(monkeypatch):
    """Run `vlmr1 fake ...` with the given body."""
    monkeypatch.setattr(main, "VERBS", ("fake",))

    def run(body, *words: str, overrides: bool = True) -> int:
        monkeypatch.setitem(sys.modules, "megatron_vlmr1.cli.fake", verb(body, overrides))
        try:
            return main.main(["fake", *words])
        except SystemExit as left:
            return left.code

    return run


def fails_with(error: BaseException):
    def body(args):
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a.yaml: unknown key\n  train.step"), 2, "vlmr1: error: a.yaml: unknown key train.step"),
        (FileNotFoundError(2, "No such file", "a.png"), 2, "vlmr1: error: a.png: No such file"),
        (PermissionError(13, "Permission denied", b"/b"), 2, "vlmr1: error: /b: Permission denied"),
        (errors.RunStopped(errors.REQUEUE, "SIGTERM"), 85, "vlmr1: stopped: SIGTERM (exit code 85)"),
        (
            errors.RunStopped(errors.STOPPED, "loss\nis nan", 3),
            17,
            "vlmr1: stopped: loss is nan (step 3, exit code 17)",
        ),
        (KeyboardInterrupt(), 130, "vlmr1: interrupted"),
    ],
)
def test_an_expected_ending_is_one_line(call, capsys, error, code, line):
    assert call(fails_with(error), "c.yaml") == code
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError(28, "No space left"), BrokenPipeError(32, "a worker")])
def test_anything_else_is_a_crash_with_a_traceback(call, capfd, error):
    assert call(fails_with(error), "c.yaml") == errors.CRASHED
    said = capfd.readouterr().err
    assert "Traceback" in said
    assert type(error).__name__ in said
    assert errors.CRASHED not in (0, 1, 2, 17, 85)


def test_where_a_value_error_came_from_can_be_asked_for(call, capsys, monkeypatch):
    monkeypatch.setenv("VLMR1_LOG", "debug")
    assert call(fails_with(ValueError("bad")), "c.yaml") == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unknown_log_level(call, capsys, monkeypatch):
    logging.getLogger("megatron_vlmr1").setLevel(logging.INFO)
    monkeypatch.setenv("VLMR1_LOG", "loud")
    assert call(lambda args: 0, "c.yaml") == 2
    assert capsys.readouterr().err == "vlmr1: error: VLMR1_LOG=LOUD: expected one of DEBUG, INFO, WARNING, ERROR\n"


def test_overrides_may_stand_before_and_after_options(call):
    seen = []

    def body(args):
        seen.append((args.config, args.nproc, args.overrides))
        return 1

    assert call(body, "c.yaml", "a.b=1", "--nproc", "2", "c=2") == 1
    assert call(body, "--nproc", "2", "c.yaml", "a.b=1", "c=2") == 1
    assert call(body, "c.yaml", "--nproc", "2", "a.b=1", "c=2") == 1
    assert seen == [("c.yaml", 2, ["a.b=1", "c=2"])] * 3
    call(body, "c.yaml")
    assert seen[-1] == ("c.yaml", 1, [])


@pytest.mark.parametrize(
    ("words", "overrides", "line"),
    [
        (["c.yaml", "--nprc", "2"], True, "unrecognized arguments: --nprc 2 (see vlmr1 --help)"),
        (["c.yaml", "--npro", "2"], True, "unrecognized arguments: --npro 2 (see vlmr1 --help)"),
        (["c.yaml", "a.b=1"], False, "unrecognized arguments: a.b=1 (see vlmr1 --help)"),
        (["c.yaml", "--nproc", "two"], True, "argument --nproc: invalid int value: 'two' (see vlmr1 fake --help)"),
        ([], True, "the following arguments are required: config (see vlmr1 fake --help)"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(call, capsys, words, overrides, line):
    assert call(lambda args: 0, *words, overrides=overrides) == 2
    assert capsys.readouterr().err == f"vlmr1: error: {line}\n"


def test_unknown_verb_and_no_verb(call, capsys, monkeypatch):
    call(lambda args: 0, "c.yaml")
    for words in (["trian"], []):
        with pytest.raises(SystemExit) as left:
            main.main(words)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("vlmr1: error: ")
        assert said.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"vlmr1 {__version__}\n"


def test_help_lists_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from megatron_vlmr1.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'megatron', 'tensorboard', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in main.VERBS:
        assert f"\n    {name} " in done.stdout
    assert "exit codes:" in done.stdout


@pytest.mark.parametrize("name", main.VERBS)
def test_every_verb_has_help_with_an_example(name):
    command = [sys.executable, "-m", "megatron_vlmr1.cli", name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout.lower()
    assert f"vlmr1 {name}" in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_the_program_quietly(unbuffered):
    code = (
        "import sys, types\n"
        "from megatron_vlmr1.cli import main\n"
        "main._run = lambda words: [print('x' * 1000) for _ in range(1000)] and 0\n"
        "sys.exit(main.main([]))\n"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_overrides_are_checked():
    good = ["train.steps=5", "data.evaluate.held-out=/a b=c", "rewards.weights={iou: 1}", "x="]
    assert checked_overrides(good) == good
    for bad in ("train.steps", "--nproc=2", "=5", "a..b=1", "c.yaml", ""):
        with pytest.raises(ValueError, match="is not an override; expected KEY=VALUE"):
            checked_overrides([bad])


def test_print_json_is_one_strict_line(capsys):
    print_json({"a": float("nan"), "text": "é\n\ud800", "n": [1, None, True]})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"a": "NaN", "text": "é\n\ud800", "n": [1, None, True]}


@pytest.mark.parametrize(
    ("rank", "expected"), [(None, ["INFO hello", "WARNING beware"]), ("3", ["rank 3 WARNING beware"])]
)
def test_only_rank_0_says_more_than_warnings(capsys, monkeypatch, rank, expected):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    common.configure_logging()
    for name in ("megatron_vlmr1.train.grpo", "somebody.else"):
        logging.getLogger(name).info("hello" if name.startswith("megatron_vlmr1") else "noise")
    logging.getLogger("megatron_vlmr1").warning("beware")
    assert [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()] == expected


def test_find_config_prefers_the_users_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("seed: 1")
    assert find_config("mine.yaml").read_text() == "seed: 1"
    for name in ("nothing.yaml", "configs/nothing.yaml", "../setup.cfg", "configs/../../setup.cfg"):
        with pytest.raises(ValueError, match="no such config file; the package has"):
            find_config(name)


def test_a_rank_that_failed_leaves_with_its_code():
    program = (
        "import atexit; from megatron_vlmr1.runtime import distributed; from megatron_vlmr1.cli.__main__ import leave\n"
        "distributed.start(60); atexit.register(print, 'at exit'); print('before'); leave(17)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (17, "before\nat exit\n"), done.stderr
