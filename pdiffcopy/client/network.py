"""How are servers talked to, as far as users decide that?"""

from __future__ import annotations

from typing import NamedTuple

from pdiffcopy import DEFAULT_RETRIES, DEFAULT_TIMEOUT


class Network(NamedTuple):
    """Patience and credentials."""

    timeout: float = DEFAULT_TIMEOUT
    """How long to wait for a sign of life, in seconds."""
    retries: int = DEFAULT_RETRIES
    """How often in a row a request may fail before the run does."""
    token: str = ""
    """The shared secret that the servers ask for (empty for none)."""
    ca_file: str = ""
    """The certificate authority to trust for https (empty for those that requests trusts)."""

    def __repr__(self) -> str:
        """Leave out the token, which is a secret."""
        return f"Network(timeout={self.timeout}, retries={self.retries}, ca_file={self.ca_file!r})"
