"""What do users configure who want to copy a file?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from property_manager import PropertyManager, cached_property, mutable_property

from pdiffcopy import BLOCK_SIZE, DEFAULT_CONCURRENCY
from pdiffcopy.address import Address, parse_location
from pdiffcopy.blocks import BlockDigest, Extent
from pdiffcopy.client.network import Network
from pdiffcopy.client.servers import Servers
from pdiffcopy.exceptions import FileMissingError, UsageError, printable
from pdiffcopy.files.names import make_absolute
from pdiffcopy.replica import Reading, Replica
from pdiffcopy.words import make_query


class Location(PropertyManager):
    """A local or remote file to be copied."""

    _servers: Servers | None = None

    @mutable_property
    def expression(self) -> str:
        """The location expression (a string), see :func:`.parse_location`."""
        return str(self.address)

    @expression.setter
    def expression(self, value: str) -> None:
        """Split a location expression into :attr:`scheme`, :attr:`hostname`, :attr:`port_number`, :attr:`filename`."""
        address = parse_location(value)
        self.filename = make_absolute(address.filename) if address.is_near else address.filename
        self.hostname = address.hostname or None
        self.port_number = None if address.is_near else address.port
        self.scheme = address.scheme

    @mutable_property
    def filename(self) -> str | None:
        """The absolute pathname of the file to copy (a string)."""

    @mutable_property
    def hostname(self) -> str | None:
        """The host name of a pdiffcopy server (a string or :data:`None`)."""

    @mutable_property
    def port_number(self) -> int | None:
        """The port number of a pdiffcopy server (a number or :data:`None`)."""

    @mutable_property
    def scheme(self) -> str:
        """How the server is spoken to (``http`` or ``https``)."""
        return "http"

    @mutable_property
    def network(self) -> Network:
        """Timeout, retries and credentials (a :class:`Network` object)."""
        return Network()

    @property
    def address(self) -> Address:
        """What identifies the file (an :class:`.Address`)."""
        if not self.filename:
            raise UsageError("A location needs an expression or a filename")
        if not self.hostname:
            return Address(self.filename)
        defaults = Address(self.filename)
        return Address(self.filename, self.hostname, self.port_number or defaults.port, self.scheme)

    @property
    def replica(self) -> Replica:
        """What does the work (a :class:`.Replica`). Its connections stay open until :meth:`close` is called."""
        if not self._servers or self._servers.network != self.network:
            self.close()
            self._servers = Servers(self.network)
        return self._servers.open(self.address)

    def close(self) -> None:
        """Close the connections to the server. They are opened again when they are needed."""
        if self._servers:
            self._servers.close()

    @property
    def label(self) -> str:
        """A human friendly label for the location (a string)."""
        return printable(str(self.address))

    @cached_property(repr=False)
    def file_info(self) -> dict[str, Any]:
        """A dictionary with file metadata (empty when the file doesn't exist)."""
        return self.replica.info()[0].as_dict()

    @cached_property(repr=False)
    def exists(self) -> bool:
        """:data:`True` if the file exists, :data:`False` otherwise."""
        return bool(self.file_info)

    @cached_property(repr=False)
    def file_size(self) -> int:
        """The size of the file in bytes (an integer)."""
        if not self.exists:
            raise FileMissingError("The file {label} doesn't exist", label=self.label)
        return int(self.file_info["size"])

    def get_hashes(self, **options: Any) -> Iterator[tuple[int, str]]:
        """
        Get the hashes of the blocks in a file.

        :param options: ``block_size``, ``method`` and ``concurrency``, see :func:`.compute_hashes`.
        :returns: A generator of tuples with two values each:

                  1. A byte offset into the file (an integer).
                  2. The hash of the block starting at that offset (a string).
        """
        size = self.replica.info()[0].size if self.exists else self.file_size
        stripes = self.replica.hashes(
            options.get("block_size", BLOCK_SIZE),
            options.get("method", "sha1"),
            options.get("concurrency", DEFAULT_CONCURRENCY),
            stop=size,
        )
        return (block for stripe in stripes for block in stripe if isinstance(block, BlockDigest))

    def get_url(self, endpoint: str, **params: Any) -> str:
        """
        Get the server URL for the given endpoint.

        :param endpoint: The name of a server side endpoint (a string).
        :param params: Any query string parameters.
        """
        if self.address.is_near:
            raise UsageError("{label} is a local file: it has no URL", label=self.label)
        return f"{self.address.base}/{endpoint}?{make_query(self.address.filename, **params)}"

    def read_block(self, offset: int, size: int) -> bytes:
        """
        Read a block of data from :attr:`filename`.

        :param offset: The byte offset where reading starts (an integer).
        :param size: The number of bytes to read (an integer).
        :returns: A byte string (shorter than `size` at the end of the file).
        """
        with self.replica.read([Extent(offset, size)], clip=True) as reading:
            return b"".join(map(bytes, reading.chunks))

    def write_block(self, offset: int, data: bytes) -> None:
        """
        Write a block of data to :attr:`filename`.

        :param offset: The byte offset where writing starts (an integer).
        :param data: The byte string to write to the file.
        """
        if data:
            self.replica.write([Extent(offset, len(data))], Reading([data]))

    def resize(self, size: int) -> None:
        """
        Adjust the size of :attr:`filename` to the given size.

        :param size: The new file size in bytes (an integer).
        """
        self.replica.resize(size)


def get_hashes_fn(location: Location, **options: Any) -> dict[int, str]:
    """
    Adapter for multiprocessing: get all hashes of a location at once.

    :param options: See :meth:`.Location.get_hashes`.
    :returns: A dictionary of offsets and hashes.
    """
    return dict(location.get_hashes(**options))


def transfer_block_fn(offset: int, source: Location, target: Location, block_size: int) -> int:
    """
    Adapter for multiprocessing: transfer one block.

    :returns: The offset, so that a caller knows which block is done.
    """
    target.write_block(offset, source.read_block(offset, block_size))
    return offset
