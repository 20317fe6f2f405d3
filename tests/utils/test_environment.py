"""The machine: its devices, its memory, and what is said about it."""

import os
import platform
from importlib.metadata import version

import psutil
import pytest
import torch

from decinb import InputError
from decinb.utils import memory
from decinb.utils.device import available_devices, choose_device
from decinb.utils.environment import describe_pipeline, environment, versions
from decinb.utils.memory import total_memory, used_memory


def test_environment_holds_no_host_and_no_path(tiny):
    found = describe_pipeline(tiny)
    assert found.keys() >= environment().keys() | {"transformers", "parameters"}
    assert found["parameters"]["unet"] == sum(weight.numel() for weight in tiny.unet.parameters())
    assert found["torch"] == torch.__version__ and found["dtype"] == "float32"
    assert os.getcwd() not in str(found) and platform.node() not in str(found)


def test_versions_of_packages():
    assert versions() == {name: version(name) for name in ("decinb", "diffusers", "torch")}
    assert versions(["no-such-package"]) == {"no-such-package": "not installed"}


def test_total_memory_respects_the_limit_of_a_container(tmp_path, monkeypatch):
    limits = (tmp_path / "missing", tmp_path / "limit")
    monkeypatch.setattr(memory, "LIMITS", limits)
    limits[1].write_text("max\n")
    assert total_memory() == psutil.virtual_memory().total
    limits[1].write_text("1000000\n")
    assert total_memory() == 1_000_000


def test_used_memory_counts_shared_weights_once(tiny):
    parts = (tiny.unet, tiny.vae, tiny.text_encoder)
    weights = sum(tensor.numel() * 4 for part in parts for tensor in part.parameters())
    buffers = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.buffers())
    assert used_memory(tiny) == weights + buffers


def test_the_first_available_device_is_the_default():
    assert available_devices()[-1] == "cpu"
    assert choose_device().type == available_devices()[0].partition(":")[0]
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta", 3.5])
def test_devices_that_are_not_here_are_refused(device):
    with pytest.raises(InputError, match=r"device must be None or one of .*cpu on this machine, got ") as caught:
        choose_device(device)
    assert str(device) in str(caught.value)
