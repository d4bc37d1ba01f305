"""How it is spelled where a file is, and where a server listens."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pdiffcopy import DEFAULT_PORT
from pdiffcopy.address import Address, join_host_port, parse_listen, parse_location
from pdiffcopy.exceptions import UsageError

# What a command line can carry: all characters but NUL, and bytes that aren't UTF-8 as lone surrogates.
ARGUMENTS = st.text(st.one_of(st.characters(codec="utf-8"), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)))

# Locations {{{1


@pytest.mark.parametrize(
    "expression, filename, hostname, port, scheme",
    [
        ("http://host:123/a/b", "/a/b", "host", 123, "http"),
        ("http://host/a", "/a", "host", DEFAULT_PORT, "http"),
        ("https://host/a", "/a", "host", DEFAULT_PORT, "https"),
        ("HTTP://host/a%20b", "/a b", "host", DEFAULT_PORT, "http"),
        ("Https://Host:99/A", "/A", "host", 99, "https"),
        ("http://[::1]:99/a", "/a", "::1", 99, "http"),
        ("http://10.0.0.1/a%20b%3F%23%25%2B+c", "/a b?#%++c", "10.0.0.1", DEFAULT_PORT, "http"),
        ("http://host/%C3%A9%FF%0A", "/é\udcff\n", "host", DEFAULT_PORT, "http"),
        ("http://host/é", "/é", "host", DEFAULT_PORT, "http"),
        ("http://host/\udcff", "/\udcff", "host", DEFAULT_PORT, "http"),
        ("http://host//a//b", "//a//b", "host", DEFAULT_PORT, "http"),
        ("http://host/a b", "/a b", "host", DEFAULT_PORT, "http"),
        ("http://host/ a ", "/ a ", "host", DEFAULT_PORT, "http"),
        ("http://[fe80::1%25eth0]:8/a", "/a", "fe80::1%eth0", 8, "http"),
        ("http://[fe80::1%30]:8/a", "/a", "fe80::1%30", 8, "http"),
        ("[fe80::1%30]:8/a", "/a", "fe80::1%30", 8, "http"),
        ("http://host/a:b@c", "/a:b@c", "host", DEFAULT_PORT, "http"),
        ("host:/a", "/a", "host", DEFAULT_PORT, "http"),
        ("host:123/a/b", "/a/b", "host", 123, "http"),
        ("my-host.example_1.org:1/a", "/a", "my-host.example_1.org", 1, "http"),
        ("host:65535/a%20b?c#d +\n:é\udcff", "/a%20b?c#d +\n:é\udcff", "host", 65535, "http"),
        ("[::1]:8/a", "/a", "::1", 8, "http"),
        ("[fe80::1%eth0]:8/a", "/a", "fe80::1%eth0", 8, "http"),
        ("[::ffff:1.2.3.4]:/a", "/a", "::ffff:1.2.3.4", DEFAULT_PORT, "http"),
    ],
)
def test_remote_locations(expression, filename, hostname, port, scheme):
    """URLs are percent-decoded, the short form is literal."""
    assert parse_location(expression) == Address(filename, hostname, port, scheme)


@pytest.mark.parametrize(
    "expression",
    [
        "x", "/a/b", "a/b", ".", "..", "-", "./x:1.img", "/x:1", "./host:", "./host:8080/x", "/host:8080/x", "a/b:/c",
        "/http://host/a", "./s3://bucket/x", "a b", " ", "a\nb", "é\udcff", "%41", "dir/user@host:/x",
    ],
)  # fmt: skip
def test_local_locations(expression):
    """Everything else is the name of a local file, as it is."""
    address = parse_location(expression)
    assert address == Address(expression)
    assert str(address) == expression
    assert not address.hostname


@pytest.mark.parametrize(
    "expression, complaint",
    [
        ("", "empty"),
        ("a\0b", "NUL"),
        ("host:/a\0b", "NUL"),
        ("http://host/a\0", "NUL"),
        ("http://host/%00", "NUL"),
        ("http://host", "no file"),
        ("http://", "no file"),
        ("http:///a", "no host"),
        ("https://:8080/a", "no host"),
        ("http://a%41/b", "host name"),
        ("a b:/c", "host name"),
        ("ö:/c", "host name"),
        ("[]:/a", "no host"),
        ("[:::::]:/a", "host name"),
        ("[::1%]:/a", "host name"),
        ("\x1b[2J:/c", "local file"),
        ("http://[::1/a", "valid URL"),
        ("http://host/a\nb", "%0A"),
        ("http://a b/c", "host name"),
        ("s3://bucket/x", "no scheme s3, use http or https .or ./s3://bucket/x for"),
        ("udp://host/x", "no scheme udp"),
        ("ssh://host/x", "no scheme ssh"),
        ("user@host:/x", "no user, write host:/x "),
        ("root@host:8080/x@y", "no user, write host:8080/x@y "),
        ("http:/host:8080/x", "two slashes"),
        ("http://::1:8080/x", "IPv6 address in brackets"),
        ("::1:8080/x", "IPv6 address in brackets"),
        *(
            (text, "could be a local file or a remote one")
            for text in (
                "db2:data/x",
                "db2:8080",
                "host::module/x",
                "user@host:x",
                "host:",
                "host:8080x/a",
                ":/a",
                "x:1.img",
                "::1/a",
                "[::1]/a",
                "a:b:/c",
                "host:-1/a",
                "\x1b[2J:x",
                "[::1]:x/a",
            )
        ),
        ("a..b:/c", "host name"),
        (f"{'a' * 64}.example:/c", "host name"),
        ("http://host/100%", "%25 for %"),
        ("http://host/%zz", "%25 for %"),
        ("http://host/a?b", "%3F"),
        ("http://host/a?", "%3F"),
        ("http://host/a#b", "%23"),
        ("http://host/a#", "%23"),
        ("http://host:x/a", "65535"),
        ("http://host:0/a", "65535"),
        ("http://host:65536/a", None),
        ("host:0/a", "65535"),
        ("host:65536/a", "65535"),
        ("host:٣/a", "65535"),
        ("host:" + "9" * 5000 + "/a", "65535"),
        ("http://host:" + "9" * 5000 + "/a", None),
        ("HTTP://host", "no file"),
        ("http://me@host/a", "password"),
        ("HTTPS://me:secret@host/a", "password"),
        ("http://me:secret@host/a", "password"),
    ],
)
def test_impossible_locations(expression, complaint):
    """What looks remote but can't be is refused, and the message says why (a password isn't repeated in it)."""
    with pytest.raises(UsageError, match=complaint) as info:
        parse_location(expression)
    assert isinstance(info.value, ValueError)
    assert "secret" not in str(info.value)


LOCATIONS = st.one_of(
    ARGUMENTS,
    st.builds("http://{}".format, ARGUMENTS),
    st.builds("https://{}/{}".format, ARGUMENTS, ARGUMENTS),
    st.builds("host:{}/{}".format, ARGUMENTS, ARGUMENTS),
    st.builds("[{}]:{}/{}".format, st.text("0123456789abcdef:.%[]"), st.integers(), ARGUMENTS),
    st.text("hpst:/[]@?#%0123456789 \0\n"),
)


@given(LOCATIONS)
@example("http://[")
@example("http://[v1.x]/a")
@example("http://ab\u2100c/x")
def test_any_location_is_parsed_or_refused(expression):
    """Nothing but a usage error comes of nonsense, and what was understood can be spelled and understood again."""
    try:
        address = parse_location(expression)
    except UsageError as e:
        assert str(e).isprintable()
        return
    assert address.filename and "\0" not in address.filename
    assert 0 < address.port < 65536
    again = parse_location(str(address))
    # A URL spells the name of a host in small letters.
    assert again._replace(hostname="") == address._replace(hostname="")
    assert again.hostname.lower() == address.hostname.lower()


@given(ARGUMENTS.map("/".__add__), st.sampled_from(["host", "::1", "10.0.0.1"]), st.integers(1, 65535))
def test_any_remote_name_survives_its_url(filename, hostname, port):
    """The URL of a file is plain ASCII, and its spelling leads back to the same bytes."""
    assume("\0" not in filename)
    for scheme in ("http", "https"):
        address = Address(filename, hostname, port, scheme)
        assert str(address).isascii()
        assert parse_location(str(address)) == address
        url = urlsplit(address.base)
        assert (url.scheme, url.hostname, url.port, url.path) == (scheme, hostname, port, "")


# Where a server listens {{{1


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("8080", ("", 8080)),
        ("1", ("", 1)),
        ("host", ("host", DEFAULT_PORT)),
        ("127.0.0.1", ("127.0.0.1", DEFAULT_PORT)),
        ("127.0.0.1:99", ("127.0.0.1", 99)),
        ("host:99", ("host", 99)),
        ("[::1]", ("::1", DEFAULT_PORT)),
        ("[::1]:99", ("::1", 99)),
        ("[::]:99", ("::", 99)),
        (":99", ("", 99)),
    ],
)
def test_listen_addresses(expression, expected):
    """PORT, HOST, HOST:PORT and [v6]:PORT."""
    assert parse_listen(expression) == expected


@pytest.mark.parametrize(
    "expression",
    ["", "0", "65536", "host:", "host:x", "host:0", "host:-1", "::1", "::1:99", "[::1", "[::1:99", "[::1]99",
     "[::1]:", "[]:99", "a..b:1", "a b", "a/b:1", "host:1:2", "٣", "9" * 5000],
)  # fmt: skip
def test_impossible_listen_addresses(expression):
    """Everything else is refused."""
    with pytest.raises(UsageError):
        parse_listen(expression)


@given(st.text())
def test_any_listen_address_is_parsed_or_refused(expression):
    """Nothing but a usage error comes of nonsense."""
    try:
        host, port = parse_listen(expression)
    except UsageError:
        return
    assert 0 < port < 65536
    assert not host or parse_listen(join_host_port(host, port)) == (host, port)
