"""Work done ahead in threads, in order and with bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_END: Any = object()


def num_workers() -> int:
    """Threads to decode and write in: one for each core of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


def ahead(
    pool: Executor,
    function: Callable[[_Item], Any],
    items: Iterable[_Item],
    number: int,
    weight: Callable[[Any], float] = lambda result: 0,
    limit: float = float("inf"),
) -> Iterator[tuple[_Item, Any]]:
    """Call a function on items in other threads, in order, while the results before are worked on.

    Args:
        pool: of the threads.
        function: of one item.
        items: taken when there is room for them.
        number: of results to have ready, at most.
        weight: of a result in memory.
        limit: no more is begun once results that wait weigh so much.

    Returns:
        Each item with its result.
    """
    waiting: deque[tuple[_Item, Future]] = deque()
    remaining = iter(items)

    def is_room() -> bool:
        return len(waiting) < number and sum(weight(f.result()) for _, f in waiting if f.done()) < limit

    while True:
        while is_room() and (item := next(remaining, _END)) is not _END:
            waiting.append((item, pool.submit(function, item)))
        if not waiting:
            return
        item, future = waiting.popleft()
        yield item, future.result()
