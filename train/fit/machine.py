"""Is this machine fit to train? Python, packages, GPUs, kernels, disk, ports, collectives."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from tercet.kernels.varlen import backend_of
from tercet.rollout.guard import MEMORY_DISK
from tercet.train.fit.finding import Finding

SM_WITHOUT_GPU = 86
"""Compute capability, times ten, for which kernels are compiled where there is no GPU."""
LEAST_SHARED = 1 << 30
"""Bytes of shared memory below which NCCL or a server may fail; Docker gives 64 MiB by itself."""
MASTER_PORT = 29500
"""Port of torchrun's rendezvous unless it is told another."""
TOLERANCE = 1e-4
"""Most that a log-prob of the Triton kernel may differ from PyTorch's."""
REDUCE_S = 180.0
COMMAND_S = 30.0
GIB = 1 << 30
EXTRAS = {"flash-attn": "attention is computed by PyTorch's own flash attention instead"}
EXTRAS |= {"liger-kernel": "model.liger cannot be used"}
"""Packages of the extra `gpu`, and what it means that one is missing."""


def python() -> Iterator[Finding]:
    """The interpreter's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        yield Finding("python", "ok", f"Python {found}")
    else:
        advice = "make a virtual environment with one of these: make install PYTHON=python3.11"
        yield Finding("python", "error", f"Python {found}; 3.11 and 3.12 are tested", advice)


def packages() -> Iterator[Finding]:
    """Tercet's requirements, and the packages that only a GPU needs."""
    try:
        lines = metadata.requires("tercet") or []
    except metadata.PackageNotFoundError:
        advice = "pip install -e . in the repository"
        yield Finding("packages", "warning", "tercet is not installed, only imported", advice)
        return
    needed = [Requirement(line) for line in lines]
    always = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [said for r in always if (said := _unmet(r))]
    if wrong:
        advice = "pip install -e . -c constraints.txt"
        yield Finding("packages", "error", "; ".join(wrong), advice)
    else:
        yield Finding("packages", "ok", f"{len(always)} required packages fit")
    for requirement in needed:
        if requirement.name in EXTRAS and "gpu" in str(requirement.marker):
            yield _extra(requirement)


def _unmet(requirement: Requirement) -> str:
    """What is wrong with an installed package; empty where it fits."""
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed ({requirement.specifier} is needed)"
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{requirement.name} {found} is installed, {requirement.specifier} is needed"


def _extra(requirement: Requirement) -> Finding:
    name, has_gpu = requirement.name, torch.cuda.is_available()
    if not (wrong := _unmet(requirement)):
        return Finding(name, "ok", f"version {metadata.version(name)}")
    if not has_gpu:
        return Finding(name, "ok", f"{wrong}; only a GPU needs it")
    return Finding(name, "warning", f"{wrong}: {EXTRAS[name]}", "pip install -e '.[gpu]'")


def gpus() -> Iterator[Finding]:
    """The driver's view of the GPUs, and PyTorch's."""
    built = torch.version.cuda
    version = f"PyTorch {torch.__version__}"
    seen = _driver_lines()
    for line in seen:
        yield Finding("driver", "ok", line)
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            said = f"{version}, CUDA {built}: GPU {number} is {card.name}"
            said += f", sm_{card.major}{card.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            if free < 0.9 * total:
                advice = "another process uses it: end it, or plan with what is free"
                yield Finding("gpu", "warning", said, advice)
            else:
                yield Finding("gpu", "ok", said)
    elif seen and built is None:
        advice = "install a CUDA build of PyTorch (pytorch.org says from where)"
        yield Finding("gpu", "error", f"{version} is a CPU build, but there is a GPU", advice)
    elif seen:
        advice = "update the driver, or install a PyTorch for an older CUDA; "
        advice += "CUDA_VISIBLE_DEVICES may also hide it"
        said = f"{version} for CUDA {built} cannot use the GPU of this driver"
        yield Finding("gpu", "error", said, advice)
    else:
        advice = "tests and the demo run on a CPU; training a published model needs a GPU"
        yield Finding("gpu", "warning", f"{version}: no GPU", advice)


def _driver_lines() -> list[str]:
    """A line for each GPU that nvidia-smi lists; none where it is missing or fails."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    fields = "name,driver_version,memory.total"
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(",") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [
        f"{name.strip()}: driver {driver.strip()}, {mib.strip()} MiB"
        for name, driver, mib in (row for row in rows if len(row) == 3)
    ]


def triton() -> Iterator[Finding]:
    """Compiles every kernel; on a GPU one is run too."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        advice = "unset TRITON_INTERPRET: it is for tests without a GPU"
        yield Finding("triton", "warning", "kernels run in Triton's interpreter, slowly", advice)
        return
    from tercet.kernels.ahead_of_time import kernels

    has_gpu = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if has_gpu else divmod(SM_WITHOUT_GPU, 10)
    target = 10 * major + minor
    listed = kernels()
    for kernel in listed:
        kernel.compile(target)
    said = f"Triton {metadata.version('triton')}: {len(listed)} kernels compile for sm_{target}"
    if not has_gpu:
        yield Finding("triton", "ok", f"{said} (no GPU: none was run)")
        return
    advice = "a C compiler and Python's headers (python3-dev) are needed to launch kernels"
    try:
        error = _kernel_error()
    except Exception as failed:  # the compiler's, the driver's or the linker's
        said = f"{said}, but a launch fails: {' '.join(str(failed).split())[:300]}"
        yield Finding("triton", "error", said, advice)
        return
    level = "ok" if error <= TOLERANCE else "error"
    yield Finding("triton", level, f"{said}; one was run, its largest error is {error:.1e}")


def _kernel_error() -> float:
    """Largest difference of the fused kernel's log-probs to PyTorch's, on the GPU."""
    from tercet.kernels import rows_triton

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=generator).cuda()
    labels = torch.randint(0, 5000, (64,), generator=generator).cuda()
    found = rows_triton.row_logprobs(logits, labels, 1.0)[0]
    return float((found - logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]).abs().max())


def attention() -> Iterator[Finding]:
    """What computes attention here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backend = backend_of(torch.empty(1, device=device, dtype=dtype))
    also = "; float32 uses dense masks" if device == "cuda" else ""
    yield Finding("attention", "ok", f"{backend.name} for {str(dtype)[6:]}{also}")


def shared_memory() -> Iterator[Finding]:
    """Room in /dev/shm."""
    try:
        free = shutil.disk_usage(MEMORY_DISK).free
    except OSError as error:
        said = f"{MEMORY_DISK} cannot be used: {error.strerror}"
        yield Finding("shared memory", "warning", said, "weights go to servers over the disk")
        return
    said = f"{free / GIB:.1f} GiB free in {MEMORY_DISK}"
    if free < LEAST_SHARED:
        advice = "give a container more: docker run --shm-size 16g, or --ipc host"
        yield Finding("shared memory", "warning", said, advice)
    else:
        yield Finding("shared memory", "ok", said)


def disk(folder: Path, needed: int) -> Iterator[Finding]:
    """Room for checkpoints where the run writes.

    Args:
        folder: run.out; it need not exist.
        needed: bytes of a run's checkpoints; 0: not known.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding("disk", "error", f"run.out {folder} cannot be written", "another --run.out")
        return
    free = shutil.disk_usage(there).free
    said = f"{free / GIB:.1f} GiB free for run.out {folder}"
    if needed:
        said += f"; checkpoints take up to {needed / GIB:.1f} GiB"
    advice = "free some, lower --run.keep_last, or write elsewhere: --run.out"
    yield Finding("disk", "error", said, advice) if free < needed else Finding("disk", "ok", said)


def ports() -> Iterator[Finding]:
    """The port of torchrun, and this host's own name."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", MASTER_PORT))
            yield Finding("ports", "ok", f"port {MASTER_PORT} of torchrun is free")
        except OSError:
            advice = "another run has it: torchrun --master-port 29501"
            yield Finding("ports", "warning", f"port {MASTER_PORT} is taken", advice)
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        said = f"this host's name {socket.gethostname()!r} has no address"
        advice = "add it to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo and NCCL_SOCKET_IFNAME=lo"
        yield Finding("ports", "warning", said, advice)


def all_reduce() -> Iterator[Finding]:
    """Ranks that find each other, and how fast they add up: NCCL over all GPUs, else gloo."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 1:
        yield Finding("all-reduce", "ok", "one GPU: there is nothing to reduce over")
        return
    backend, ranks = ("nccl", count) if count else ("gloo", 2)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "tercet.train.fit.reduce", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=REDUCE_S
            )
        except subprocess.TimeoutExpired:
            said = f"{ranks} ranks over {backend} did not finish in {REDUCE_S:.0f} s"
            advice = "NCCL_DEBUG=INFO says where; NCCL_P2P_DISABLE=1 helps where GPUs cannot reach "
            yield Finding("all-reduce", "error", said, f"{advice}each other directly")
            return
        speed = Path(folder, "speed")
        if done.returncode or not speed.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            reason = lines[-1][:300] if lines else "no reason given"
            said = f"{ranks} ranks over {backend} failed: {reason}"
            yield Finding("all-reduce", "error", said, "NCCL_DEBUG=INFO says more")
            return
        said = f"{ranks} ranks over {backend}: {float(speed.read_text()):.2f} GB/s"
        yield Finding("all-reduce", "ok", said if count else f"{said} (no GPU: NCCL was not tried)")
