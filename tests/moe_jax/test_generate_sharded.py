"""`scripts/generate_sharded.py` in one process and in two, and when one of two is killed."""

import subprocess
import sys
from pathlib import Path

import pytest
from core_models import folder, golden_model

import moe_jax

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

from kill_peers import Job  # noqa: E402

COMMAND = [sys.executable, str(SCRIPTS / "generate_sharded.py"), str(folder("mixtral")), "--mesh"]
PROMPTS = ["--prompt", "1,2,3", "--prompt", "4,5", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def expected():
    ids = moe_jax.generate(golden_model("mixtral"), [[1, 2, 3], [0, 4, 5]], [[1, 1, 1], [0, 1, 1]], max_new_tokens=6)
    return [" ".join(map(str, row)) for row in ids[:, 3:].tolist()]


def test_one_process_with_eight_devices(expected):
    command = [*COMMAND, "data=2,expert=2,model=2", *PROMPTS, "--emulate", "8"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.splitlines() == expected


def test_two_processes_generate_the_same(tmp_path, expected):
    job = Job([*COMMAND, "data=2,expert=2,model=2", *PROMPTS], 2, str(tmp_path))
    try:
        assert [process.wait(300) for process in job.processes] == [0, 0], job.words(0) + job.words(1)
        assert [out.read_text().splitlines()[-2:] for out, _ in job.files][0] == expected
    finally:
        job.close()


def test_the_other_ends_when_one_is_killed_while_generating(tmp_path):
    job = Job([*COMMAND, "expert=8", *PROMPTS, "--repeat", "0"], 2, str(tmp_path))
    try:
        job.wait_for("147 147", 300)
        seconds, wrong = job.kill(1, limit=60)
        assert not wrong and seconds < 60
    finally:
        job.close()
