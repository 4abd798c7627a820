"""Whether a terminal shows colours and the characters of bars."""

import io
import sys

import pytest

from tinyllm.tools.console import shows_blocks, wants_colour


class Stream(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.isatty = lambda: tty


@pytest.mark.parametrize(
    ("variables", "on_a_terminal", "elsewhere"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": ""}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
    ],
)
@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_wants_colour_follows_the_variables_and_the_terminal(
    monkeypatch, variables, on_a_terminal, elsewhere, platform
):
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WT_SESSION", "some-id")
    assert wants_colour(Stream(tty=True)) is on_a_terminal
    assert wants_colour(Stream(tty=False)) is elsewhere
    monkeypatch.delenv("WT_SESSION")  # the older console
    if platform == "win32" and not variables.get("FORCE_COLOR"):
        assert wants_colour(Stream(tty=True)) is False


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8", True), ("utf-16", True), ("ascii", False), ("latin-1", False), ("cp1252", False)],
)
def test_shows_blocks_depends_on_the_encoding(encoding, expected):
    assert shows_blocks(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) is expected
    assert shows_blocks(io.StringIO())
