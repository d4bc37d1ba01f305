"""How are several requests exchanged for their answers at once?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pdiffcopy.bundles import ManyRequest, PartAnswer, decode_answers, decode_frame, encode_frame, encode_requests
from pdiffcopy.client.exchange import Server
from pdiffcopy.exceptions import DamagedError, TransientError
from pdiffcopy.files.splice import Chunk, Parts, PartsError
from pdiffcopy.files.stored import Joined
from pdiffcopy.replica import Reading
from pdiffcopy.request import Request

_NONE = Reading(())


@contextmanager
def exchange_many(
    server: Server, requests: Sequence[Request], contents: Sequence[Reading] = ()
) -> Iterator[list[tuple[PartAnswer, Iterable[Chunk]]]]:
    """
    Exchange several requests.

    :param contents: What belongs to each of them (by default nothing).
    :returns: For each of them its answer, and the contents that belong to that. They can be consumed in their order.
    :raises: What :meth:`.Server.exchange` raises. Nothing is repeated.
    """
    contents = contents or [_NONE] * len(requests)
    head = encode_frame(encode_requests(requests, [reading.size for reading in contents]))
    body = Joined([[head], *(reading.chunks for reading in contents if reading.size)])
    size = len(head) + sum(reading.size for reading in contents)
    with server.exchange(ManyRequest(), Reading(body, size=size)) as answer:
        parts = Parts(answer.read_exactly(answer.length))
        try:
            answers = decode_answers(decode_frame(parts.take_bytes), len(requests))
            yield [(part, parts.take(part.size)) for part in answers]
            parts.end()
        except (DamagedError, PartsError) as e:
            url = server.get_address("/")
            raise TransientError("{url}: the server's answer is damaged ({reason})", url=url, reason=e, status=0) from e
