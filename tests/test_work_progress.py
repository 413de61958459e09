"""Progress of long work: a bar on a terminal, lines elsewhere, and never an end before the end."""

import io
import sys
import time

import pytest

from fastssl.work_progress import WorkProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_a_line_every_five_seconds_says_how_far_it_is(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with WorkProgress("pack", 1000, "images", done=100, say=said.append) as progress:
        for _ in range(3):
            now[0] += 2
            progress.advance(100, "1.50 GB")

    # after four seconds nothing; after six, 300 more than the 100 that were there
    assert said == ["pack: 400 of 1,000 images, 1.50 GB, 50 a second, 0 min left"]


def test_work_that_has_not_moved_has_no_rate_to_divide_by(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with WorkProgress("verify", 10, "images", say=said.append) as progress:
        now[0] += 6
        progress.advance(0)

    assert said == ["verify: 0 of 10 images"]


@pytest.mark.parametrize("done", [0, 4])
def test_on_a_terminal_there_is_a_bar_and_no_lines(done, monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", terminal)
    with WorkProgress("pack", 10, "images", done=done, say=pytest.fail) as progress:
        progress.advance(6 - done, "0.10 GB")

    said = terminal.getvalue()
    assert "6 of 10 images" in said
    assert "0.10 GB" in said
