"""One program in several processes: `initialize` joins them, and the loss of one stops the others, by name.

JAX by itself notices a killed process when its heartbeats time out, aborts from C++ then, and also where a process
never comes: nothing that Python could catch. So each process has a monitor, a small process that no collective blocks
and no abort ends. Monitors meet at the coordinator's address before JAX does, in a star around process 0's, which
knows who is missing; then the port is JAX's. Over the connections, which stay, each reports when its process fails or
dies; the news goes to all of them, and they end their processes. POSIX only.

This file is also the monitor's program: at its top it imports the standard library only.
"""

import atexit
import contextlib
import dataclasses
import json
import math
import os
import queue
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

# Seconds: between signs of life; for which an exception is held back, as the death that caused it may not be known
# yet; that a process gets to end by itself; by which JAX's own timeouts are longer than the monitors', which know more.
_BEAT, _SETTLE, _GRACE, _LATER = 1.0, 1.0, 5.0, 20


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a monitor is told."""

    address: str
    bind: str
    count: int
    rank: int
    pid: int
    timeout: float
    heartbeat_timeout: float
    shutdown_timeout: float


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
    _join(_Job(address, bind, count, rank, os.getpid(), timeout, heartbeat_timeout, shutdown_timeout), devices)


def _join(job: _Job, devices: int | Sequence[int] | None) -> None:
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
            initialization_timeout=int(job.timeout) + _LATER,
            heartbeat_timeout_seconds=int(job.heartbeat_timeout) + _LATER,
            shutdown_timeout_seconds=int(job.shutdown_timeout) + _LATER,
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
    host, port = _split(address)
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or (address if loopback else f"[::]:{port}")
    _split(bind)
    return bind


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"initialize: {address!r} is not of the form host:port")
    return host.strip("[]"), int(port)


class _Monitor:
    """A process's own side of its monitor."""

    def __init__(self, job: _Job):
        self.pid = os.getpid()
        self._over = False  # the others know of an error here, or need to know of nothing more
        self._answer: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._news = threading.Event()
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-S", __file__, json.dumps(dataclasses.asdict(job))]
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
            self._news.wait(_SETTLE + _GRACE)

    def close(self, last: str = "") -> None:
        self._over = True
        if last:
            self.tell(last)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(2 * _GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_monitor: _Monitor | None = None


class _Channel:
    """Messages, each a line of JSON, over a connected socket that blocks nobody."""

    def __init__(self, connected: socket.socket):
        connected.setblocking(False)
        self.socket, self.heard, self._rest = connected, time.monotonic(), b""

    def send(self, kind: str, text: Any = "", **more: Any) -> None:
        with contextlib.suppress(OSError):  # the other end is gone, which `receive` will say
            self.socket.sendall(json.dumps({"kind": kind, "text": text, **more}).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """What has come; nothing more will after None."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > 1 << 20:
            return None
        self.heard = time.monotonic()
        try:
            return [{"kind": "", "text": "", **json.loads(line)} for line in lines]
        except (ValueError, TypeError):
            return None


class _Member:
    """The monitor of one process, connected to process 0's, the hub."""

    def __init__(self, job: _Job):
        self.job, self.process, self._parent = job, _Channel(socket.socket(fileno=0)), os.getppid()
        self.state, self.gone = "running", False  # of the process; others: finished, done, failed
        self.channels: dict[int, _Channel] = {}
        self.who: dict[int, str] = {}
        self.started = self.concluded = False
        self.deadline, self.end = time.monotonic() + job.timeout, math.inf
        self._problem = ""

    def run(self) -> None:
        beaten = 0.0
        while not self.over():
            with selectors.DefaultSelector() as selector:
                for source in self.sources():
                    selector.register(source, selectors.EVENT_READ)
                selector.select(0.2)
            self.hear_process()  # before what its end did to others
            self.hear_monitors()
            if (now := time.monotonic()) > beaten + _BEAT:
                beaten = now
                self.beat()
            if not self.concluded:
                self.check(now)
        if self.concluded and self.started and not self.gone and self.state != "done":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.job.pid, signal.SIGKILL)

    def over(self) -> bool:
        left = self.gone and (self.concluded or not self.channels)
        return left or self.state == "done" or time.monotonic() > self.end

    def sources(self) -> list[socket.socket]:
        own = [] if self.gone else [self.process]
        return [channel.socket for channel in (*own, *self.channels.values())]

    def hear_process(self) -> None:
        messages = [] if self.gone else self.process.receive()
        for message in messages or ():
            self.state = message["kind"]
            self.report(self.job.rank, self.state, message["text"])
        # a child that it forked may keep the socket open
        if not self.gone and (messages is None or os.getppid() != self._parent):
            self.gone, self.end = True, min(self.end, time.monotonic() + _GRACE)
            if self.state in ("running", "finished"):
                self.report(self.job.rank, "died", "")

    def hear_monitors(self) -> None:
        for rank, channel in list(self.channels.items()):
            messages = channel.receive()
            for message in messages or ():
                self.hear(rank, message)
            if messages is None:
                self.channels.pop(rank).socket.close()
                self.closed(rank)

    def beat(self) -> None:
        self.broadcast("beat")

    def broadcast(self, kind: str, text: Any = "") -> None:
        for channel in self.channels.values():
            channel.send(kind, text)

    def report(self, rank: int, kind: str, text: str) -> None:
        """Something of this process that the hub is to know."""
        self.broadcast(kind, text)

    def hear(self, rank: int, message: dict) -> None:
        kind, text = message["kind"], message["text"]
        if kind in ("here", "start"):
            self.who = {int(rank): who for rank, who in text.items()}
        if kind == "start":
            self.start()
        if kind in ("lost", "late"):
            self.conclude(kind, text)

    def closed(self, rank: int) -> None:
        self._problem = "the connection was closed at once"
        if self.who:  # it was a hub
            self.conclude("lost", f"{self.who[rank]} died, or the connection to it broke")

    def check(self, now: float) -> None:
        if not self.started:
            self.join(now)
        for rank, channel in list(self.channels.items()):
            if now > channel.heard + self.job.heartbeat_timeout:
                who = self.who.get(rank, f"process {rank}")
                self.conclude("lost", f"{who} has been silent for {now - channel.heard:.0f} s")

    def join(self, now: float) -> None:
        if now > self.deadline:
            self.report(self.job.rank, "failed", self.late())
            self.conclude("late", self.late())
        elif not self.channels:
            try:
                self.channels[0] = _Channel(socket.create_connection(_split(self.job.address), timeout=2))
            except OSError as error:
                self._problem = str(error)
            else:
                self.channels[0].send("hello", _name(self.job), rank=self.job.rank, count=self.job.count)

    def late(self) -> str:
        where = f"{self.job.address} within {self.job.timeout:g} s"
        if not self.who:
            return f"process 0 did not come to {where} ({self._problem})"
        missing = [rank for rank in range(self.job.count) if rank not in self.who]
        return f"{len(self.who)} of {self.job.count} processes came to {where}; missing: {str(missing)[1:-1]}"

    def start(self) -> None:
        self.started = True
        self.process.send("start")

    def conclude(self, kind: str, text: str) -> None:
        """The news, after which there is none: ends the process, or before the start lets it raise."""
        if self.concluded:
            return
        self.concluded, self.end = True, time.monotonic() + _GRACE
        if self.started:
            end = "" if text.startswith(self.who[self.job.rank]) else f"; process {self.job.rank} ends"
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 1)[1]:  # it may be full, and nobody reading
                    os.write(2, f"moe_jax: {text}{end}\n".encode())
        self.process.send(kind, text)


class _Hub(_Member):
    """The monitor of process 0, to which all others are connected."""

    def __init__(self, job: _Job):
        super().__init__(job)
        self.who[0] = _name(job)
        self.finished: dict[int, float] = {}
        self.done: set[int] = set()
        self.failures: dict[int, tuple[float, str]] = {}
        self.guests: list[_Channel] = []  # who have not said yet who they are
        self.listener: socket.socket | None = None
        try:
            self.listener = _listen(job.bind)
        except OSError as error:
            self.conclude("lost", f"process 0 cannot listen at {job.bind}: {error}")

    def over(self) -> bool:
        if not self.concluded:
            return len(self.done) == self.job.count or time.monotonic() > self.end
        return self.gone and not self.channels or time.monotonic() > self.end

    def sources(self) -> list[socket.socket]:
        return [*super().sources(), *(guest.socket for guest in self.guests), *filter(None, [self.listener])]

    def hear_monitors(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.listener:
                self.guests.append(_Channel(self.listener.accept()[0]))
        guests, self.guests = self.guests, []
        for guest in guests:
            messages = guest.receive()
            if messages == []:
                self.guests.append(guest)
            elif messages and self.listener:
                self.admit(guest, messages[0])
            else:
                guest.socket.close()
        super().hear_monitors()

    def admit(self, guest: _Channel, hello: dict) -> None:
        rank, count, who = hello.get("rank"), hello.get("count"), hello["text"]
        if count != self.job.count or rank not in range(count) or rank in self.who:
            twice = rank in self.who and f"there are {who} and {self.who[rank]}"
            text = twice or f"{who} is one of {count} processes, and process 0 one of {self.job.count}"
            guest.send("lost", text)
            return self.conclude("lost", text)
        self.channels[rank], self.who[rank] = guest, who
        guest.send("here", self.who)
        if len(self.who) == count:
            self.close_door()  # from here on the port is JAX's
            self.start()
            self.broadcast("start", self.who)

    def close_door(self) -> None:
        for closed in (*(guest.socket for guest in self.guests), *filter(None, [self.listener])):
            closed.close()
        self.guests, self.listener = [], None

    def beat(self) -> None:
        self.broadcast(*(("beat",) if self.started else ("here", self.who)))

    def hear(self, rank: int, message: dict) -> None:
        self.report(rank, message["kind"], message["text"])

    def report(self, rank: int, kind: str, text: str) -> None:
        now = time.monotonic()
        if kind == "finished":
            self.finished[rank] = now
        elif kind == "done":
            self.done.add(rank)
        elif kind == "failed":
            self.failures[rank] = now, f"{self.who[rank]} failed: {text}"
        elif kind == "died" and rank not in self.failures:
            self.conclude("lost", f"{self.who[rank]} died")

    def closed(self, rank: int) -> None:
        if rank not in self.done:
            self.report(rank, "died", "")

    def check(self, now: float) -> None:
        super().check(now)
        when, text = min(self.failures.values(), default=(math.inf, ""))
        if now > when + _SETTLE:
            self.conclude("lost", text)
        running = [self.who[rank] for rank in sorted(self.who) if rank not in self.finished]
        first = min(self.finished, key=self.finished.get, default=None)
        if running and first is not None and now > self.finished[first] + self.job.shutdown_timeout:
            waited = f"{self.who[first]} has waited {self.job.shutdown_timeout:g} s for the others' end"
            self.conclude("lost", f"{waited}; not there: {', '.join(running)}")

    def join(self, now: float) -> None:
        if now > self.deadline:
            self.conclude("late", self.late())

    def conclude(self, kind: str, text: str) -> None:
        if not self.concluded:
            self.broadcast(kind, text)
            self.close_door()
        super().conclude(kind, text)


def _name(job: _Job) -> str:
    return f"process {job.rank} (pid {job.pid} on {socket.gethostname()})"


def _listen(address: str) -> socket.socket:
    host, port = _split(address)
    if host == "::" and socket.has_dualstack_ipv6():
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        family, *_, where = socket.getaddrinfo("0.0.0.0" if host == "::" else host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(where[:2], family=family)
    listener.setblocking(False)
    return listener


def _main() -> None:
    # a terminal or a scheduler may send these to all processes of a group; monitors end with their processes
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    job = _Job(**json.loads(sys.argv[1]))
    (_Member if job.rank else _Hub)(job).run()


if __name__ == "__main__":
    _main()
