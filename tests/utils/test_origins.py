"""Code of installed packages is told from the user's own."""

import sys

import numpy as np
import torch

from decinb.utils.origins import is_installed, replaced


def test_where_pip_has_put_a_package_it_is_installed_and_what_lies_beside_it_is_not(tmp_path, monkeypatch):
    for name in ("packaged", "mine"):
        (tmp_path / f"{name}.py").write_text("def f(): pass\n")
    (tmp_path / "packaged-1.0.dist-info").mkdir()
    (tmp_path / "packaged-1.0.dist-info" / "RECORD").write_text("packaged.py,sha256=0,15\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mine
    import packaged

    assert is_installed(packaged.__name__) and not is_installed(mine.__name__)
    for name in ("packaged", "mine"):
        del sys.modules[name]


def test_a_module_of_the_user_with_a_name_of_pythons_own_is_the_users(tmp_path, monkeypatch):
    (tmp_path / "antigravity.py").write_text("def f(): pass\n")  # Python has one too
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    import antigravity

    is_installed.cache_clear()
    assert antigravity.f and not is_installed("antigravity") and is_installed("json.decoder") and is_installed("sys")
    del sys.modules["antigravity"]
    is_installed.cache_clear()


def test_nothing_is_replaced_in_the_libraries_as_they_are():
    for owner in (torch, torch.Tensor, torch.nn.functional, torch.nn.Conv2d, np):
        assert not replaced(owner)


def test_what_the_user_puts_into_a_class_is_found_and_forgotten_when_it_is_gone(monkeypatch):
    class Descriptor:
        def __get__(self, instance, owner):
            return lambda *args: None

    for mine in (lambda self: None, property(lambda self: None), staticmethod(lambda: None), Descriptor()):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Conv2d, "extra_repr", mine, raising=False)
            assert replaced(torch.nn.Conv2d) == ["extra_repr"]
        assert not replaced(torch.nn.Conv2d)
