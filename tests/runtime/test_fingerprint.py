"""A resumed run is refused where an input has another content under the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.runtime import fingerprint as module
from rlhf.runtime.fingerprint import fingerprint


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def test_the_content_counts_and_not_the_place(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", weights=b"123", config=b"{}")
    other = folder(tmp_path / "other", weights=b"123", config=b"{}")
    assert fingerprint(one) == fingerprint(other)
    (other / "README.md").write_text("a new card")
    assert fingerprint(one) == fingerprint(other)
    (other / "weights").write_bytes(b"124")
    assert fingerprint(one) != fingerprint(other)


def test_a_name_is_part_of_the_content(tmp_path: Path) -> None:
    assert fingerprint(folder(tmp_path / "a", x=b"1", y=b"2")) != fingerprint(folder(tmp_path / "b", x=b"2", y=b"1"))


def test_of_a_large_file_size_and_both_ends_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WHOLE_BYTES", 8)
    monkeypatch.setattr(module, "_END_BYTES", 2)
    file = tmp_path / "big"
    seen = set()
    for content in (b"ab0000yz", b"ab000000yz", b"xb000000yz", b"ab000000yy"):
        file.write_bytes(content)
        seen.add(fingerprint(file))
    assert len(seen) == 4
    file.write_bytes(b"ab001000yz")  # the middle of a large file is not read
    assert fingerprint(file) in seen
