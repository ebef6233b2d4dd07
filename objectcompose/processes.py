"""Work shared by processes: each takes every n-th group of a list that all of them know."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState

from objectcompose.errors import ObjectComposeError


Item = TypeVar("Item")
#: How long a process waits for the others. They wait while one paints class or validation pictures, or has the longer
#: share of a folder, which takes more than the 10 minutes after which NCCL kills a run.
PROCESS_TIMEOUT = timedelta(hours=24)


def process_state(device: str | None = None) -> PartialState:
    """The processes that a launcher started, or this one alone.

    Args:
        device: what was asked for; "cpu" keeps off the accelerator.
    """
    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=PROCESS_TIMEOUT)
    leave_group_at_exit()
    return state


@functools.cache
def leave_group_at_exit() -> None:
    """Leave the other processes before the interpreter ends; once, however often it is called.

    Gloo's threads may hold tensors a little longer than the work on them lasts; freed while the interpreter ends, they
    abort the process (signal 6). NCCL's group stays: after a failure of this process, leaving would wait for the rest.
    """
    atexit.register(_leave_gloo_group)


def _leave_gloo_group() -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def groups_of_process(items: Sequence[Item], size: int, state: PartialState) -> Iterator[list[Item]]:
    """This process's groups: consecutive items, `size` of them, cut in the same places for any number of processes.

    Raises:
        ObjectComposeError: `size` is below 1.
    """
    if size < 1:
        raise ObjectComposeError(f"`batch_size` must be at least 1, got {size}.")
    for start in range(state.process_index * size, len(items), state.num_processes * size):
        yield list(items[start : start + size])
