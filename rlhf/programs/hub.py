"""Whether the model hub answers. Where it does not, its libraries are told to look into their cache only: each of them
would otherwise retry for minutes."""

from __future__ import annotations

import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable

from rlhf.recipe.paths import place

PATIENCE_SECONDS = 3.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_REFUSED = (403, 407)  # what a proxy says that lets nothing through


def offline_reason(paths: Iterable[str]) -> str | None:
    """Why ids of the hub among ``paths`` can only come from the cache; None where the hub answers or is not needed.

    Where it does not answer, this process works offline from here on.
    """
    if not any(place(path) == "hub" for path in paths):
        return None
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE):
        return "HF_HUB_OFFLINE is set"
    reason = _silence(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if reason is not None:
        work_offline()
    return reason


def work_offline() -> None:
    """Tells libraries that are loaded and those that will be; they read the variable once, when they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            setattr(sys.modules[module], "HF_HUB_OFFLINE", True)  # noqa: B010


def _silence(endpoint: str) -> str | None:
    """Why the endpoint does not answer in time; None when it does. In a thread, because looking up a name has no time
    limit of its own."""
    found = [f"no answer within {PATIENCE_SECONDS:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(_head(endpoint), timeout=PATIENCE_SECONDS):
                found.clear()
        except urllib.error.HTTPError as error:
            refused = error.code in _REFUSED or error.code >= 500
            found[:] = [f"HTTP {error.code}"] if refused else []
        except (OSError, ValueError) as error:
            found[:] = [str(getattr(error, "reason", error))]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS + 1)
    return f"{endpoint} does not answer: {found[0]}" if found else None


def _head(endpoint: str) -> urllib.request.Request:
    return urllib.request.Request(endpoint, method="HEAD")
