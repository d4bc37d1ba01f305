"""Errors: what they say, what they keep, and what they mean to a shell and to an HTTP client."""

from __future__ import annotations

import errno
import os
import pickle
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy import exceptions
from pdiffcopy.exceptions import (
    REMEDIES,
    DiskFullError,
    FileError,
    FileForbiddenError,
    FileMissingError,
    FileNameError,
    FileTooLargeError,
    ProgramError,
    SourceChangedError,
    VerificationError,
    describe_error,
    printable,
)

ALL = sorted(
    (value for value in vars(exceptions).values() if isinstance(value, type) and issubclass(value, ProgramError)),
    key=lambda cls: cls.__name__,
)


def test_messages_are_made_like_documented():
    """Whitespace in the text is compacted, values are interpolated (by % or by name) as they are."""
    assert str(ProgramError("Just\n    this")) == "Just this"
    assert str(ProgramError("100% {sure}")) == "100% {sure}"
    assert str(ProgramError("%s of %i", "one", 2)) == "one of 2"
    assert str(ProgramError("Can't {a}\n   {b}", a="read  twice", b="{c}")) == "Can't read  twice {c}"


def test_values_are_attributes():
    """Errors carry data."""
    error = FileError("Can't read {filename}", filename="/a\nb", offset=7)
    assert (error.filename, error.offset) == ("/a\nb", 7)
    assert str(error) == "Can't read /a\\nb"


@pytest.mark.parametrize("cls", ALL)
def test_errors_survive_the_way_between_processes(cls):
    """Class, message and attributes are the same, and the message isn't interpolated again."""
    error = cls("Can't {action} {filename}: 100%", action="{read}", filename="/a %s b", offset=7)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error) == "Can't {read} /a %s b: 100%"
    assert vars(again) == {"action": "{read}", "filename": "/a %s b", "offset": 7}
    assert str(pickle.loads(pickle.dumps(again))) == str(error)


@pytest.mark.parametrize("cls", ALL)
def test_errors_know_their_status(cls):
    """Each class has a status that HTTP knows and that is an error, and an exit code of the documented ones."""
    assert HTTPStatus(cls.http_status) and cls.http_status >= 400
    assert cls.exit_code == {SourceChangedError: 3, VerificationError: 4}.get(cls, 1)
    assert cls.__doc__


@pytest.mark.parametrize(
    "code, cls, status",
    [
        (errno.ENOENT, FileMissingError, 404),
        (errno.ENOTDIR, FileMissingError, 404),
        (errno.EXDEV, FileMissingError, 404),
        (errno.EACCES, FileForbiddenError, 403),
        (errno.EPERM, FileForbiddenError, 403),
        (errno.EISDIR, FileForbiddenError, 403),
        (errno.EROFS, FileForbiddenError, 403),
        (errno.ELOOP, FileForbiddenError, 403),
        (errno.ETXTBSY, FileForbiddenError, 403),
        (errno.ENXIO, FileForbiddenError, 403),
        (errno.ENAMETOOLONG, FileNameError, 400),
        (errno.EINVAL, FileNameError, 400),
        (errno.ENOSPC, DiskFullError, 507),
        (errno.EDQUOT, DiskFullError, 507),
        (errno.EFBIG, FileTooLargeError, 413),
        (errno.EIO, FileError, 500),
    ],
)
def test_errors_of_the_system(code, cls, status):
    """Each is translated to the most specific class, and says what was tried, with which file, and why it failed."""
    error = FileError.from_os_error(OSError(code, os.strerror(code)), "read", "/a\x1bb")
    assert type(error) is cls
    assert error.http_status == status
    assert str(error) == f"Can't read /a\\x1bb: {os.strerror(code)}"
    assert (error.action, error.filename, error.reason) == ("read", "/a\x1bb", os.strerror(code))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_limits_of_the_machine_have_remedies(code):
    """Nobody remembers which one has to be raised."""
    error = FileError.from_os_error(OSError(code, os.strerror(code)), "open", "/a")
    assert str(error) == f"Can't open /a: {os.strerror(code)}: {REMEDIES[code]}"
    assert "ulimit -u" in describe_error(RuntimeError("can't start new thread"))


def test_errors_of_the_system_without_a_number():
    """An error that has nothing but a text is translated too."""
    assert str(FileError.from_os_error(OSError("broken"), "read", "/a")) == "Can't read /a: broken"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain é 漢", "plain é 漢"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b2J\x7f\0", "\\x9b2J\\x7f\\x00"),
        ("\udcff", "\\udcff"),
        ("\u2028\u202e", "\\u2028\\u202e"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_what_moves_cursors_is_escaped(text, expected):
    """Control characters, direction marks, line separators and what isn't text are spelled out."""
    assert printable(text) == expected


@given(st.text(st.characters()))
def test_any_text_can_be_printed(text):
    """Whatever it is, it's printable and can be encoded afterwards, and what was printable stays."""
    assert printable(text).isprintable()
    printable(text).encode("utf-8")
    assert not text.isprintable() or printable(text) == text
