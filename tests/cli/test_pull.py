"""``tinyllm pull``: terms of use are asked for in a terminal, and otherwise need --accept-terms."""

import io
import sys

import pytest

from tinyllm.cli import main
from tinyllm.cli import pull as command
from tinyllm.weights import pull as pull_module
from tinyllm.weights import terms as terms_module
from tinyllm.weights.wheels import SourceError


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs ``tinyllm pull`` with this stdin; the sources fail, and the terms are read."""
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))

    def fail(*_):
        raise SourceError("the source was asked")

    monkeypatch.setattr(pull_module, "_from_hub", fail)
    monkeypatch.setattr(pull_module, "from_wheels", fail)
    monkeypatch.setattr(terms_module, "from_wheels", fail)

    def run(*args, stdin):
        monkeypatch.setattr(sys, "stdin", stdin)
        code = main(["pull", *args])
        return code, *capsys.readouterr()

    return run


def test_without_a_terminal_terms_need_the_option(run):
    code, out, err = run("gemma3-270m", stdin=io.StringIO("yes\n"))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "--accept-terms" in err and "https://ai.google.dev/gemma/terms" in err
    code, _, err = run("gemma3-270m", "--accept-terms", stdin=io.StringIO())
    assert code == 2 and err.splitlines()[-1].startswith(
        "tinyllm: gemma3-270m was not pulled: the source was"
    )
    assert "[y/N]" not in err


@pytest.mark.parametrize(
    ("typed", "accepted"), [("y\n", True), (" YES\n", True), ("n\n", False), ("", False)]
)
def test_in_a_terminal_terms_are_asked_for(run, typed, accepted):
    code, out, err = run("gemma3-270m", stdin=Terminal(typed))
    assert (code, out) == (2, "") and err.count("Do you accept these terms? [y/N]") == 1
    assert err.index("Gemma Terms of Use: read them at") < err.index("[y/N]")
    assert ("from the Hugging Face hub, 4-bit" in err) and ("were not accepted" in err) is not accepted
    assert ("the source was asked; the source was asked; by hand" in err) is accepted


def test_help_names_every_model(capsys):
    with pytest.raises(SystemExit):
        main(["pull", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n{name}: " in text for name in command.KNOWN_MODELS)
