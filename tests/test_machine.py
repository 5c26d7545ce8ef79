"""What a process does with memory that it frees."""

import platform
import subprocess
import sys

import pytest

COUNTED = """
import resource, sys, torch
from lamina.machine import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, freed at once
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told to keep memory")
def test_memory_that_is_kept_is_not_asked_for_again():
    def faults(how):
        return int(subprocess.run([sys.executable, "-c", COUNTED, how], capture_output=True, text=True).stdout)

    # of some 16,000 pages of 4 KiB; a kernel short of memory may take pages back meanwhile, but hardly three times
    assert any(faults("keep") < 100 for _ in range(3))
    assert faults("plain") > 100


def test_other_systems_are_left_as_they_are(monkeypatch):
    from lamina import machine

    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.keep_memory() is False
