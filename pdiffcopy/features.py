"""
What can a peer do that version 1.0.1 can't?

What was added since that version is optional (docs/design.rst). Some of it a server of that version ignores:

``file_id=``
    Which file the name has to lead to (see :class:`.FileInfo`). Otherwise the answer is 412, and nothing was touched.
``flush=1``
    Dirty pages are written back before ``/hashes`` and ``GET /blocks`` read them (see :func:`.kernel.write_back`).
``nonce=``
    A word that no other request has, so that no cache has an answer to it.

The rest a client uses only when the server lists it as a *feature* in its answer to ``/info``:

:data:`FEATURE_ANSWER`
    Each answer to a request with the header :data:`.REQUEST_HEADER` says in :data:`.ANSWER_HEADER` to which request it
    belongs (:func:`.sign_answer`), and documents state their digest in :data:`.DIGEST_HEADER`.
:data:`FEATURE_ATOMIC`
    ``POST /stage?filename=&run=`` lets a new version of a file begin beside the old one, with its contents and all that
    belongs to it, and claims it. While that takes time, empty lines keep the connection alive; the last lines are a
    document, which says what the new version is called and what ``/info`` says of it, and :data:`.DONE`, or there is a
    problem. ``takes=`` is the room that it takes at least, ``mode=`` for whom it is where there is no old version.
    ``POST /commit?filename=&new_id=&file_id=&ctime_ns=`` lets it take the place of the old one (after a flush), unless
    that has changed, and answers with what ``/info`` says of it.
:data:`FEATURE_BLOCKWISE`
    ``POST /blocks`` with ``block_size=`` (and ``method=``) states a blockwise digest: that of its blocks' digests
    (:mod:`.digests`).
:data:`FEATURE_CLAIM`
    ``POST /claim?filename=&run=`` makes a run, named by a random word, the only one that may write to a file until
    the next claim or ``POST /release?filename=&run=``. Both answer with what ``/info`` says of the file, and with
    :data:`.CLAIMED`. With ``create=1`` the claim creates a missing file (and missing parent folders), for those whom
    ``mode=`` allows it (permission bits, a decimal number). ``GET /info``,
    ``POST /blocks``, ``POST /resize`` and ``POST /sync`` with a ``run=`` that has lost its claim answer 423. Without it
    they work as ever.
:data:`FEATURE_DIGEST`
    ``GET /blocks`` with ``digest=1`` states the digest of the bytes in the header :data:`.DIGEST_HEADER` (and with
    ``data=0`` nothing else). On
    ``POST /blocks`` the client may state it; the server compares with what lies in the target after the write
    and answers 409 if that differs. The digest is XXH128 (https://github.com/Cyan4973/xxHash), 32 hexadecimal digits.
:data:`FEATURE_DROP`
    With ``drop=1`` what ``/hashes``, ``/pieces``, ``/blocks``, ``/zeros`` and ``/stage`` read and write leaves the
    page cache of the server again, unless it was there before. ``/info`` answers 403 where that isn't possible.
:data:`FEATURE_EXTENTS`
    ``/blocks`` takes ``extents=OFFSET:SIZE,OFFSET:SIZE,...`` instead of offset and size: the body carries the bytes
    of all of them, one after the other.
:data:`FEATURE_LIST`
    ``GET /list?filename=&depth=`` tells what a name leads to and, if that is a folder, what lies in it, down to a
    number of levels: a line of kind, size, time and name (percent-encoded) for each, in the order of :mod:`.entries`,
    as a stream with checks.
:data:`FEATURE_MANY`
    ``POST /many`` does what several requests ask for, which are its body (:mod:`.bundles`).
:data:`FEATURE_METADATA`
    ``GET /metadata?filename=`` tells mode, owner, group and time of a file, ``POST /metadata`` sets what is given of
    them. With ``in_advance=1`` it's only found out what would be refused, and those lose access who aren't going to
    have any. ``/info`` tells whether the server sets set-id bits (``sets_id``).
:data:`FEATURE_PIECES`
    ``GET /pieces?filename=&extents=&size=&method=`` answers with the digests of the pieces of some extents, as they
    are, one after the other. And ``/blocks`` takes ``packed=``, which are extents in a short form (:class:`.Packed`).
:data:`FEATURE_RESUME`
    ``/hashes`` takes ``offset=`` (a multiple of the block size) and ``stop=``, and its lines come in order. With
    ``checks=1`` the digest of the lines follows after each few of them (:func:`.add_check`), empty lines keep the
    connection alive, and the last line is :data:`.DONE` or a problem.
:data:`FEATURE_SPARSE`
    ``/hashes`` takes ``grain=`` together with ``checks=1``: a line of an offset, ``hole`` and a size stands for all
    blocks of a hole, and a digest is followed by a dot and a digest of the layout of the holes in its block, if it has
    some (as far as they consist of whole grains of the file, none of which is cut by the block; of
    ``BEGIN:END,BEGIN:END,...`` in bytes from the beginning of the block).
    ``GET /holes?filename=&offset=&stop=&grain=`` tells holes, and how far it has looked.
    ``POST /zeros?filename=&packed=`` makes zeros of some extents: with ``keep=1`` such that take room on the disk,
    otherwise holes (or not, where the answer says that there can be none). ``/info`` tells the ``grain`` of a file
    system (the size of its blocks), whether a file ``has_holes``, how much room is ``allocated`` to it, and how much
    ``room`` is left there. ``POST /resize`` with ``in_advance=1`` lets a file take all of its room at once.
:data:`FEATURE_SYNC`
    ``POST /sync?filename=`` flushes the file to its disk. While that takes time, empty lines keep the connection
    alive; the last line is :data:`.DONE` or a problem.
"""

from __future__ import annotations

FEATURE_ANSWER, FEATURE_BLOCKWISE, FEATURE_CLAIM, FEATURE_DIGEST = "answer", "blockwise", "claim", "digest"
FEATURE_ATOMIC, FEATURE_METADATA = "atomic", "metadata"
FEATURE_EXTENTS, FEATURE_PIECES, FEATURE_RESUME, FEATURE_SYNC = "extents", "pieces", "resume", "sync"
FEATURE_LIST, FEATURE_MANY, FEATURE_SPARSE, FEATURE_DROP = "list", "many", "sparse", "drop"
FEATURES = frozenset(
    [
        FEATURE_ANSWER,
        FEATURE_ATOMIC,
        FEATURE_BLOCKWISE,
        FEATURE_CLAIM,
        FEATURE_DIGEST,
        FEATURE_DROP,
        FEATURE_EXTENTS,
        FEATURE_LIST,
        FEATURE_MANY,
        FEATURE_METADATA,
        FEATURE_PIECES,
        FEATURE_RESUME,
        FEATURE_SPARSE,
        FEATURE_SYNC,
    ]
)
