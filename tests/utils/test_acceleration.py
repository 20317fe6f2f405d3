"""Freed memory is kept, so that large tensors are not taken page by page."""

import subprocess
import sys

import pytest

from decinb.utils import acceleration

FEWER = 10  # times: without keeping, every large tensor is taken page by page

FAULTS = """
import resource, torch
torch.set_num_threads(1)
kept = {keep}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(16_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives memory back so eagerly")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch):
    def told(keep: str) -> tuple[str, int]:
        code = FAULTS.format(keep=keep)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        kept, faults = run.stdout.split()
        return kept, int(faults)

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)
    given_back = told("None")[1]
    kept, faults = told("__import__('decinb.utils.acceleration', fromlist=['']).keep_freed_memory()")
    assert kept == "True" and faults * FEWER < given_back
    monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")
    assert not acceleration.keep_freed_memory()
