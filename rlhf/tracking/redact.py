"""The one redactor: nothing leaves the process (files, trackers, pages, terminal) with a secret in it.

And the one way to show text that a model or a stranger wrote.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

_SECRET_KEY = re.compile(r"(^|[_.-])(api_?key|key|token|secret|password|passwd|credentials?|authorization)$", re.I)
_TOKENIZER_KEY = re.compile(r"(^|[_.-])(pad|eos|bos|unk|sep|cls|mask|stop|image|end|start)_token$", re.I)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
_KNOWN_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|(?<=Bearer )\S+|(?<=bearer )\S+"
)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_ASSIGNMENT = re.compile(r"([A-Za-z0-9_.-]+)=(\S+)")
_YAML_ENTRY = re.compile(r"^(\s*(?:- )?)([A-Za-z0-9_.-]+): (\S.*)$", re.M)
_SHORTEST_SECRET = 8  # shorter values of environment variables would blot out ordinary words


def redact(value: Any) -> Any:
    """A copy of nested mappings and lists with secrets replaced by ``[redacted]``.

    A secret is a text under a key such as ``token`` or ``api_key`` (not ``eos_token``, not ``token_env``), a text of
    a known shape, the password in a URL, or the value of an environment variable with such a name.
    """
    return _redact(value, _environment_secrets())


def redact_text(text: str) -> str:
    """The same for one text; also ``key=value`` words of a command line and ``key: value`` lines of a recipe."""
    return _clean(text, _environment_secrets())


def printable(text: str, *, newlines: bool = True) -> str:
    r"""Text safe to show: control characters as ``\xNN``, direction marks and lone surrogates as ``\uNNNN``.

    newlines: keep line feeds (and tabs); otherwise they are shown as ``\n`` and ``\t``.
    """
    return "".join(_shown(character, newlines) for character in text)


def _redact(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _entry(str(key), item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    return _clean(value, secrets) if isinstance(value, str) else value


def _entry(key: str, item: Any, secrets: tuple[str, ...]) -> Any:
    return REDACTED if isinstance(item, str) and item and _secret_key(key) else _redact(item, secrets)


def _secret_key(key: str) -> bool:
    return bool(_SECRET_KEY.search(key)) and not _TOKENIZER_KEY.search(key)


def _clean(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _USER_INFO.sub(f"{REDACTED}@", text)
    text = _ASSIGNMENT.sub(lambda m: f"{m[1]}={REDACTED}" if _secret_key(m[1]) else m[0], text)
    text = _YAML_ENTRY.sub(lambda m: f"{m[1]}{m[2]}: {REDACTED}" if _secret_key(m[2]) else m[0], text)
    return _KNOWN_SHAPES.sub(REDACTED, text)


def _environment_secrets() -> tuple[str, ...]:
    found = {
        value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET
    }
    return tuple(sorted(found, key=len, reverse=True))


def _shown(character: str, newlines: bool) -> str:
    if character in "\n\t":
        return character if newlines else {"\n": "\\n", "\t": "\\t"}[character]
    code = ord(character)
    if unicodedata.category(character) == "Cc":
        return f"\\x{code:02x}"
    hidden = 0x200E <= code <= 0x200F or 0x2028 <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code == 0x061C
    return f"\\u{code:04x}" if hidden or 0xD800 <= code <= 0xDFFF else character
