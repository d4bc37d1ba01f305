"""Tokens and certificates: half a configuration is an error."""

from __future__ import annotations

import os
import signal

import pytest
import trustme

from pdiffcopy.exceptions import FileError, FileForbiddenError, FileMissingError, UsageError
from pdiffcopy.security import check_certificate, check_token, is_loopback, load_token


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No token comes from outside the tests."""
    monkeypatch.delenv("PDIFFCOPY_TOKEN", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


def write_token(path, text, mode=0o600):
    path.write_text(text, "utf-8")
    path.chmod(mode)
    return str(path)


# Loading a token {{{1


def test_no_token_is_configured():
    """Without a file and a variable there is none."""
    assert load_token() == ""


@pytest.mark.parametrize("text", ["s3cret", "s3cret\n", "  s3cret \r\n", "s3cret\n\n"])
def test_token_of_a_file(tmp_path, text):
    """What an editor adds at the ends isn't part of it."""
    assert load_token(write_token(tmp_path / "token", text)) == "s3cret"


def test_token_of_the_environment(tmp_path, monkeypatch):
    """The variable is used when no file is named."""
    monkeypatch.setenv("PDIFFCOPY_TOKEN", "from-the-environment")
    assert load_token() == "from-the-environment"
    assert load_token(write_token(tmp_path / "token", "from-a-file")) == "from-a-file"


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("two words", "one line"),
        ("two\nlines", "one line"),
        ("bell\a", "one line"),
        ("é", "one line"),
        ("x" * 4097, "one line"),
        ("x" * 100000, "one line"),
    ],
)
def test_impossible_tokens(tmp_path, monkeypatch, text, complaint):
    """A token that is none is an error, which names its origin and not its contents."""
    with pytest.raises(UsageError, match=complaint) as info:
        load_token(write_token(tmp_path / "token", text))
    assert "token" in str(info.value) and (not text.strip() or text.strip() not in str(info.value))
    monkeypatch.setenv("PDIFFCOPY_TOKEN", text)
    with pytest.raises(UsageError, match=r"\$PDIFFCOPY_TOKEN"):
        load_token()


def test_longest_token(tmp_path):
    """There is a limit, and it's allowed."""
    assert load_token(write_token(tmp_path / "token", "x" * 4096)) == "x" * 4096


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o640, 0o620, 0o644, 0o666])
def test_token_that_others_can_read(tmp_path, mode):
    """A secret that isn't one is refused, with the remedy."""
    with pytest.raises(UsageError, match="chmod 600"):
        load_token(write_token(tmp_path / "token", "s3cret", mode))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_token_that_only_its_owner_can_read(tmp_path, mode):
    """What others can't read will do."""
    assert load_token(write_token(tmp_path / "token", "s3cret", mode)) == "s3cret"


def test_token_of_systemd(tmp_path, monkeypatch):
    """The credentials of a service look as if its group could read them; nothing else is forgiven."""
    path = write_token(tmp_path / "token", "s3cret", 0o440)
    with pytest.raises(UsageError, match="chmod"):
        load_token(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load_token(path) == "s3cret"
    for mode in (0o444, 0o460):
        with pytest.raises(UsageError, match="chmod"):
            load_token(write_token(tmp_path / "token", "s3cret", mode))


def test_token_file_that_is_missing(tmp_path, monkeypatch):
    """A file that was named has to be there: the variable is no substitute."""
    monkeypatch.setenv("PDIFFCOPY_TOKEN", "from-the-environment")
    with pytest.raises(FileMissingError, match="Can't read the token file .*missing"):
        load_token(str(tmp_path / "missing"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_token_file_that_cant_be_read(tmp_path):
    """A file without permission is an error."""
    with pytest.raises(FileForbiddenError, match="Permission denied"):
        load_token(write_token(tmp_path / "token", "s3cret", 0o000))


def test_token_file_that_is_no_file(tmp_path):
    """A folder, a FIFO or a device is refused, without waiting for it."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("The test hangs"))
    signal.alarm(10)
    before = set(os.listdir("/proc/self/fd"))
    try:
        for path in (tmp_path / "fifo", "/dev/zero"):
            with pytest.raises(UsageError, match="regular file"):
                load_token(str(path))
        with pytest.raises(FileError, match="directory"):
            load_token(str(tmp_path))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert set(os.listdir("/proc/self/fd")) <= before


# Checking a token {{{1


@pytest.mark.parametrize("header", ["Bearer s3cret", "bearer s3cret", "BEARER s3cret", "Bearer  s3cret "])
def test_right_token(header):
    """The scheme may be written in any case (RFC 9110)."""
    assert check_token("s3cret", header)


@pytest.mark.parametrize(
    "header",
    ["", "s3cret", "Bearer", "Bearer ", "Bearers3cret", "Basic s3cret", "Bearer S3CRET", "Bearer s3cre",
     "Bearer s3cret!", "Bearer s3cret s3cret", "Bearer é", "Bearer \udcff", "Bearer s3cret,", "\0", "Bearer s3cret\0"],
)  # fmt: skip
def test_wrong_token(header):
    """Anything else isn't the token."""
    assert not check_token("s3cret", header)


# Hosts and certificates {{{1


@pytest.mark.parametrize(
    "host, expected",
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("", False), ("0.0.0.0", False),
        ("::", False), ("10.0.0.1", False), ("example.org", False), ("localhost.example.org", False),
    ],
)  # fmt: skip
def test_loopback(host, expected):
    """Only what stays on this machine is loopback: all addresses aren't."""
    assert is_loopback(host) is expected


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The files of a certificate and its key."""
    folder = tmp_path_factory.mktemp("tls")
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    return str(folder / "cert.pem"), str(folder / "key.pem")


def test_certificate_with_its_key(certificate):
    """Both or none of them."""
    check_certificate(*certificate)
    check_certificate("", "")


def test_half_a_certificate(certificate):
    """One without the other doesn't start."""
    for files in [(certificate[0], ""), ("", certificate[1])]:
        with pytest.raises(UsageError, match="go together"):
            check_certificate(*files)


def test_impossible_certificates(certificate, tmp_path):
    """Files that are missing, no certificates, or don't belong together are refused before the server starts."""
    (tmp_path / "text").write_text("text")
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(str(other))
    cert, key = certificate
    for files in [(cert, str(tmp_path / "missing")), (str(tmp_path / "text"), key), (key, cert), (cert, str(other))]:
        with pytest.raises(UsageError, match="Can't use the certificate") as info:
            check_certificate(*files)
        assert files[0] in str(info.value) and files[1] in str(info.value)
