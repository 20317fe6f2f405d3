"""Locks on files that a stranger may have put there."""

import os

import pytest

from decinb.utils.locks import file_lock


@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_a_planted_lock_does_not_change_what_it_leads_to(tmp_path, plant):
    (tmp_path / "target").write_bytes(b"precious")
    plant(tmp_path / "target", tmp_path / ".lock")
    with file_lock(tmp_path / ".lock"):
        pass
    assert (tmp_path / "target").read_bytes() == b"precious"


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_as_a_lock_is_not_waited_for(tmp_path, plant):
    plant(tmp_path / ".lock")
    with file_lock(tmp_path / ".lock"):
        pass
