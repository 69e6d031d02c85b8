"""What `auto` stands for: bfloat16 where the hardware is faster in it, float32 elsewhere.

Which machine computes is not known before the job runs: this machine's CPU stands for all.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from ddpm_core.denoiser import Precision

# What a job's field `precision` may be.
PrecisionField = Literal["auto", "fp32", "bf16"]
CPUINFO = Path("/proc/cpuinfo")
# What the requests of sample sets and evaluations call it, in their field `dtype`.
Dtype = Literal["float32", "bfloat16"]
PRECISION_OF: dict[str, "Precision"] = {"float32": "fp32", "bfloat16": "bf16"}
DTYPE_OF: dict["Precision", Dtype] = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Bf16:
    """What a CPU has for bfloat16; `slower` says how many times as long as in float32 the network takes, if it does."""

    what: str
    slower: str | None = None


def bf16_of_cpu() -> Bf16:
    """What this machine's CPU has.

    Outside Linux nothing: PyTorch has no fast bfloat16 for the CPUs of Macs. The factors were measured with networks of
    0.1 to 36 million parameters, training and forward only.
    """
    try:
        lines = [line.partition(":") for line in CPUINFO.read_text().splitlines()]
    except OSError:
        lines = []
    # As the kernel names them, which leaves out what this machine cannot use.
    flags = {flag for name, _, words in lines if name.strip() in ("flags", "Features") for flag in words.split()}
    vendors = {words.strip() for name, _, words in lines if name.strip() == "vendor_id"}
    if "amx_bf16" in flags:
        return Bf16("AMX")
    if "avx512_bf16" in flags:
        # Intel's was slower than its float32 with every network tried.
        return Bf16("avx512_bf16 without AMX", "1.2 to 1.5") if "GenuineIntel" in vendors else Bf16("avx512_bf16")
    if "bf16" in flags:
        return Bf16("Arm's bf16")
    return Bf16("no bf16 units (AMX, avx512_bf16)", "11 to 14")


def settle(asked: PrecisionField, begun_with: object, on_gpu: bool) -> tuple["Precision", str | None]:
    """The precision to compute in, and a line to say about it.

    Args:
        asked: 'fp32' and 'bf16' are taken as they are.
        begun_with: What the run or output that is continued has recorded: `auto` keeps it, on any machine.
        on_gpu: Whether GPUs compute.
    """
    cpu = Bf16("") if on_gpu else bf16_of_cpu()
    where = "on GPUs" if on_gpu else f"this CPU ({platform.machine()}) has {cpu.what}"
    value, reasons = asked, []
    if asked == "auto" and begun_with in ("fp32", "bf16"):
        value, reasons = begun_with, ["as it was begun with"]
    elif asked == "auto" and cpu.slower:
        value, reasons = "fp32", [f"{where}: bf16 would take {cpu.slower} times as long"]
    elif asked == "auto":
        value, reasons = "bf16", [where]
    if value == "bf16" and cpu.slower:
        reasons.append(f"{where}: expect {cpu.slower} times the time of fp32")
    return cast("Precision", value), f"precision: {value} ({'; '.join(reasons)})" if reasons else None
