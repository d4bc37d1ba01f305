"""Configuration defaults for the pdiffcopy program."""

__all__ = ["BLOCK_SIZE", "DEFAULT_CONCURRENCY", "DEFAULT_PORT", "DEFAULT_RETRIES", "DEFAULT_TIMEOUT", "__version__"]

__version__ = "2.0.0"

BLOCK_SIZE = 1024 * 1024
"""The default block size in bytes (1 MiB)."""

DEFAULT_CONCURRENCY: int
"""The default concurrency: a third of the cores that may be used, but at least two."""

DEFAULT_PORT = 8080
"""The default port number of the server."""

DEFAULT_RETRIES = 8
"""How often a failed network request is tried again: with the backoff of :mod:`.retry` about 20 seconds."""

DEFAULT_TIMEOUT = 60.0
"""How long the client waits for a sign of life of the server, in seconds."""


def __getattr__(name: str) -> int:
    """Count the cores when that's asked for: a signal may arrive while the first module is being imported."""
    if name != "DEFAULT_CONCURRENCY":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pdiffcopy.cores import count_cores

    return max(2, count_cores() // 3)
