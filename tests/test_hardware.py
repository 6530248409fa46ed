"""What the process gives back, and what this machine multiplies in."""

import platform
from pathlib import Path

import pytest

from pipeline import hardware
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


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f", "cpu", False),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "cpu", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", "cpu", True),
        ("Features\t: fp asimd bf16", "cpu", True),
        ("Features\t: fp asimd", "cpu", False),
        ("", "cpu", False),
        ("flags\t\t: fpu", "cuda", True),
    ],
)
def test_auto_precision_is_what_the_machine_multiplies_in(monkeypatch, flags, device, expected):
    import torch

    from pipeline.config.experiment import Config
    from pipeline.training.policies import precision_of

    def config_of(train):
        return Config.model_validate({"data": {"path": "rows.jsonl"}, "train": train})

    monkeypatch.setattr(hardware, "device_kind", lambda: device)
    monkeypatch.setattr(hardware.Path, "read_text", lambda *_, **__: f"processor\t: 0\n{flags}\n")
    hardware.multiplies_bfloat16.cache_clear()
    try:
        assert hardware.multiplies_bfloat16() == expected
        assert precision_of(config_of({})) == (torch.bfloat16 if expected else torch.float32)
        for name in ("float32", "bfloat16"):
            assert precision_of(config_of({"precision": name})) == getattr(torch, name)
    finally:
        hardware.multiplies_bfloat16.cache_clear()
