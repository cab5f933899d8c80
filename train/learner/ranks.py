"""Several processes under torchrun: parameters sharded by FSDP2, and who does what.

Rank 0 loads the model into CPU memory and hands each rank its part, tensor by tensor; no GPU ever
holds it whole. Rank 0 samples, rewards, logs and writes; finished groups are broadcast whole. Every
rank loads its own photos and runs as many micro-batches as every other, since each forward pass is
a collective: a rank that has nothing left works on rows of weight 0. Sums are divided by the number
of loss tokens of the whole mini-batch over all ranks, so gradients are added up over ranks, not
averaged.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from tercet.core.config import ParallelConfig
from tercet.train.cli.interrupt import Interrupted, StopSignal

Value = TypeVar("Value")


class Ranks:
    """The processes of a run; one that runs alone needs no torch.distributed.

    Args:
        device: this process's.
        config: replicas and timeout_s are used, and whether something else than several processes
            asks for a mesh.

    Raises:
        ValueError: parallel.replicas does not divide the number of processes.
    """

    def __init__(self, device: torch.device, config: ParallelConfig):
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = device
        if self.size % config.replicas:
            raise ValueError(
                f"parallel.replicas is {config.replicas}; it must divide the {self.size} processes"
            )
        self.raised_on_all: Exception | None = None
        """The last exception that came to every rank at the same place."""
        self.mesh: DeviceMesh | None = None
        """What parameters are sharded over; None: they are plain tensors."""
        self.files_group: dist.ProcessGroup | None = None
        """For writing checkpoints, beside what else the ranks exchange."""
        if self.size > 1 or config.mixed_precision or config.offload:
            timeout = timedelta(seconds=config.timeout_s)
            self._join(timeout)
            self.mesh = _mesh(device.type, self.size, config.replicas)
            self.files_group = dist.new_group(backend="gloo", timeout=timeout)

    def _join(self, timeout: timedelta) -> None:
        store, rank, size = dist.HashStore(), 0, 1
        if self.size > 1:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            # torchrun keeps its store over a restart, and in it the dead ranks' addresses.
            store = dist.PrefixStore(f"restart_{restarts()}", store)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that samples, logs and writes."""
        return self.rank == 0

    def share(
        self, make: Callable[[], Value], help_out: Callable[[], None] = lambda: None
    ) -> Value:
        """What `make` gives on rank 0, on all ranks; an exception of its comes to all as well.

        Args:
            make: run by rank 0.
            help_out: run by the others each time that rank 0 calls `ask_for_help` meanwhile.
        """
        if self.size == 1:
            return make()
        held: list = [None, None, False]
        if self.is_first:
            try:
                held[0] = make()
            except Exception as error:
                held[1] = picklable(error)
        dist.broadcast_object_list(held, src=0)
        while held[2]:
            help_out()
            dist.broadcast_object_list(held, src=0)
        if held[1] is not None:
            self.raise_on_all(held[1])
        return held[0]

    def on_first(self, make: Callable[[], Value]) -> Value | None:
        """What `make` gives on rank 0, there alone; an exception of its comes to all ranks."""
        made = []
        self.share(lambda: made.append(make()))
        return made[0] if made else None

    def on_all(self, make: Callable[[], Value]) -> Value:
        """What `make` gives on each rank; an exception of any of them comes to all."""
        if self.size == 1:
            return make()
        made, error = None, None
        try:
            made = make()
        except Exception as raised:
            error = picklable(raised)
        for failed in self.exchange(error):
            if failed is not None:
                self.raise_on_all(failed)
        return made

    def raise_on_all(self, error: Exception) -> NoReturn:
        """Raise an exception that every rank raises at the same place.

        Only after such a one do all ranks get to what follows, a last checkpoint for instance.
        """
        self.raised_on_all = error
        raise error

    def ask_for_help(self) -> None:
        """Let the ranks that wait in `share` do their part of a collective."""
        if self.size > 1:
            dist.broadcast_object_list([None, None, True], src=0)

    def exchange(self, value: Value) -> list[Value]:
        """Every rank's value, on all ranks."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def dealt(self, items: Sequence[Value], cost: Callable[[Value], float]) -> list[Value]:
        """This rank's part of what is the same on all ranks, dealt by cost; rank 0 weighs."""
        if self.size == 1:
            return list(items)
        places = self.share(lambda: deal([cost(item) for item in items], self.size))
        return [items[place] for place in places[self.rank]]

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self.exchange(number))

    def add(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """0-d tensors of the same names on all ranks, summed over ranks."""
        if self.size == 1 or not sums:
            return sums
        names = sorted(sums)
        total = torch.stack([sums[name].double() for name in names])
        dist.all_reduce(total)
        return dict(zip(names, total.unbind(), strict=True))

    def release_memory(self) -> None:
        """Give GPU memory back that PyTorch keeps for later, before servers beside it want it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.exchange(None)

    def check(self, stop: StopSignal) -> None:
        """Raises Interrupted, on all ranks at once, when a signal has come to one of them."""
        if signum := self.most(stop.signum):
            self.raise_on_all(Interrupted(signum))

    def close(self) -> None:
        """Leave the others; gloo's threads end with the process (see command_line.command)."""
        if self.mesh is not None and self.device.type == "cuda":
            dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _mesh(device_type: str, size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    shape = (replicas, size // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(policy: nn.Module, ranks: Ranks, config: ParallelConfig) -> None:
    """Shard a policy in place: each decoder layer, each vision block, and the policy as the root.

    Args:
        policy: train.policy.Policy: with its parameters in CPU memory on rank 0, without data (on
            the meta device) elsewhere; left as it is without a mesh.
        ranks: whose mesh it is spread over.
        config: mixed_precision and offload are used.

    Raises:
        ValueError: mixed_precision with trained parameters of another dtype than float32.
    """
    if ranks.mesh is None:
        return
    precision = MixedPrecisionPolicy()
    if config.mixed_precision:
        found = {param.dtype for param in policy.parameters() if param.requires_grad}
        if found != {torch.float32}:
            raise ValueError(
                "parallel.mixed_precision needs float32 parameters (model.dtype float32), got "
                f"{', '.join(map(str, found))}"
            )
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    offload = CPUOffloadPolicy(ranks.device.type == "cuda") if config.offload else OffloadPolicy()
    whole = dict([*policy.named_parameters(), *policy.named_buffers()]) if ranks.is_first else {}
    made: dict[nn.Parameter, nn.Parameter] = {}
    body = policy.model.model
    for module in (*body.language_model.layers, *body.visual.blocks, policy):
        _give_memory(module, ranks.device, made)
        fully_shard(module, mesh=ranks.mesh, mp_policy=precision, offload_policy=offload)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    _hand_out(policy, whole, ranks)


def _give_memory(
    module: nn.Module, device: torch.device, made: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Memory on a device, of any content, for what is not sharded yet; what is tied stays tied."""
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            if not isinstance(param, DTensor):
                empty = torch.empty_like(param, device=device)
                fresh = made.setdefault(param, nn.Parameter(empty, param.requires_grad))
                setattr(part, name, fresh)
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device=device))


@torch.no_grad()
def _hand_out(policy: nn.Module, whole: dict[str, Tensor], ranks: Ranks) -> None:
    """Rank 0's parameters and buffers to all ranks, one at a time."""
    for name, param in policy.named_parameters():
        tensor = torch.empty(param.shape, dtype=param.dtype, device=ranks.device)
        if ranks.is_first:
            tensor.copy_(whole.pop(name))
        part = distribute_tensor(tensor, param.device_mesh, param.placements)
        param.to_local().copy_(part.to_local())
    for name, buffer in policy.named_buffers():
        if ranks.is_first:
            buffer.copy_(whole.pop(name))
        dist.broadcast(buffer, src=0)


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices for each rank, ascending: the dearest first, each to the rank with least so far.

    Args:
        costs: of each index.
        ranks: number of ranks.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        lightest = min(range(ranks), key=loads.__getitem__)
        dealt[lightest].append(index)
        loads[lightest] += costs[index]
    return [sorted(indices) for indices in dealt]


def picklable(error: Exception) -> Exception:
    """The exception, or one that tells of it, in a form that other ranks can read."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # its class takes other arguments than it keeps
        return RuntimeError(f"{type(error).__name__}: {error}")
