"""Several machines on one: network namespaces with an address each, on a bridge, whose cables can be pulled."""

import os
import subprocess


class NotPermitted(Exception):
    """This user may not make network namespaces here, or there is no command `ip`."""


class Machines:
    """`count` network namespaces; machine n has the address 10.77.0.(n + 1).

    Raises:
        NotPermitted: As it says.
    """

    def __init__(self, count: int) -> None:
        self._names = [f"ddpm-{os.getpid()}-{n}" for n in range(count)]
        self.addresses = [f"10.77.0.{n + 1}" for n in range(count)]
        try:
            _ip("netns", "add", self._names[0])
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise NotPermitted(getattr(error, "stderr", None) or str(error)) from error
        # The bridge is in the first machine: nothing of this is seen outside.
        switch = self._names[0]
        _ip("-n", switch, "link", "add", "lan", "type", "bridge")
        _ip("-n", switch, "addr", "add", f"{self.addresses[0]}/24", "dev", "lan")
        for name in ("lo", "lan"):
            _ip("-n", switch, "link", "set", name, "up")
        for n in range(1, count):
            name, port = self._names[n], f"port{n}"
            _ip("netns", "add", name)
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "lan", "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "lan", "up")
            _ip("-n", name, "addr", "add", f"{self.addresses[n]}/24", "dev", "lan")
            for link in ("lo", "lan"):
                _ip("-n", name, "link", "set", link, "up")

    def on(self, n: int) -> list[str]:
        """The words before a command that make it run on machine n."""
        return ["ip", "netns", "exec", self._names[n]]

    def cut_off(self, n: int) -> None:
        """Pull the cable of machine n (not of the first, which holds the switch): packets are lost, nothing resets."""
        _ip("-n", self._names[0], "link", "set", f"port{n}", "down")

    def close(self) -> None:
        """Remove them all; processes on them have to have ended."""
        for name in self._names:
            _ip("netns", "del", name, check=False)


def _ip(*arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)
