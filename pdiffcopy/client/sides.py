"""
What is done with several small files of one side at a time?

On this machine one after the other, and behind a server in one exchange. A file that something goes wrong with doesn't
concern the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from pdiffcopy import __version__
from pdiffcopy.answers import CLAIMED, PeerInfo, decode_flag, decode_info, decode_metadata
from pdiffcopy.blocks import FileInfo, Metadata
from pdiffcopy.bundles import PartAnswer
from pdiffcopy.client.exchanges import exchange_many
from pdiffcopy.client.remote import RemoteReplica
from pdiffcopy.exceptions import FileMissingError, ProgramError
from pdiffcopy.features import FEATURES
from pdiffcopy.files.splice import Chunk
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.methods import get_methods
from pdiffcopy.protocol import InfoRequest, MakeFolderRequest, MetadataRequest, SetMetadataRequest
from pdiffcopy.replica import Reading, Replica
from pdiffcopy.request import Request
from pdiffcopy.wholes import CreateRequest, FetchRequest, FileSummary, SummaryRequest, decode_summary

T = TypeVar("T")

MISSING = FileInfo(False)


class Question(NamedTuple):
    """What a digest of contents is made of."""

    block_size: int
    method: str
    grain: int


class Creation(NamedTuple):
    """A file that is going to be created."""

    info: FileInfo
    """What the source is."""
    reading: Reading
    in_advance: bool
    """Whether it takes all of its room on the disk at once."""
    metadata: Metadata
    """What it gets in the end."""


class Files(Protocol):
    """The files of one side. What is asked for is told by their numbers; :data:`None` stands for any failure."""

    @property
    def replicas(self) -> Sequence[Replica]:
        """All there are, by their numbers."""

    @property
    def peer(self) -> PeerInfo:
        """What their side can do."""

    def make_folders(self, modes: Sequence[int]) -> list[bool]:
        """Make all of them, which are folders, and tell whether they exist."""

    def summarize(self, which: Sequence[int], question: Question) -> list[FileSummary | None]:
        """Tell what is to be known of files that may be equal to others."""

    def infos(self, which: Sequence[int]) -> list[FileInfo | None]:
        """Tell size and identity of files."""

    def metadata(self, which: Sequence[int]) -> list[Metadata | None]:
        """Tell the metadata of files."""

    def set_metadata(self, wanted: Mapping[int, Metadata]) -> list[bool]:
        """Give files other metadata, and tell whether they have got them."""

    def fetch(
        self, which: Sequence[int], state_digest: bool
    ) -> AbstractContextManager[list[tuple[FileInfo, Reading] | None]]:
        """Read files. Their contents can be consumed in their order."""

    def create(self, creations: Mapping[int, Creation], run: str) -> list[bool | None]:
        """Create files, and tell whether they could be claimed."""


def group_files(replicas: Sequence[Replica]) -> Files:
    """Get hold of some files, all of which are on this machine or behind the same server."""
    near = [replica for replica in replicas if isinstance(replica, LocalReplica)]
    far = [replica for replica in replicas if isinstance(replica, RemoteReplica)]
    return _Near(near) if near else _Far(far)


class _Near:
    """Files of this machine."""

    def __init__(self, replicas: list[LocalReplica]):
        self.replicas: Sequence[LocalReplica] = replicas
        self.peer = PeerInfo(__version__, FEATURES, get_methods())

    def make_folders(self, modes: Sequence[int]) -> list[bool]:
        return [_try(partial(self._make_folder, i, mode)) is True for i, mode in enumerate(modes)]

    def _make_folder(self, i: int, mode: int) -> bool:
        self.replicas[i].make_folder(mode)
        return True

    def summarize(self, which: Sequence[int], question: Question) -> list[FileSummary | None]:
        return [_try(partial(self._summarize, i, question)) for i in which]

    def _summarize(self, i: int, question: Question) -> FileSummary:
        try:
            return self.replicas[i].summarize(*question)
        except FileMissingError:
            return FileSummary(MISSING)

    def infos(self, which: Sequence[int]) -> list[FileInfo | None]:
        return [_try(partial(self._look, i)) for i in which]

    def _look(self, i: int) -> FileInfo:
        return self.replicas[i].info()[0]

    def metadata(self, which: Sequence[int]) -> list[Metadata | None]:
        return [_try(self.replicas[i].metadata) for i in which]

    def set_metadata(self, wanted: Mapping[int, Metadata]) -> list[bool]:
        return [_try(partial(self._set, i, metadata)) is True for i, metadata in wanted.items()]

    def _set(self, i: int, metadata: Metadata) -> bool:
        self.replicas[i].set_metadata(metadata)
        return True

    @contextmanager
    def fetch(
        self, which: Sequence[int], state_digest: bool
    ) -> Generator[list[tuple[FileInfo, Reading] | None], None, None]:
        with ExitStack() as stack:
            yield [_try(partial(self._open, i, state_digest, stack)) for i in which]

    def _open(self, i: int, state_digest: bool, stack: ExitStack) -> tuple[FileInfo, Reading]:
        return stack.enter_context(self.replicas[i].fetch(state_digest))

    def create(self, creations: Mapping[int, Creation], run: str) -> list[bool | None]:
        return [_try(partial(self._create, i, creation, run)) for i, creation in creations.items()]

    def _create(self, i: int, creation: Creation, run: str) -> bool:
        info, reading, in_advance, metadata = creation
        return self.replicas[i].create(reading, run, info.mode, in_advance, metadata)[0]


def _try(action: Callable[[], T]) -> T | None:
    try:
        return action()
    except ProgramError:
        return None


class _Far:
    """Files behind a server."""

    def __init__(self, replicas: list[RemoteReplica]):
        self.replicas: Sequence[RemoteReplica] = replicas
        self.server = replicas[0].server

    @property
    def peer(self) -> PeerInfo:
        return self.server.peer or self.replicas[0].info()[1]

    def make_folders(self, modes: Sequence[int]) -> list[bool]:
        requests = [self._make(i, MakeFolderRequest, mode=mode) for i, mode in enumerate(modes)]
        return [answer.status == 200 for answer in self._ask(requests)]

    def summarize(self, which: Sequence[int], question: Question) -> list[FileSummary | None]:
        requests = [self._make(i, SummaryRequest, **question._asdict()) for i in which]
        return [FileSummary(MISSING) if a.status == 404 else _read(a, decode_summary) for a in self._ask(requests)]

    def infos(self, which: Sequence[int]) -> list[FileInfo | None]:
        answers = self._ask([self._make(i, InfoRequest) for i in which])
        return [_read(answer, _decode_info) for answer in answers]

    def metadata(self, which: Sequence[int]) -> list[Metadata | None]:
        return [_read(answer, decode_metadata) for answer in self._ask([self._make(i, MetadataRequest) for i in which])]

    def set_metadata(self, wanted: Mapping[int, Metadata]) -> list[bool]:
        requests = [self._make(i, SetMetadataRequest.of, metadata) for i, metadata in wanted.items()]
        return [answer.status == 200 for answer in self._ask(requests)]

    @contextmanager
    def fetch(
        self, which: Sequence[int], state_digest: bool
    ) -> Generator[list[tuple[FileInfo, Reading] | None], None, None]:
        requests = [self._make(i, FetchRequest, digest=state_digest) for i in which]
        with exchange_many(self.server, requests) as parts:
            yield [self._get_whole(answer, chunks, state_digest) for answer, chunks in parts]

    def _get_whole(
        self, answer: PartAnswer, chunks: Iterable[Chunk], state_digest: bool
    ) -> tuple[FileInfo, Reading] | None:
        info = _read(answer, _decode_info)
        is_whole = info and info.size == answer.size and bool(answer.digest) == state_digest
        return (info, Reading(chunks, answer.digest, size=answer.size)) if info and is_whole else None

    def create(self, creations: Mapping[int, Creation], run: str) -> list[bool | None]:
        requests = [
            self._make(
                i, CreateRequest.of, metadata, run=run, new_mode=info.mode, in_advance=in_advance, digest=reading.digest
            )
            for i, (info, reading, in_advance, metadata) in creations.items()
        ]  # fmt: skip
        answers = self._ask(requests, [creation.reading for creation in creations.values()])
        return [_read(answer, lambda text: decode_flag(text, CLAIMED)) for answer in answers]

    def _make(self, i: int, make: Callable[..., Request], *arguments: Any, **words: Any) -> Request:
        replica = self.replicas[i]
        if make in (SummaryRequest, FetchRequest):
            words["flush"] = replica.flush
        elif make in (MetadataRequest, SetMetadataRequest.of):
            words["folder"] = replica.is_folder
        return make(*arguments, filename=replica.filename, within=replica.within, **words)

    def _ask(self, requests: Sequence[Request], contents: Sequence[Reading] = ()) -> list[PartAnswer]:
        if not requests:
            return []
        with exchange_many(self.server, requests, contents) as parts:
            return [answer for answer, _ in parts]


def _decode_info(text: bytes) -> FileInfo:
    return decode_info(text, exists=True)[0]


def _read(answer: PartAnswer, decode: Callable[[bytes], T]) -> T | None:
    """Read an answer, if that's one."""
    return _try(partial(decode, answer.document)) if answer.status == 200 else None
