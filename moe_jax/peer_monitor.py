"""A monitor: a small process beside each process of a program, which no collective blocks and no abort ends.

Monitors meet at the coordinator's address before JAX does, in a star around process 0's, which knows who is missing;
then the port is JAX's. Over the connections, which stay, each reports when its process fails or dies; the news goes to
all of them, and they end their processes. `distributed.py` starts this file by itself, as a program: it imports the
standard library only.
"""

import contextlib
import dataclasses
import json
import math
import os
import select
import selectors
import signal
import socket
import sys
import time
from typing import Any

# Seconds: between signs of life; for which an exception is held back, as the death that caused it may not be known
# yet; that a process gets to end by itself; by which JAX's own timeouts are longer than the monitors', which know more.
BEAT, SETTLE, GRACE, LATER = 1.0, 1.0, 5.0, 20


PROGRAM = __file__


@dataclasses.dataclass(frozen=True)
class Job:
    """What a monitor is told."""

    address: str
    bind: str
    count: int
    rank: int
    pid: int
    timeout: float
    heartbeat_timeout: float
    shutdown_timeout: float


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"initialize: {address!r} is not of the form host:port")
    return host.strip("[]"), int(port)


class Channel:
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


class Member:
    """The monitor of one process, connected to process 0's, the hub."""

    def __init__(self, job: Job):
        self.job, self.process, self._parent = job, Channel(socket.socket(fileno=0)), os.getppid()
        self.state, self.gone = "running", False  # of the process; others: finished, done, failed
        self.channels: dict[int, Channel] = {}
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
            if (now := time.monotonic()) > beaten + BEAT:
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
            self.gone, self.end = True, min(self.end, time.monotonic() + GRACE)
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
                self.channels[0] = Channel(socket.create_connection(split_address(self.job.address), timeout=2))
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
        self.concluded, self.end = True, time.monotonic() + GRACE
        if self.started:
            end = "" if text.startswith(self.who[self.job.rank]) else f"; process {self.job.rank} ends"
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 1)[1]:  # it may be full, and nobody reading
                    os.write(2, f"moe_jax: {text}{end}\n".encode())
        self.process.send(kind, text)


class Hub(Member):
    """The monitor of process 0, to which all others are connected."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.who[0] = _name(job)
        self.finished: dict[int, float] = {}
        self.done: set[int] = set()
        self.failures: dict[int, tuple[float, str]] = {}
        self.guests: list[Channel] = []  # who have not said yet who they are
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
                self.guests.append(Channel(self.listener.accept()[0]))
        guests, self.guests = self.guests, []
        for guest in guests:
            messages = guest.receive()
            if messages == []:
                self.guests.append(guest)
            elif messages and self.listener and _is_hello(messages[0]):
                self.admit(guest, messages[0])
            else:
                guest.socket.close()
        super().hear_monitors()

    def admit(self, guest: Channel, hello: dict) -> None:
        rank, count, who = hello["rank"], hello["count"], hello["text"]
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
        if now > when + SETTLE:
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


def _is_hello(message: dict) -> bool:
    """Whether it is from a monitor that joins: anything may connect to an open port."""
    kinds = {"text": str, "rank": int, "count": int}
    return message["kind"] == "hello" and all(type(message.get(name)) is kind for name, kind in kinds.items())


def _name(job: Job) -> str:
    return f"process {job.rank} (pid {job.pid} on {socket.gethostname()})"


def _listen(address: str) -> socket.socket:
    host, port = split_address(address)
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
    job = Job(**json.loads(sys.argv[1]))
    (Member if job.rank else Hub)(job).run()


if __name__ == "__main__":
    _main()
