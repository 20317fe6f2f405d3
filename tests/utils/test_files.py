"""Files are written completely or not at all."""

import os

import pytest

from decinb.utils.files import write_atomically


def test_a_file_is_created_or_replaced(tmp_path):
    for data in (b"first", b"second"):
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".a[1].png.0123abcd.part", ".b.png.0123abcd.part"):
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a[1].png", b"")
    assert sorted(os.listdir(tmp_path)) == [".b.png.0123abcd.part", "a[1].png"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", b"")
