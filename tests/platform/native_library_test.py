"""C++ that is compiled where it runs: once, whole or not at all, and never in the way."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.platform import native_library

GOOD = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = tmp_path / "answer.cpp"
    found.write_text(GOOD % 42)
    native_library.load.cache_clear()
    return found


def compiled(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "gptoughts" / "native").rglob("*.so"))


def test_it_is_compiled_once_and_anew_when_its_text_changes(source: Path, tmp_path: Path) -> None:
    library = native_library.load(source)
    assert isinstance(library, ctypes.CDLL)
    assert library.answer() == 42
    (made,) = compiled(tmp_path)
    written = made.stat().st_mtime_ns
    native_library.load.cache_clear()
    again = native_library.load(source)
    assert again is not None
    assert made.stat().st_mtime_ns == written
    source.write_text(GOOD % 43)
    native_library.load.cache_clear()
    changed = native_library.load(source)
    assert changed is not None
    assert changed.answer() == 43
    assert len(compiled(tmp_path)) == 2


def test_a_generous_umask_is_no_obstacle(source: Path) -> None:
    before = os.umask(0o002)
    try:
        assert native_library.load(source) is not None
    finally:
        os.umask(before)


def test_what_it_includes_belongs_to_it(source: Path, tmp_path: Path) -> None:
    (tmp_path / "number.h").write_text("#define NUMBER 5\n")
    source.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }\n')
    first = native_library.load(source)
    (tmp_path / "number.h").write_text("#define NUMBER 6\n")
    native_library.load.cache_clear()
    second = native_library.load(source)
    assert first is not None
    assert second is not None
    assert (first.answer(), second.answer()) == (5, 6)


def test_a_damaged_library_is_compiled_anew(source: Path, tmp_path: Path) -> None:
    native_library.load(source)
    (made,) = compiled(tmp_path)
    half = made.read_bytes()[: made.stat().st_size // 2]
    made.unlink()  # this process still has it open
    made.write_bytes(half)
    made.chmod(0o644)
    native_library.load.cache_clear()
    library = native_library.load(source)
    assert library is not None
    assert library.answer() == 42


@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_could_have_written_is_not_loaded(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    native_library.load(source)
    (made,) = compiled(tmp_path)
    (made if which == "file" else made.parent).chmod(0o777)
    native_library.load.cache_clear()
    library = native_library.load(source)
    if which == "file":  # compiled anew, in a folder that is one's own
        assert library is not None
        assert not made.stat().st_mode & 0o022
    else:
        assert library is None
        assert f"{made.parent} belongs to others or can be written by them" in caplog.text


def test_another_processor_has_a_library_of_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_library.load(source)
    monkeypatch.setattr(native_library, "_processor", lambda: "another")
    native_library.load.cache_clear()
    native_library.load(source)
    assert len(compiled(tmp_path)) == 2


def test_what_does_not_compile_is_done_without(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text("int answer( {\n")
    with caplog.at_level(logging.WARNING):
        assert native_library.load(source) is None
        assert native_library.load(source) is None
    (record,) = caplog.records
    assert "answer.cpp cannot be compiled here, so torch's operators stand for it" in record.getMessage()
    assert "error" in record.getMessage(), "the compiler's own words"
    assert not compiled(tmp_path)


def test_without_a_compiler_it_says_what_to_install(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert native_library.load(source) is None
    assert "no C++ compiler is on PATH; install one, e.g. g++" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native_library.load(source) is None
    assert "file" in caplog.text


def test_who_has_no_home_does_without(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert native_library.load(source) is None
    assert "home" in caplog.text


def test_processes_that_compile_at_once_do_not_meet(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from gptoughts.platform import native_library; "
        "print(native_library.load(pathlib.Path(sys.argv[1])).answer())"
    )
    command = [sys.executable, "-c", code, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0].strip() for process in running] == ["42"] * 4
    (made,) = compiled(tmp_path)
    assert list(made.parent.iterdir()) == [made], "nothing half-made is left"
