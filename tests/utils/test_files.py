"""Files are written completely or not at all."""

import json
import os
import time

import pytest

from decinb.utils import files
from decinb.utils.files import open_regular, parse_json, read_json, read_regular, replacing, write_atomically


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
        age(tmp_path / name)
    write_atomically(tmp_path / "a[1].png", b"")
    assert sorted(os.listdir(tmp_path)) == [".b.png.0123abcd.part", "a[1].png"]


def age(path):
    """Let a file look as if it was last written long ago."""
    long_ago = time.time() - 10 * files.LEFTOVER_SECONDS
    os.utime(path, (long_ago, long_ago))


def test_what_another_process_is_writing_is_kept(tmp_path):
    with replacing(tmp_path / "file") as part:
        part.touch()
        write_atomically(tmp_path / "file", b"other")
        assert part.exists()  # it is new
    with replacing(tmp_path / "file") as part, part.open("wb") as file:
        files._lock(file)
        age(part)
        write_atomically(tmp_path / "file", b"other")
        assert part.exists()  # it is old, but in use


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_that_were_planted_are_not_written_through(tmp_path, monkeypatch, link):
    (tmp_path / "target").write_bytes(b"precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    link(tmp_path / "target", tmp_path / ".file.guessed.part")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"data")
    link(tmp_path / "target", tmp_path / "other")
    write_atomically(tmp_path / "other", b"data")
    assert (tmp_path / "other").read_bytes() == b"data" and (tmp_path / "target").read_bytes() == b"precious"


def test_folders_and_pipes_in_place_of_temporary_files_do_not_matter(tmp_path):
    (tmp_path / ".file.0.part").mkdir()
    os.mkfifo(tmp_path / ".file.1.part")
    age(tmp_path / ".file.1.part")
    write_atomically(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_only_ordinary_files_of_a_modest_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    for name, message in [("pipe", "not an ordinary file"), ("link", "not an ordinary"), ("sparse", "at most 1,000")]:
        with pytest.raises(OSError, match=message):
            open_regular(tmp_path / name, 1000)
    with pytest.raises(OSError, match="not an ordinary file"):
        read_regular(tmp_path, 1000)
    (tmp_path / "file").write_bytes(b"data")
    assert read_regular(tmp_path / "file", 4) == b"data"


def test_json_that_is_invalid_or_too_much_is_one_kind_of_error(tmp_path):
    (tmp_path / "good").write_text('{"a": "ä"}', encoding="utf-8")
    assert read_json(tmp_path / "good") == {"a": "ä"}
    for text in ("", "{", "[" * 100_000, b"\xff", "9" * 10_000, json.dumps("x" * files.MAX_JSON)):
        with pytest.raises(ValueError):
            parse_json(text)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", b"")
