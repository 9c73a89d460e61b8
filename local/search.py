"""Where the runner looks for the programs it calls. Called by local.supervisor, local.trial and local.check, so that they agree."""

from __future__ import annotations

import os

_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def search_path() -> str:
    """PATH, and where Debian keeps ``ip`` and ``nft``, which is in the PATH of root alone."""
    return os.pathsep.join([os.environ.get("PATH") or os.defpath, *_SBIN])
