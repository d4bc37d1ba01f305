"""Which hash methods are there, and how are they called?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

from pdiffcopy import digests
from pdiffcopy.exceptions import UsageError


def find_method(method: str) -> str:
    """
    Find the name that both sides of a copy have for a hash method.

    :param method: The name in any of the spellings that Python allows, like ``SHA1``.
    :raises: :exc:`.UsageError` when there is no such method here.
    """
    for name in (method, method.lower()):
        if name in get_methods():
            return name
    get_hasher(method)
    return str(hashlib.new(method, usedforsecurity=False).name)


def get_hasher(method: str) -> Callable[..., Any]:
    """
    Find a hash method.

    :param method: ``xxh128``, ``blake3`` or a fixed-length method of :mod:`hashlib`.
    :returns: A function that makes objects with the methods ``update()`` and ``hexdigest()``.
    :raises: :exc:`.UsageError` when there is no such method here.
    """
    hasher = _find_hasher(method)
    if not hasher:
        methods = ", ".join(sorted(get_methods()))
        raise UsageError("There is no hash method {method} here: try one of {methods}", method=method, methods=methods)
    return hasher


@cache
def get_methods() -> frozenset[str]:
    """The names of all hash methods that work here."""
    return frozenset(filter(_find_hasher, {digests.METHOD, "blake3"} | hashlib.algorithms_available))


@lru_cache(maxsize=256)
def _find_hasher(method: str) -> Callable[..., Any] | None:
    if method == digests.METHOD:
        return digests.new_hasher
    if method == "blake3":
        try:
            from blake3 import blake3
        except ImportError:  # there's no wheel of it for some machines
            return None
        return blake3
    try:
        # A method of variable length (SHAKE) has no digest size, and one that the policy of the system forbids fails.
        if hashlib.new(method, usedforsecurity=False).digest_size:
            return partial(hashlib.new, method, usedforsecurity=False)
    except (ValueError, TypeError):  # the latter for a NUL byte or what isn't UTF-8
        pass
    return None
