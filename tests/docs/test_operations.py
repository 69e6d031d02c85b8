"""Every command of docs/operations.md: run here, or said there to need a cloud, a cluster or a store."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docs/operations.md").read_text()
# A comment before every block of commands says what a test can do with it.
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?(?P<indent> *)```bash\n(?P<commands>.*?)\n *```", re.DOTALL)
# Loopback, and a network on which nothing should listen.
NETWORK = """
ip link set lo up
ip link add net0 type veth peer name net1
ip address add 10.9.8.7/24 dev net0
ip link set net0 up
ip link set net1 up
ip route add default via 10.9.8.6
"""
# Prints the addresses on which anything in the namespace listens.
LISTENING = """
import psutil
found = psutil.net_connections("tcp")
hosts = {each.laddr.ip.removeprefix("::ffff:") for each in found if each.status == psutil.CONN_LISTEN}
print("listening on", *sorted(hosts))
"""
MARKS = {
    "run",
    "run in a terminal of its own",
    "needs a cloud",
    "needs a Kubernetes cluster",
    "needs machines",
    "tested by the tests of this project",
}


def blocks() -> list[tuple[str, str]]:
    """(mark, commands) of each block, in order."""
    return [(found["mark"] or "", found["commands"]) for found in BLOCK.finditer(TEXT)]


def test_every_block_of_commands_says_how_it_is_checked() -> None:
    assert len(blocks()) == TEXT.count("```bash")
    assert {mark for mark, _ in blocks()} <= MARKS
    assert [mark for mark, _ in blocks()].count("run") >= 3


@pytest.mark.ray
@pytest.mark.slow
def test_the_path_for_one_machine_works_by_copy_and_paste(tmp_path: Path) -> None:
    """All blocks to be run, as one script, on a machine that has this repository and nothing else."""
    script = ["set -eu", NETWORK, "exec 2>&1"]
    for number, (mark, commands) in enumerate(blocks()):
        if mark == "run":
            script.append(commands)
        elif mark == "run in a terminal of its own":
            script.append(f"({commands}) > {shlex.quote(str(tmp_path))}/terminal-{number}.log 2>&1 &")
    script.append(f"{shlex.quote(sys.executable)} -c {shlex.quote(LISTENING)}")
    # Namespaces of its own: the usual ports are free, and everything started ends with it.
    alone = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
        pytest.skip("cannot make namespaces")
    drop = ("RAY_", "MLFLOW_", "AWS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [*alone, "bash", "-c", "\n".join(script)],
        cwd=REPOSITORY,
        env={
            **environment,
            "HOME": str(tmp_path / "home"),
            "UV_OFFLINE": "1",
            "UV_NO_SYNC": "1",
            "RAY_worker_niceness": "0",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for result in (
        "first: trained",
        "256 of 8x8x1",
        "bits/dim",
        " is kept, run the same command",
        "each once",
        "listening on 127.0.0.1\n",
    ):
        assert result in done.stdout
