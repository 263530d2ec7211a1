"""The workers of a study or a search as tasks of a Ray cluster.

Ray finds each a place that has the GPU or the processors, and starts it anew elsewhere where its
node is lost. Which run a worker does is between it and the storage, as everywhere, so workers on
Ray, others and further calls do the runs of one study at the same time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.studies.stages import Event, Listener
from forgetless.studies.trials import MOST_RETRIES

if TYPE_CHECKING:
    from ray.util.queue import Queue

_PATIENCE_SECONDS = 600
"""How long workers have to finish their step and to save it, when they are asked to end."""


def work_on_ray(
    take_part: Callable[..., None],
    address: str | None,
    workers: int | None,
    most: int,
    listen: Listener,
    *,
    threads: int,
    processes: int,
) -> None:
    """Let workers on a cluster take part until one of them finds nothing left to do.

    All nodes have this package, and see the folder under the same path or share the runs in an
    object store. Ctrl-C ends the workers after their step, which they save.

    Args:
        take_part: what a worker does, given ``listen``.
        address: of the cluster, as ``ray.init`` takes it.
        workers: how many; None for as many as the cluster has GPUs, or else room for.
        most: workers for which there is something to do.
        listen: called with the events of all.
        threads: processors of a process, which has a GPU too where the cluster has any.
        processes: of each worker, on one node.

    Raises:
        UserError: there is no Ray or no such cluster, no node has so many GPUs or processors, or
            each worker failed.
    """
    # Of a cluster that is gone Ray notices that after ten minutes otherwise; now after one.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    try:
        import ray  # takes a second, and is optional
        from ray.exceptions import RayError
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        raise UserError("Ray is not installed: pip install 'forgetless[ray]'") from None
    try:
        ray.init(address, log_to_driver=False, logging_level="error")
    except ConnectionError as problem:
        raise UserError(f"no Ray cluster at {address}: {problem}") from None
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        kind, each = "CPU", processes * threads
        if any("GPU" in node for node in nodes):
            kind, each = "GPU", processes
        room = sum(int(node.get(kind, 0)) // each for node in nodes)
        if not room and processes > 1:
            raise UserError(
                f"no node has {each} {kind}s, which the {processes} processes of a run ask for"
            )
        # On the node of this process, so that no other takes it along when it is lost.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        task = ray.remote(_work).options(
            num_cpus=threads * processes,
            num_gpus=processes if kind == "GPU" else 0,
            max_retries=MOST_RETRIES,  # of nodes that are lost and of processes that are killed
            scheduling_strategy="SPREAD",
        )
        team = [
            task.remote(take_part, os.getcwd(), events)
            for _ in range(min(workers or max(room, 1), most))
        ]
        working, reason = list(team), ""
        try:
            while working:
                ended, working = ray.wait(working, timeout=0.5)
                _pass_on(events, listen)
                for worker in ended:
                    try:
                        ray.get(worker)
                        return
                    except RayError as problem:
                        reason = str(problem).strip().rpartition("\n")[2]
        finally:
            for worker in working:  # waits for room, or has seen that there is nothing left
                ray.cancel(worker)
            ray.wait(team, num_returns=len(team), timeout=_PATIENCE_SECONDS)
            _pass_on(events, listen)
        raise UserError(f"every worker on Ray failed, the last one with {reason}")
    finally:
        ray.shutdown()


def _work(take_part: Callable[..., None], folder: str, events: Queue) -> None:
    """What a worker does, on its node."""
    os.chdir(folder)  # which the relative paths of recipes start from
    # A handler of signals tells of events too, and may have interrupted Ray where it holds a lock.
    told: SimpleQueue[Event | None] = SimpleQueue()

    def send() -> None:
        batch: list[dict[str, Any]] = []  # the process of the queue would import us for an Event
        for event in iter(told.get, None):
            batch.append(asdict(event))
            if told.empty():  # a call for each event would be slower than short steps are
                events.put(batch)
                batch = []
        events.put(batch)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        take_part(listen=told.put)
    finally:
        told.put(None)
        sender.join()


def _pass_on(events: Queue, listen: Listener) -> None:
    for event in chain.from_iterable(events.get_nowait_batch(events.qsize())):
        listen(Event(**event))
