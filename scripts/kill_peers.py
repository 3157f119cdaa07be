"""Kill one of several processes at a random moment, again and again, and see how the others end.

    python scripts/kill_peers.py [--tries 50] [--processes 2] [--within 3] [-- python program.py ...]

The command runs once for each process, with `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` set
for `moe_jax.distributed.initialize`, and four emulated CPU devices unless the environment says otherwise. Up to
`--within` seconds after process 0 has printed `--ready`, a random process is killed by SIGKILL. All others have to end
within `--limit` seconds, not with status 0 and with an error that names the lost one. Without a command: sums over all
devices, for ever. Prints a line for each try; exits with 1 if anything was wrong.
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def sum_over_devices(calls: int | None) -> None:
    """The program without a command: a `psum` over all devices 100 times a call; the mean stays as it is."""
    from moe_jax import distributed

    distributed.initialize(timeout=60)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh, spec = jax.make_mesh((jax.device_count(),), ("x",)), PartitionSpec("x")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec)
    def step(x):
        mean = lambda i, x: jax.lax.pcast(jax.lax.pmean(x, "x"), "x", to="varying")
        return jax.lax.fori_loop(0, 100, mean, x)

    values = np.arange(jax.device_count(), dtype=np.float32)
    x = jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda at: values[at])
    done = 0
    while calls is None or done < calls:
        x = jax.block_until_ready(step(x))
        done += 1
        if done == 1:
            print("running", flush=True)
    print("values", *(float(shard.data[0]) for shard in x.addressable_shards), flush=True)


class Job:
    """One program in several processes of this machine."""

    def __init__(self, command: list[str], count: int, folder: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        shared = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"} | dict(os.environ)
        shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        self.files = [(Path(folder, f"out{i}"), Path(folder, f"err{i}")) for i in range(count)]
        self.processes = []
        for i, (out, err) in enumerate(self.files):
            with out.open("wb") as stdout, err.open("wb") as stderr:
                environment = shared | {"JAX_PROCESS_ID": str(i)}
                self.processes.append(subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr))

    def wait_for(self, text: str, limit: float) -> None:
        """Until process 0 has printed it. Raises `RuntimeError` for an end before that, and after `limit` seconds."""
        end = time.monotonic() + limit
        while text not in self.files[0][0].read_text(errors="replace"):
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                words = "\n".join(self.words(i) for i in range(len(self.processes)))
                raise RuntimeError(f"process 0 did not print {text!r}:\n{words}")
            time.sleep(0.05)

    def kill(self, victim: int, limit: float) -> tuple[float, str]:
        """Seconds until all others had ended, and what was wrong, if anything."""
        begin, wrong = time.monotonic(), ""
        self.processes[victim].kill()
        for i, process in enumerate(self.processes):
            try:
                status = process.wait(max(begin + limit - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                return limit, f"process {i} did not end"
            lost = f"moe_jax: process {victim} (pid {self.processes[victim].pid} on {socket.gethostname()})"
            if status == 0:
                wrong = f"process {i} ended with status 0"
            elif i != victim and not self.says(i, lost):
                wrong = f"process {i} does not say {lost!r} but:\n{self.words(i)}"
        return time.monotonic() - begin, wrong

    def says(self, i: int, text: str) -> bool:
        """Its monitor may be a moment behind."""
        end = time.monotonic() + 5
        while text not in self.words(i) and time.monotonic() < end:
            time.sleep(0.05)
        return text in self.words(i)

    def words(self, i: int) -> str:
        """The end of its standard error."""
        return self.files[i][1].read_text(errors="replace")[-5000:]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--within", type=float, default=3.0, help="seconds after --ready; the kill is at random")
    parser.add_argument("--ready", default="running", help="what process 0 prints when it is under way")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which it is a hang")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sum", action="store_true", help="be the program, as one process of it")
    parser.add_argument("--calls", type=int, help="end after so many calls")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    if options.sum:
        sum_over_devices(options.calls)
        return 0
    command = options.command or [sys.executable, __file__, "--sum"]
    rng, times, failed = random.Random(options.seed), [], 0
    for attempt in range(options.tries):
        victim, delay = rng.randrange(options.processes), rng.uniform(0, options.within)
        with tempfile.TemporaryDirectory() as folder:
            job = Job(command, options.processes, folder)
            try:
                job.wait_for(options.ready, 10 * options.limit)
                time.sleep(delay)
                seconds, wrong = job.kill(victim, options.limit)
            finally:
                job.close()
        times.append(seconds)
        failed += bool(wrong)
        state = f"WRONG: {wrong}" if wrong else "ok"
        print(
            f"{attempt}: process {victim} killed after {delay:.2f} s, others ended in {seconds:.2f} s: {state}",
            flush=True,
        )
    print(f"{options.tries} tries, {failed} wrong; max {max(times):.2f} s, median {statistics.median(times):.2f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
