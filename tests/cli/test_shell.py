"""The shell around the verbs: lean, lazy, one paragraph an error."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

from vitkit import __version__
from vitkit.cli import shell
from vitkit.errors import BadInput

runner = CliRunner()


def vitkit(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "vitkit.cli", *arguments], capture_output=True, text=True, check=False, **kwargs
    )


@pytest.fixture
def verb(monkeypatch):
    """Register a verb ``try`` that runs ``body``."""

    def install(body):
        module = types.ModuleType("pretended_verb")
        module.run = body
        monkeypatch.setitem(sys.modules, "pretended_verb", module)
        monkeypatch.setitem(shell.VERBS, "papers", ("pretended_verb:run", "Try."))

    return install


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["methods"], ["papers", "--json"], ["--version"]])
def test_light_verbs_do_not_import_torch(arguments):
    code = (
        "import sys\nfrom vitkit.cli import main\n"
        f"sys.argv = ['vitkit', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'sklearn', 'yaml', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_verb_without_importing_any():
    done = runner.invoke(shell.app, ["--help"])
    assert done.exit_code == 0
    for name, (_, line) in shell.VERBS.items():
        assert name in done.output and line.split(";")[0].split(",")[0] in done.output


def test_no_verb_prints_the_help():
    assert "Commands" in vitkit().stdout + vitkit().stderr


def test_version():
    assert vitkit("--version").stdout == f"vitkit {__version__}\n"


@pytest.mark.parametrize("name", ["papers", "methods", "show", "evidence"])
def test_a_verb_has_its_own_help(name):
    done = runner.invoke(shell.app, [name, "--help"])
    assert done.exit_code == 0 and f"vitkit {name}" in done.output


def test_an_unknown_verb_is_a_usage_error():
    done = vitkit("studdy")
    assert done.returncode == 2 and "studdy" in done.stderr and "Traceback" not in done.stderr


def test_a_user_error_is_one_paragraph_on_stderr():
    done = vitkit("show", "gptak")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and "Did you mean 'gptaq'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--debug", "show", "gptak"), ("show", "gptak", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(arguments):
    done = vitkit(*arguments)
    assert done.returncode == 1 and "Traceback" in done.stderr and "UnknownName" in done.stderr


def test_a_verb_that_raises_a_vitkit_error_exits_2(verb):
    def body() -> None:
        raise BadInput("a line\n  and another")

    verb(body)
    done = runner.invoke(shell.app, ["papers"])
    assert done.exit_code == 2
    assert done.stderr == "Error: a line and another\n"


def test_an_interrupt_is_one_line_and_130(verb):
    def body() -> None:
        raise KeyboardInterrupt

    verb(body)
    done = runner.invoke(shell.app, ["papers"])
    assert done.exit_code == 130
    assert done.stderr.strip() == "Interrupted."


def test_a_fault_of_ours_is_one_paragraph_and_1(monkeypatch, capsys):
    def run():
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(sys, "argv", ["vitkit", "papers"])
    with pytest.raises(SystemExit) as end:
        shell.main(run)
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError: by zero" in error and "--debug" in error and error.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["vitkit", "papers", "--debug"])
    with pytest.raises(ZeroDivisionError):
        shell.main(run)


def test_an_absent_verb_does_not_break_the_others(monkeypatch):
    monkeypatch.setitem(shell.VERBS, "study", ("vitkit.cli.no_such_file:study", "Study."))
    done = runner.invoke(shell.app, ["study"])
    assert done.exit_code == 2 and "not part of this installation" in done.stderr
    assert runner.invoke(shell.app, ["--help"]).exit_code == 0
    assert runner.invoke(shell.app, ["methods"]).exit_code == 0


def test_a_fault_inside_a_verb_file_is_not_taken_for_absence(monkeypatch, tmp_path):
    (tmp_path / "broken_verb.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(shell.VERBS, "study", ("broken_verb:study", "Study."))
    done = runner.invoke(shell.app, ["study"])
    assert isinstance(done.exception, ModuleNotFoundError) and done.exception.name == "no_such_package"


def test_output_may_be_cut_off():
    done = subprocess.run(
        f"{sys.executable} -m vitkit.cli papers | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert "Traceback" not in done.stderr and done.stdout.startswith("name")
