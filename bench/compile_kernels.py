"""Compile every kernel ahead of time, with no GPU, and hold it to its limits.

    python -m tercet.bench.compile_kernels

For sm_86 (RTX A6000) and sm_90 (H100, H200): no register may spill, shared memory must fit an
sm_86 block, and the PTX must hold no fp64 arithmetic (a Python float that slipped in). Prints the
table that README shows; exits with 1 when a limit is exceeded.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from tercet.kernels.ahead_of_time import Kernel, kernels

ARCHITECTURES = (86, 90)
MAX_SHARED = 101_376
"""Bytes of shared memory that a block can have on sm_86."""
TIMEOUT_S = 60


@dataclass(frozen=True)
class Usage:
    """Resources that a compiled kernel uses."""

    kernel: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    has_fp64: bool
    barriers: int
    """Barriers in the PTX."""

    def faults(self) -> list[str]:
        """The limits that it exceeds, in words."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > MAX_SHARED:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, over {MAX_SHARED}")
        if self.has_fp64:
            found.append("computes in fp64")
        return [f"{self.kernel} on sm_{self.architecture} {fault}" for fault in found]


def compile_kernel(kernel: Kernel, architecture: int) -> Usage:
    """Compile one kernel for one architecture and measure it."""
    compiled = kernel.compile(architecture)
    registers, spilled = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Usage(
        kernel.name,
        architecture,
        registers,
        spilled,
        compiled.metadata.shared,
        has_fp64=re.search(r"\.f64\b", ptx) is not None,
        barriers=len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", ptx)),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory per thread (spills and stack)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
        ).stdout
    values = {
        name: int(re.search(rf"{name}:(\d+)", printed)[1]) for name in ("REG", "LOCAL", "STACK")
    }
    return values["REG"], values["LOCAL"] + values["STACK"]


def main() -> None:
    print("| kernel | sm | registers | spilled bytes | shared bytes |")
    print("| --- | ---: | ---: | ---: | ---: |")
    faults = []
    for kernel in kernels():
        for architecture in ARCHITECTURES:
            usage = compile_kernel(kernel, architecture)
            faults += usage.faults()
            print(
                f"| {usage.kernel} | {usage.architecture} | {usage.registers} | "
                f"{usage.spilled_bytes} | {usage.shared_bytes} |"
            )
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
