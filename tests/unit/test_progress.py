"""Progress: plain lines where there is no terminal, a bar where there is one."""

import io

import pytest

from shardwright.executors.progress import NullProgress, StderrProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_say_share_rate_and_time_left():
    stream = io.StringIO()
    progress = StderrProgress(stream, every=0.0)
    progress.start(2_000_000_000)
    progress.advance(500_000_000)
    progress.advance(500_000_000)
    progress.stop()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[1].startswith(" 50 %  1.00 of 2.00 GB")
    assert lines[1].endswith("s left")


def test_lines_are_seldom():
    stream = io.StringIO()
    progress = StderrProgress(stream)
    progress.start(10)
    for _ in range(10):
        progress.advance(1)
    progress.stop()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("progress", [StderrProgress(Terminal()), NullProgress()])
def test_a_bar_starts_and_stops(progress):
    progress.start(100)
    progress.advance(50)
    progress.stop()
    progress.advance(50)
    progress.stop()
