"""The memory of a device: its size, detecting that it ran out, and what it holds then."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.display.numbers import format_bytes
from ptacc.model.state_dict import describe_tensor

GIB = 2**30
LARGEST = 5
"""Number of tensors that a description lists."""

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "status_alloc_failed",
    "cudnn_status_not_supported",
    "unable to find an engine",
)
"""Parts of the messages of other errors than `OutOfMemoryError`: of the host's allocator, of cuBLAS and cuDNN.

cuDNN raises the last two if no algorithm gets the memory that it needs, among other reasons.
"""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, means that memory ran out.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
        True
        >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if error is None:
        return False
    has_message = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or has_message or is_out_of_memory(error.__cause__)


def out_of_memory_message(act: Callable[[], object]) -> str | None:
    """Call `act`, free unused memory, and return the first line of the error if memory ran out; None if it did not."""
    message = None
    try:
        act()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = (str(error) or type(error).__name__).partition("\n")[0]
    # Not in the block above, where the traceback still holds the tensors of the forward pass.
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # pinned memory; older versions of torch lack it
            torch.accelerator.empty_host_cache()
    return message


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a device, or those of the host that this process may use."""
    if device.type != "cpu":
        return int(torch.accelerator.get_memory_info(device)[1])
    if sys.platform == "win32":
        return 0  # unknown there
    import resource

    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    return physical if allowed == resource.RLIM_INFINITY else min(physical, allowed)


# ---- what memory holds


def describe_memory(device: torch.device, model: nn.Module, optimizers: Iterable[Optimizer]) -> list[str]:
    """Describe the memory of a device by kind, and the largest tensors there. Reads nothing from the device.

    Activations that only autograd holds are not seen as tensors. On CUDA they are in the rest of what is allocated.
    """
    named = {name: tensor for name, tensor in name_tensors(model, optimizers) if is_on(tensor, device)}
    owners = {id(tensor): name for name, tensor in named.items()}
    alive = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]  # `isinstance` may run users' code
    alive = [tensor for tensor in alive if is_on(tensor, device) and has_memory(tensor)]
    unique = {id(tensor): (owners.get(id(tensor), "unnamed"), tensor) for tensor in (*alive, *named.values())}
    allocated = peak = None
    if device.type == "cuda":
        allocated, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return [*format_kinds(sizes_by_kind(named), allocated, peak), *format_largest(unique.values())]


def name_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, gradients, buffers and optimizer states, each with its kind and its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        yield f"weights: {name}", parameter
        if parameter.grad is not None:
            yield f"gradients: {name}", parameter.grad
    for name, buffer in model.named_buffers():
        yield f"buffers: {name}", buffer
    for optimizer in optimizers:
        for owner, state in optimizer.state.items():
            for key, value in state.items() if isinstance(state, Mapping) else ():
                if isinstance(value, Tensor):
                    yield f"optimizer state: {key} of {names.get(id(owner), 'a parameter')}", value


def is_on(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor is on a device. One of both may lack an index.

    Example:
        >>> is_on(torch.zeros(2), torch.device("cpu:0")), is_on(torch.zeros(2, device="meta"), torch.device("cpu"))
        (True, False)
    """
    indices = {tensor.device.index, device.index} - {None}
    return tensor.device.type == device.type and len(indices) < 2


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own. The tensors that `torch.compile` traces with have none.

    Sparse tensors and those within `torch.vmap` have none either: they consist of tensors that have.
    """
    try:
        return tensor.untyped_storage().device == tensor.device
    except NotImplementedError:
        return False


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's entries; of a DTensor, those on this rank; of a sparse tensor, those it has.

    Example:
        >>> num_bytes(torch.eye(4)), num_bytes(torch.eye(4).to_sparse())
        (64, 80)
    """
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    parts = [local]
    if local.layout == torch.sparse_coo:  # gradients of `Embedding(sparse=True)`; `indices()` would have to add them up
        parts = [local._indices(), local._values()]  # noqa: SLF001
    return sum(part.numel() * part.element_size() for part in parts)


def sizes_by_kind(named: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the bytes of each kind of tensor."""
    sizes: dict[str, int] = {}
    for name, tensor in named.items():
        kind = name.partition(":")[0]
        sizes[kind] = sizes.get(kind, 0) + num_bytes(tensor)
    return sizes


def format_kinds(sizes: Mapping[str, int], allocated: int | None, peak: int | None) -> list[str]:
    """Return lines with the memory of each kind, and with the rest of what is allocated if that is known.

    Example:
        >>> format_kinds({"weights": 2 * GIB}, 5 * GIB, 6 * GIB)
        ['memory: weights 2.00 GiB, rest (activations, batches, others) 3.00 GiB', 'allocated: 5.00 GiB, peak 6.00 GiB']
    """
    parts = [f"{kind} {format_bytes(size)}" for kind, size in sizes.items()]
    if allocated is None or peak is None:
        return [f"memory: {', '.join(parts)}"] if parts else []
    rest = max(allocated - sum(sizes.values()), 0)
    parts.append(f"rest (activations, batches, others) {format_bytes(rest)}")
    return [f"memory: {', '.join(parts)}", f"allocated: {format_bytes(allocated)}, peak {format_bytes(peak)}"]


def format_largest(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return lines with the largest of these tensors, given with their names.

    Example:
        >>> format_largest([("weights: 0.bias", torch.zeros(8)), ("weights: 0.weight", torch.zeros(8, 256))])
        ['largest tensors:', '  8.0 KiB  float32 (8, 256)  weights: 0.weight', '  32 B  float32 (8,)  weights: 0.bias']
    """
    largest = sorted(tensors, key=lambda named: num_bytes(named[1]), reverse=True)[:LARGEST]
    lines = [f"  {format_bytes(num_bytes(t))}  {describe_tensor(t)}  {name}" for name, t in largest]
    return ["largest tensors:", *lines] if lines else []
