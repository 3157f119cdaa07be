"""One program in several processes: `initialize` joins them, and the loss of one stops the others, by name.

JAX by itself notices a killed process when its heartbeats time out, aborts from C++ then, and also where a process
never comes: nothing that Python could catch. So each process has a monitor (`peer_monitor.py`), which knows before JAX
does who is missing, and hears at once who is lost. POSIX only.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from .peer_monitor import GRACE, LATER, PROGRAM, SETTLE, Job, split_address


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    timeout: float = 300.0,
    heartbeat_timeout: float = 30.0,
    shutdown_timeout: float = 300.0,
) -> None:
    """`jax.distributed.initialize`, with errors that name who is missing or lost. Comes before anything else of JAX.

    What is not given comes from `JAX_COORDINATOR_ADDRESS` (`host:port` of process 0), `JAX_NUM_PROCESSES`,
    `JAX_PROCESS_ID` and `JAX_LOCAL_DEVICE_IDS`, else from what JAX detects (Slurm, Open MPI, Cloud TPU, Kubernetes).
    Where nothing speaks of several processes, nothing happens.

    From here to `shutdown`, which the program's end calls, the loss of a process ends all others, wherever they are,
    with status 1 (after 5 s by SIGKILL) and a line on standard error that names it. Lost is who died, left with an
    exception, or has a host that was silent for `heartbeat_timeout` seconds. `sys.exit` is a normal end: others are
    waited for, at most `shutdown_timeout` seconds. JAX's preemption service is turned off: with it, SIGTERM ends
    nothing.

    Raises `TimeoutError` when not all processes have come within `timeout` seconds, with the ids of those missing;
    `ValueError` for arguments that are incomplete, malformed or out of range; `RuntimeError` for a second call or one
    after JAX has started its devices, and when processes contradict each other, one dies or the address is taken.
    """
    import jax

    if _monitor is not None or jax.distributed.is_initialized():
        raise RuntimeError("initialize: the processes are joined already")
    address, count, rank, devices = _detect(
        coordinator_address, num_processes, process_id, local_device_ids, int(timeout)
    )
    if count == 1 or address is count is rank is None:
        return
    bind = _check(address, count, rank)
    _join(Job(address, bind, count, rank, os.getpid(), timeout, heartbeat_timeout, shutdown_timeout), devices)


def _join(job: Job, devices: int | Sequence[int] | None) -> None:
    global _monitor
    import jax

    monitor = _Monitor(job)
    try:
        monitor.wait_for_start()
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            job.address,
            job.count,
            job.rank,
            devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=job.bind,
            initialization_timeout=int(job.timeout) + LATER,
            heartbeat_timeout_seconds=int(job.heartbeat_timeout) + LATER,
            shutdown_timeout_seconds=int(job.shutdown_timeout) + LATER,
        )
    except BaseException as error:
        monitor.fail(error)
        monitor.close()
        raise
    _monitor = monitor
    atexit.register(_at_exit)


def shutdown() -> None:
    """Waits for the other processes to come here too, and leaves them. Does nothing where there are none."""
    global _monitor
    import jax

    if _monitor is None or _monitor.pid != os.getpid():
        return
    _monitor.tell("finished")
    jax.distributed.shutdown()
    _monitor.close("done")
    _monitor = None


def _at_exit() -> None:
    """After an exception, a process does not wait for the others: they may be waiting for it."""
    error = getattr(sys, "last_value", None)
    if _monitor is None or _monitor.pid != os.getpid() or error is None:
        return shutdown()
    _monitor.fail(error)
    _exit()


def _exit() -> None:
    """At once: what else would be done at an exit may wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


def _detect(address, count, rank, devices, timeout: int) -> tuple[Any, Any, Any, Any]:
    """The arguments, completed by variables, then by what JAX finds."""
    from jax._src.clusters import ClusterEnv  # what JAX detects has no public name

    def variable(name):
        try:
            return [int(number) for number in os.environ[name].split(",")] if os.environ.get(name) else [None]
        except ValueError:
            raise ValueError(f"{name}={os.environ[name]}: not an integer") from None

    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = variable("JAX_NUM_PROCESSES")[0] if count is None else count
    rank = variable("JAX_PROCESS_ID")[0] if rank is None else rank
    devices = variable("JAX_LOCAL_DEVICE_IDS") if devices is None else devices
    given = address, count, rank, None if devices == [None] else devices
    if all(value is not None for value in given):
        return given
    return ClusterEnv.auto_detect_unset_distributed_params(*given, None, timeout)


def _check(address: Any, count: Any, rank: Any) -> str:
    """The address to listen at: all of the host's, as its name may stand for another one; loopback as it is."""
    values = {"coordinator_address": address, "num_processes": count, "process_id": rank}
    if missing := [name for name, value in values.items() if value is None]:
        raise ValueError(f"initialize: nothing says {', '.join(missing)}; there are {values}")
    if not isinstance(count, int) or not isinstance(rank, int) or not 0 <= rank < count:
        raise ValueError(f"initialize: process_id {rank!r} is not one of num_processes {count!r}")
    host, port = split_address(address)
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or (address if loopback else f"[::]:{port}")
    split_address(bind)
    return bind


class _Monitor:
    """A process's own side of its monitor."""

    def __init__(self, job: Job):
        self.pid = os.getpid()
        self._over = False  # the others know of an error here, or need to know of nothing more
        self._answer: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._news = threading.Event()
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-S", PROGRAM, json.dumps(dataclasses.asdict(job))]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
        threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, kind: str, text: str = "") -> None:
        with contextlib.suppress(OSError):  # the monitor has ended, which `_watch` notices
            self._socket.sendall(json.dumps({"kind": kind, "text": text}).encode() + b"\n")

    def _hear(self) -> dict:
        line = b""
        with contextlib.suppress(OSError):
            while not line.endswith(b"\n") and (more := self._socket.recv(1)):
                line += more
        return json.loads(line or '{"kind": "end", "text": "the monitor of this process has ended"}')

    def _watch(self) -> None:
        """Hears of the start, then ends the process on bad news; if it cannot, the monitor will."""
        answer = self._hear()
        self._answer.put(answer)
        if answer["kind"] == "start":
            answer = self._hear()
            if not self._over:
                if answer["kind"] == "end":
                    print(f"moe_jax: {answer['text']}", file=sys.stderr)
                _exit()
        self._news.set()

    def wait_for_start(self) -> None:
        """Raises `TimeoutError` and `RuntimeError` as `initialize` does."""
        answer = self._answer.get()
        if answer["kind"] != "start":
            self._over = True
            raise (TimeoutError if answer["kind"] == "late" else RuntimeError)(answer["text"])

    def fail(self, error: BaseException) -> None:
        """Reports an exception, and returns when the others know of it, or of what it came from."""
        if not self._over:
            self._over = True
            self.tell("failed", ": ".join(filter(None, (type(error).__name__, str(error))))[:1000])
            self._news.wait(SETTLE + GRACE)

    def close(self, last: str = "") -> None:
        self._over = True
        if last:
            self.tell(last)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(2 * GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_monitor: _Monitor | None = None
