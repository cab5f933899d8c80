"""Compile every kernel ahead of time, with no GPU, and hold it to its limits.

    python -m tercet.bench.compile_kernels

For sm_86 (RTX A6000) and sm_90 (H100, H200): no register may spill, shared memory must fit an
sm_86 block, and the PTX must hold no fp64 arithmetic (a Python float that slipped in). Prints the
tables of docs/benchmarks.md; exits with 1 when a limit is exceeded.

The second table is counted, not measured: for an RTX A6000, from its datasheet, the code of sm_86
and the bytes that a kernel reads and writes. `at memory's rate` is the least time that these bytes
take. `at the issue rate` is the most that the instructions take, were all of a kernel's executed
for each tile: where it is the smaller one, memory decides.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from tercet.kernels import rows_triton
from tercet.kernels.ahead_of_time import Kernel, kernels
from tercet.train.fit.roofline import CARDS

ARCHITECTURES = (86, 90)
MAX_SHARED = 101_376
"""Bytes of shared memory that a block can have on sm_86."""
TIMEOUT_S = 60
LANES_PER_S = 38.7e12 / 2
"""Instructions of single lanes that an RTX A6000 issues: its float32 rate counts two for each."""
WARPS_PER_SM, REGISTERS_PER_SM, SHARED_PER_SM, BLOCKS_PER_SM = 48, 65_536, 102_400, 16
"""Of sm_86."""
ROWS, VOCABULARY = 8192, 151_936
"""What times are counted for."""
CLASSES = {
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "F2FP", "F2F"),
    "special": ("MUFU",),
    "memory": ("LDG", "STG", "LDS", "STS", "SHFL", "BAR"),
}
"""Instructions by what they do; all others are addresses, predicates and control."""


def memory_ms(kernel: Kernel) -> float:
    """Least time of a kernel's traffic on an RTX A6000."""
    return ROWS * VOCABULARY * kernel.moved / CARDS["A6000"].gb_per_s / 1e6


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
    instructions: dict[str, int]
    """By class, in the whole kernel."""

    def warps_at_once(self, warps: int) -> int:
        """Warps that an SM of sm_86 holds, in blocks of `warps`."""
        by_registers = REGISTERS_PER_SM // (-(-self.registers // 8) * 8 * 32) // 4 * 4
        by_shared = SHARED_PER_SM // (self.shared_bytes + 1024)
        blocks = min(by_registers // warps, WARPS_PER_SM // warps, by_shared, BLOCKS_PER_SM)
        return blocks * warps

    def issue_ms(self, kernel: Kernel) -> float:
        """Most time that its instructions take on an RTX A6000."""
        lanes = sum(self.instructions.values()) * 32 * kernel.num_warps
        return 1e3 * ROWS * VOCABULARY / rows_triton.BLOCK * lanes / LANES_PER_S

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
    cubin = compiled.asm["cubin"]
    registers, spilled = _resources(cubin)
    ptx = compiled.asm["ptx"]
    return Usage(
        kernel.name,
        architecture,
        registers,
        spilled,
        compiled.metadata.shared,
        has_fp64=re.search(r"\.f64\b", ptx) is not None,
        barriers=len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", ptx)),
        instructions=_instructions(cubin),
    )


def _dumped(cubin: bytes, option: str) -> str:
    """What cuobjdump prints about a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
        ).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory per thread (spills and stack)."""
    printed = _dumped(cubin, "--dump-resource-usage")
    values = {
        name: int(re.search(rf"{name}:(\d+)", printed)[1]) for name in ("REG", "LOCAL", "STACK")
    }
    return values["REG"], values["LOCAL"] + values["STACK"]


def _instructions(cubin: bytes) -> dict[str, int]:
    """Instructions of the whole kernel by class."""
    lines = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"
    found = Counter(re.findall(lines, _dumped(cubin, "--dump-sass"), re.MULTILINE))
    del found["NOP"]
    counts = {name: sum(found[code] for code in codes) for name, codes in CLASSES.items()}
    return counts | {"other": found.total() - sum(counts.values())}


def counted(used: list[tuple[Kernel, Usage]]) -> list[str]:
    """The table of what an RTX A6000 would take, counted."""
    lines = [
        f"| counted: R = {ROWS}, V = {VOCABULARY}, RTX A6000 | warps of {WARPS_PER_SM} | "
        f"{', '.join(CLASSES)}, other instructions | bytes a logit | ms at memory's rate | "
        "ms at the issue rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kernel, usage in used:
        if kernel.moved and usage.architecture == 86:
            lines.append(
                f"| {kernel.name} | {usage.warps_at_once(kernel.num_warps)} | "
                f"{', '.join(map(str, usage.instructions.values()))} | {kernel.moved} | "
                f"{memory_ms(kernel):.1f} | {usage.issue_ms(kernel):.1f} |"
            )
    return lines


def main() -> None:
    print("| kernel | sm | registers | spilled bytes | shared bytes |")
    print("| --- | ---: | ---: | ---: | ---: |")
    used = [
        (k, compile_kernel(k, architecture)) for k in kernels() for architecture in ARCHITECTURES
    ]
    for kernel, usage in used:
        print(
            f"| {kernel.name} | {usage.architecture} | {usage.registers} | "
            f"{usage.spilled_bytes} | {usage.shared_bytes} |"
        )
    print("", *counted(used), sep="\n")
    faults = [fault for _, usage in used for fault in usage.faults()]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
