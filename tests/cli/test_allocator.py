"""Memory that is freed is kept: what is needed a second time costs no page faults."""

import ctypes
import os
import subprocess
import sys

import pytest

from tve_hf.cli.allocator import keep_freed_memory

_FAULTS = """
import ctypes, resource, sys
from tve_hf.cli.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 64 * 2**20
for again in (False, True):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults_of_the_second_time(mode: str, **environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", _FAULTS, mode]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=kept | environment)
    return int(run.stdout)


def test_what_was_freed_is_not_faulted_in_again_unless_the_user_has_set_the_allocator():
    pages = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert _faults_of_the_second_time("kept") < pages / 50
    given_back = _faults_of_the_second_time("as it is")
    assert given_back > 10  # all of its pages, or the huge ones
    assert _faults_of_the_second_time("kept", MALLOC_TRIM_THRESHOLD_="131072") >= given_back / 2


@pytest.mark.parametrize("library", [object(), OSError(), TypeError()], ids=["another", "none", "on Windows"])
def test_other_c_libraries_are_left_as_they_are(monkeypatch, library):
    def load(name):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    assert keep_freed_memory() is None
