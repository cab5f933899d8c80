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
    values |= {"shared_bytes": 0, "has_fp64": False, "barriers": 0}
    assert compile_kernels.Usage(**values).faults() == []
    (told,) = compile_kernels.Usage(**(values | change)).faults()
    assert "k on sm_86" in told and fault in told
