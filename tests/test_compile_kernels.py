"""Every kernel compiles for the cards it is written for, with no GPU, inside its limits."""

from __future__ import annotations

import pytest
from head_cases import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from tercet.bench import compile_kernels  # noqa: E402
from tercet.kernels import rows_triton  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_every_kernel_is_checked():
    written = {v for v in vars(rows_triton).values() if isinstance(v, triton.JITFunction)}
    launched = {kernel for kernel in written if kernel.__name__.endswith("_kernel")}
    assert launched == {kernel.function for kernel in compile_kernels.kernels()}


@pytest.mark.parametrize("architecture", compile_kernels.ARCHITECTURES)
@pytest.mark.parametrize("kernel", compile_kernels.kernels(), ids=lambda kernel: kernel.name)
def test_kernel_stays_in_its_limits(kernel, architecture):
    usage = compile_kernels.compile_kernel(kernel, architecture)
    assert usage.registers > 0 and usage.faults() == []
    narrower = kernel.types.get("grad") in ("*bf16", "*fp16")
    assert not narrower or usage.barriers, "warps could overtake each other in a row"


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 101_377}, "over 101376"),
        ({"has_fp64": True}, "fp64"),
    ],
)
def test_faults_are_told(change, fault):
    values = {"kernel": "k", "architecture": 86, "registers": 32, "spilled_bytes": 0}
    values |= {"shared_bytes": 0, "has_fp64": False, "barriers": 0, "instructions": {}}
    assert compile_kernels.Usage(**values).faults() == []
    (told,) = compile_kernels.Usage(**(values | change)).faults()
    assert "k on sm_86" in told and fault in told


@pytest.mark.parametrize(
    "registers, shared, warps, at_once",
    [(31, 0, 8, 48), (48, 32, 8, 40), (126, 4096, 4, 16), (32, 49_000, 8, 16), (16, 0, 1, 16)],
)
def test_warps_that_an_sm_holds(registers, shared, warps, at_once):
    """By registers, which a warp gets in portions of 256; by shared memory; by blocks."""
    usage = compile_kernels.Usage("k", 86, registers, 0, shared, False, 0, {})
    assert usage.warps_at_once(warps) == at_once


def test_what_is_counted_for_a_card():
    kernel = next(k for k in compile_kernels.kernels() if k.name == "logits_grad bf16")
    usage = compile_kernels.compile_kernel(kernel, 86)
    logits = 8192 * 151_936
    assert compile_kernels.memory_ms(kernel) == pytest.approx(1e3 * logits * (4 + 2) / 768e9)
    # A thread has 2,048 / 256 logits of a tile: an exponential each, and a load of four.
    assert usage.instructions["special"] == 8 and usage.instructions["memory"] >= 2 + 2
    total = sum(usage.instructions.values())
    assert 8 * 6 < total < 8 * 25
    assert usage.issue_ms(kernel) == pytest.approx(1e3 * logits * total / 8 / 19.35e12)
    assert usage.issue_ms(kernel) < compile_kernels.memory_ms(kernel)
    (_, _, line) = compile_kernels.counted([(kernel, usage)])
    assert line.startswith("| logits_grad bf16 | 48 | ") and "| 6 | 9.7 |" in line
