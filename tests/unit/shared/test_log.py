"""The log's lines, as text and as JSON, and the progress of a start."""

import datetime
import json
import logging
import sys
import time
from collections.abc import Iterator

import pytest

from tandem_shared.host import progress
from tandem_shared.host.log import FIELDS, configure_logging
from tandem_shared.host.progress import Progress, say_no_progress


class Written:
    """What has been written to stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """Afterwards logging is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # What is configured anew closes the handlers that there were.
    root.handlers[:] = []
    yield Written(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_names_the_service(stderr: Written) -> None:
    configure_logging("info", "text", "front-end 7%")
    logging.getLogger("some.module").info("it %s", "happens", extra={FIELDS: {"more": 1}})
    logging.getLogger("some.module").debug("not logged")
    [line] = stderr.getvalue().splitlines()
    assert line.endswith(" INFO front-end 7% some.module: it happens")


def test_json_lines_have_all_that_there_is(stderr: Written) -> None:
    configure_logging("warning", "json", "worker")
    before = datetime.datetime.now(datetime.UTC)
    logging.getLogger("some.module").warning('a "quoted"\nline ü', extra={FIELDS: {"request": {"id": "x"}}})
    try:
        raise ValueError("wrong")
    except ValueError:
        logging.getLogger("some.module").exception("it failed")
    first, second = map(json.loads, stderr.getvalue().splitlines())
    at = datetime.datetime.fromisoformat(first.pop("time"))
    assert before - datetime.timedelta(milliseconds=1) <= at <= datetime.datetime.now(datetime.UTC)
    assert first == {
        "level": "WARNING",
        "service": "worker",
        "logger": "some.module",
        "message": 'a "quoted"\nline ü',
        "request": {"id": "x"},
    }
    assert second["level"] == "ERROR" and second["exception"].splitlines()[-1] == "ValueError: wrong"


CHARACTERS = "".join(map(chr, range(0x3000))) + "\ud800 end"
"""With all that ends a line somewhere, or that a terminal obeys."""


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_client_sent_stays_within_its_line(form: str, stderr: Written) -> None:
    configure_logging("info", form, "scheduler")
    logger = logging.getLogger("some.module")
    logger.info("request %s", CHARACTERS)
    try:
        raise ValueError(f"first\nsecond {CHARACTERS}")
    except ValueError:
        logger.exception("it failed")
    text = stderr.getvalue()
    assert all(character.isprintable() for character in text if character != "\n")
    line, *others = text.splitlines()
    assert line.endswith(" end" if form == "text" else ' end"}')
    if form == "json":
        assert text.isascii() and json.loads(line)["message"] == f"request {CHARACTERS}"
        assert json.loads(others[0])["exception"].endswith(f"second {CHARACTERS}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    monkeypatch.setattr(progress, "REFRESH_EVERY_S", 0.01)


def wait_for(text: str, stderr: Written) -> None:
    deadline = time.monotonic() + 10
    while text not in stderr.getvalue():
        assert time.monotonic() < deadline, stderr.getvalue()
        time.sleep(0.005)


@pytest.mark.usefixtures("quick")
def test_work_that_stands_still_is_told_of_in_lines(stderr: Written) -> None:
    configure_logging("info")
    with Progress("reading", 8, "tensors") as work:
        wait_for("reading: 0 of 8 tensors, 0 s", stderr)
        work.advance(3)
        wait_for("reading: 3 of 8 tensors, 0 s", stderr)
    written = stderr.getvalue()
    with Progress("measuring"):
        wait_for("measuring: 0 s", stderr)
    assert "reading" not in stderr.getvalue()[len(written) :]


def test_what_takes_no_time_leaves_no_line(stderr: Written) -> None:
    configure_logging("info")
    with Progress("reading", 8, "tensors") as work:
        work.advance()
    assert not stderr.getvalue()


@pytest.mark.usefixtures("quick")
def test_a_terminal_has_a_bar_that_goes_away(stderr: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure_logging("info")
    with Progress("reading", 8, "tensors") as work:
        work.advance(4)
        wait_for("reading  50%|", stderr)
    assert stderr.getvalue().split("\r")[-2].isspace()
    with Progress("measuring"):
        wait_for("measuring 00:00", stderr)


@pytest.mark.usefixtures("quick")
def test_nothing_is_told_where_nothing_should_be(stderr: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    configure_logging("warning")
    with Progress("reading", 8, "tensors"):
        time.sleep(0.05)
    configure_logging("info")
    monkeypatch.setattr(progress.logger, "level", logging.NOTSET)
    say_no_progress()
    with Progress("reading", 8, "tensors"):
        time.sleep(0.05)
    progress.logger.setLevel(logging.NOTSET)
    assert not stderr.getvalue()
