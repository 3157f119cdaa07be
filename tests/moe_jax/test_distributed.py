"""Several processes on one machine: results, and how the others end when one is killed, fails or never comes."""

import contextlib
import socket
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_jax import distributed

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

from kill_peers import Job  # noqa: E402

SUM = [sys.executable, str(SCRIPTS / "kill_peers.py"), "--sum"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No cluster's variables."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(tmp_path):
    """Starts a command in several processes."""
    jobs = []

    def job(command, count=2):
        jobs.append(Job(command, count, str(tmp_path)))
        return jobs[-1]

    yield job
    for one in jobs:
        one.close()


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_a_sum_over_the_devices_of_two_processes(start):
    job = start([*SUM, "--calls", "2"])
    assert [process.wait(60) for process in job.processes] == [0, 0], [job.words(i) for i in range(2)]
    for out, _ in job.files:
        assert out.read_text().splitlines()[-1] == "values 3.5 3.5 3.5 3.5"


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_and_name_the_process_that_was_killed(start, victim):
    job = start(SUM)
    job.wait_for("running", 60)
    seconds, wrong = job.kill(victim, limit=60)
    assert not wrong and seconds < 60


def test_an_exception_in_one_of_three_ends_the_others(start, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import os, time
            from moe_jax import distributed
            distributed.initialize(timeout=60)
            if os.environ["JAX_PROCESS_ID"] == "2":
                raise ValueError("bad weather")
            time.sleep(600)
        """)
    )
    job = start([sys.executable, str(program)], 3)
    statuses = [process.wait(60) for process in job.processes]
    assert statuses[2] == 1 and 0 not in statuses
    for i in range(3):
        assert f"process 2 (pid {job.processes[2].pid} on " in job.words(i)
        assert "failed: ValueError: bad weather" in job.words(i)


def test_a_process_that_never_comes(address):
    with ThreadPoolExecutor() as pool:
        came = [pool.submit(distributed.initialize, address, 4, rank, timeout=3) for rank in (0, 2)]
        for one in came:
            with pytest.raises(TimeoutError, match=f"2 of 4 processes came to {address} within 3 s; missing: 1, 3"):
                one.result()
    with pytest.raises(TimeoutError, match=f"process 0 did not come to {address} within 0.5 s"):
        distributed.initialize(address, 2, 1, timeout=0.5)


@pytest.mark.parametrize(
    "line",
    [b"GET / HTTP/1.1", b'{"kind": "scan"}', b'{"kind": "hello", "text": "me", "rank": true, "count": 2}', b"[1]"],
)
def test_strangers_at_the_door_are_sent_away(address, line):
    host, port = address.split(":")
    with ThreadPoolExecutor() as pool:
        came = pool.submit(distributed.initialize, address, 2, 0, timeout=3)
        stranger = knock(host, int(port))
        with stranger:
            stranger.sendall(line + b"\n")
            assert stranger.recv(1) == b""
        with pytest.raises(TimeoutError, match="1 of 2 processes came to .*; missing: 1"):
            came.result()


def knock(host, port):
    """A connection to a port that is about to be opened."""
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, port), timeout=10)
        time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_processes_that_contradict_each_other(address):
    with ThreadPoolExecutor() as pool:
        came = [pool.submit(distributed.initialize, address, 2 + rank, rank, timeout=20) for rank in (0, 1)]
        for one in came:
            with pytest.raises(RuntimeError, match="process 1 .* is one of 3 processes, and process 0 one of 2"):
                one.result()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"process 0 cannot listen at 127.0.0.1:{port}"):
            distributed.initialize(f"127.0.0.1:{port}", 2, 0, timeout=20)


def test_one_process_needs_nothing(monkeypatch):
    distributed.initialize()
    distributed.initialize("127.0.0.1:1", 1, 0)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    distributed.initialize()
    distributed.shutdown()


@pytest.mark.parametrize(
    "variables, arguments, words",
    [
        ({}, ("127.0.0.1:1", 2), "nothing says process_id"),
        ({"JAX_NUM_PROCESSES": "2"}, (), "nothing says coordinator_address, process_id"),
        ({"JAX_PROCESS_ID": "first"}, ("127.0.0.1:1", 2), "JAX_PROCESS_ID=first: not an integer"),
        ({}, ("127.0.0.1:1", 2, 2), "process_id 2 is not one of num_processes 2"),
        ({}, ("127.0.0.1", 2, 0), "'127.0.0.1' is not of the form host:port"),
    ],
)
def test_arguments_that_are_wrong(monkeypatch, variables, arguments, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        distributed.initialize(*arguments)
