"""The names of the package."""

import subprocess
import sys
import warnings

import pytest

import decinb
from decinb import metrics


def test_every_public_name_can_be_imported():
    assert dir(decinb) == sorted(decinb.__all__)
    for name in decinb.__all__:
        assert getattr(decinb, name) is not None


@pytest.mark.parametrize(("old", "new"), [("change", "mean_abs_difference"), ("saturated", "clipped_fraction")])
def test_old_names_work_with_one_deprecation_warning(old, new):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(decinb, old) is getattr(metrics, new)
    assert [(one.category, str(one.message)) for one in caught] == [
        (DeprecationWarning, f"decinb.{old} is deprecated: use decinb.{new}")
    ]
    assert caught[0].filename == __file__
    assert old not in decinb.__all__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = decinb.no_such_name


def test_the_old_names_are_shown_once_to_a_user():
    code = "from decinb import change\nfrom decinb import saturated\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.count("DeprecationWarning") == 2
