"""What a worker reads about its node."""

import math
import socket

import pytest
import torch

from pipelines.training.node_metrics import NodeMetrics


def test_readings_are_named_by_node_and_within_their_ranges() -> None:
    values = NodeMetrics(3).read(torch.device("cpu"))
    assert all(name.startswith("system/node_3/") for name in values)
    short = {name.removeprefix("system/node_3/"): value for name, value in values.items()}
    assert short.keys() == {
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
        "process_memory_megabytes",
        "network_receive_megabytes",
        "network_transmit_megabytes",
    }
    assert all(math.isfinite(value) and value >= 0 for value in short.values())
    assert all(short[name] <= 100 for name in short if name.endswith("percentage"))
    assert 10 < short["process_memory_megabytes"] < short["system_memory_usage_megabytes"] * 10


def test_transfers_are_those_since_the_last_reading() -> None:
    node = NodeMetrics(0)
    node.read(torch.device("cpu"))
    left, right = socket.socket(), socket.create_server(("127.0.0.1", 0))
    left.connect(right.getsockname())
    peer, _ = right.accept()
    for _ in range(50):
        left.sendall(bytes(100_000))
        received = 0
        while received < 100_000:
            received += len(peer.recv(1 << 20))
    for opened in (left, peer, right):
        opened.close()
    assert node.read(torch.device("cpu"))["system/node_0/network_transmit_megabytes"] >= 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_readings_too() -> None:
    held = torch.zeros(1 << 20, device="cuda")
    values = NodeMetrics(0).read(torch.device("cuda"))
    assert values["system/node_0/gpu_memory_usage_megabytes"] >= held.numel() * 4 / 1e6
