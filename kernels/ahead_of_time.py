"""Every Triton kernel as the trainer launches it, to be compiled ahead of time with no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from tercet.kernels import rows_triton


@dataclass(frozen=True)
class Kernel:
    """One kernel with the argument types and constants that the trainer launches it with."""

    name: str
    function: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    moved: int
    """Bytes that it reads and writes of each logit; 0: it works on rows."""

    def compile(self, architecture: int) -> CompiledKernel:
        """Compile it for a GPU of compute capability `architecture` / 10; none is needed.

        Raises:
            Exception: whatever Triton's compiler raises.
        """
        names = self.function.arg_names
        signature = {n: "constexpr" if n in self.constants else self.types[n] for n in names}
        constants = {(names.index(n),): value for n, value in self.constants.items()}
        # Pointers of PyTorch tensors, and V, are divisible by 16: say so, as a launch would.
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if signature[n].startswith("*") or n in ("vocabulary", "grad_stride")
        }
        return triton.compile(
            ASTSource(self.function, signature, constants, divisible),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": self.num_warps},
        )


def kernels() -> list[Kernel]:
    """Every kernel, in each variant that computes something else."""
    rows = {"BLOCK": rows_triton.BLOCK}
    row_types = {
        "logits": "*fp32",
        "labels": "*i64",
        "vocabulary": "i32",
        "inv_temperature": "fp32",
    }
    floats = dict.fromkeys(["logprobs", "lse", "entropy", "d_logprobs", "d_entropy"], "*fp32")
    function = rows_triton.row_logprobs_kernel
    found = [Kernel("row_logprobs", function, row_types | floats, rows, rows_triton.WARPS, 4)]
    for grad in ("bf16", "fp16", "fp32"):
        types = row_types | floats | {"grad": f"*{grad}", "grad_stride": "i32"}
        for entropy in (False, True):
            name = f"logits_grad {grad}" + (", entropy" if entropy else "")
            constants = rows | {"HAS_D_ENTROPY": entropy}
            function = rows_triton.logits_grad_kernel
            moved = 8 if grad == "fp32" else 6
            found.append(Kernel(name, function, types, constants, rows_triton.WARPS, moved))
    flags = ("HAS_OLD", "HAS_NEG", "HAS_REF", "HAS_MASK", "HAS_IS_WEIGHTS", "CISPO")
    function = rows_triton.tapo_rows_kernel
    types = {name: "fp32" for name in function.arg_names} | {"rows": "i32"}
    pointers = function.arg_names[: function.arg_names.index("rows")]
    types |= dict.fromkeys(pointers, "*fp32")
    for name, present in (("tapo_rows", True), ("tapo_rows, plain", False)):
        constants = dict.fromkeys(flags, present) | {"ROWS": rows_triton.ROWS}
        found.append(Kernel(name, function, types, constants, 4, 0))
    return found
