"""
Parallel, differential file copy client.

The documented names are here; the rest of this package is what they are made of.
"""

from pdiffcopy.client.client import Client
from pdiffcopy.client.location import Location, get_hashes_fn, transfer_block_fn
from pdiffcopy.client.network import Network
from pdiffcopy.client.report import Report

__all__ = ["Client", "Location", "Network", "Report", "get_hashes_fn", "transfer_block_fn"]
