"""What the process gives back."""

import platform
from pathlib import Path

import pytest

from pipeline.hardware import return_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_memory_freed_between_blocks_that_live_on_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    blocks = [bytearray(100_000) for _ in range(2000)]
    for block in blocks:
        block[::4096] = b"x" * len(block[::4096])
    del blocks[::2]
    before = resident()
    return_freed_memory()
    assert before - resident() > 50 * 2**20
