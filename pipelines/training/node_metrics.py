"""How busy a node is, read by one worker on each node and shown among MLflow's system metrics."""

from contextlib import suppress

import psutil
import torch


class NodeMetrics:
    """CPU, memory, network and GPU use of this node since the last reading."""

    def __init__(self, node_rank: int) -> None:
        self._prefix = f"system/node_{node_rank}"
        psutil.cpu_percent()
        self._network = psutil.net_io_counters()

    def read(self, device: torch.device) -> dict[str, float]:
        """Percentages in [0, 100], sizes in MB, transfers in MB since the last reading."""
        network, self._network = self._network, psutil.net_io_counters()
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
            "network_receive_megabytes": (self._network.bytes_recv - network.bytes_recv) / 1e6,
            "network_transmit_megabytes": (self._network.bytes_sent - network.bytes_sent) / 1e6,
        }
        if device.type == "cuda":
            values["gpu_memory_usage_megabytes"] = torch.cuda.memory_allocated(device) / 1e6
            values["gpu_peak_memory_megabytes"] = torch.cuda.max_memory_allocated(device) / 1e6
            with suppress(ModuleNotFoundError, RuntimeError):  # no NVML: the other numbers stand without it
                values["gpu_utilization_percentage"] = float(torch.cuda.utilization(device))
        return {f"{self._prefix}/{name}": value for name, value in values.items()}
