"""How a peer of a session fails: two errors that the loop, the engine and the network agree on."""

from __future__ import annotations


class PeerGone(ConnectionError):
    """The replica a session runs on cannot go on with it; another one may."""


class PeerBusy(PeerGone):
    """It has no room for the session now."""
