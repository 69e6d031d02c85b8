"""What `auto` stands for, on this kind of machine and on others, and that what is continued keeps what it has."""

import json
from pathlib import Path

import pytest

from pipelines.cluster import precision
from pipelines.cluster.precision import bf16_of_cpu, settle
from pipelines.outputs.run_bulk import settled_precision
from pipelines.outputs.shards import ShardedOutput, begun_request
from pipelines.storage.location import Location

# Lines of /proc/cpuinfo, shortened: Intel's Sapphire Rapids, Cooper Lake and Skylake, AMD's Zen 4, Graviton 3 and 2.
SAPPHIRE = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n"
COOPER = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16\n"
SKYLAKE = "vendor_id\t: GenuineIntel\nmodel name\t: bf16 amx_bf16 avx512_bf16\nflags\t\t: fpu avx512f avx512vnni\n"
ZEN_4 = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n"
GRAVITON_3 = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16 dgh\n"
GRAVITON_2 = "processor\t: 0\nFeatures\t: fp asimd asimddp\n"


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Gives this machine another CPU."""

    def change(cpuinfo: str) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text(cpuinfo)
        monkeypatch.setattr(precision, "CPUINFO", path)

    return change


@pytest.mark.parametrize(
    ("cpuinfo", "what", "slower"),
    [
        (SAPPHIRE, "AMX", None),
        (COOPER, "avx512_bf16 without AMX", "1.2 to 1.5"),
        (SKYLAKE, "no bf16 units (AMX, avx512_bf16)", "11 to 14"),
        (ZEN_4, "avx512_bf16", None),
        (GRAVITON_3, "Arm's bf16", None),
        (GRAVITON_2, "no bf16 units (AMX, avx512_bf16)", "11 to 14"),
    ],
)
def test_units_are_read_from_the_flags_alone(cpu, cpuinfo, what, slower) -> None:
    cpu(cpuinfo)
    assert (bf16_of_cpu().what, bf16_of_cpu().slower) == (what, slower)


def test_without_a_list_of_flags_there_are_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "missing")
    assert bf16_of_cpu().slower == "11 to 14"


def test_the_units_of_this_machine_are_those_that_pytorch_finds() -> None:
    import torch

    known = torch.cpu.get_capabilities()
    flags = {"AMX": "amx_bf16", "avx512_bf16": "avx512_bf16", "Arm's bf16": "bf16"}
    found = [name for name, flag in flags.items() if known.get(flag)]
    what = bf16_of_cpu().what
    assert what.startswith(found[0] if found else "no bf16 units")


@pytest.mark.parametrize(
    ("cpuinfo", "asked", "begun_with", "on_gpu", "value", "says"),
    [
        (SAPPHIRE, "auto", None, False, "bf16", "precision: bf16 (this CPU (x86) has AMX)"),
        (SKYLAKE, "auto", None, False, "fp32", "precision: fp32 (this CPU (x86) has no bf16 units (AMX, "),
        (COOPER, "auto", None, False, "fp32", "fp32 (this CPU (x86) has avx512_bf16 without AMX: bf16 would"),
        (ZEN_4, "auto", None, False, "bf16", "bf16 (this CPU (x86) has avx512_bf16)"),
        (COOPER, "bf16", None, False, "bf16", "expect 1.2 to 1.5 times the time of fp32"),
        (SKYLAKE, "auto", None, True, "bf16", "precision: bf16 (on GPUs)"),
        (SAPPHIRE, "auto", "fp32", False, "fp32", "precision: fp32 (as it was begun with)"),
        (SAPPHIRE, "auto", "fp32", True, "fp32", "precision: fp32 (as it was begun with)"),
        (SKYLAKE, "auto", "bf16", False, "bf16", "as it was begun with; this CPU (x86) has no bf16 units (AMX, "),
        (SAPPHIRE, "auto", "fp8", False, "bf16", "has AMX"),  # not one of ours: refused where it is compared
        (SKYLAKE, "bf16", "fp32", False, "bf16", "expect 11 to 14 times the time of fp32"),
        (SAPPHIRE, "bf16", "fp32", False, "bf16", None),
        (SKYLAKE, "bf16", None, True, "bf16", None),
        (SAPPHIRE, "fp32", None, True, "fp32", None),
    ],
)
def test_what_is_computed_in(cpu, monkeypatch, cpuinfo, asked, begun_with, on_gpu, value, says) -> None:
    cpu(cpuinfo)
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86")
    found, line = settle(asked, begun_with, on_gpu)
    assert found == value
    assert line is None if says is None else says in line


def test_an_output_goes_on_in_its_own_precision_on_any_machine(cpu, tmp_path, capsys) -> None:
    cpu(SKYLAKE)
    location = Location.parse(tmp_path / "out")
    assert settled_precision("auto", begun_request(location), 0) == "fp32"
    assert settled_precision("auto", begun_request(location), 0.5) == "bf16"
    assert settled_precision("bf16", begun_request(location), 0) == "bf16"
    assert "precision: bf16 (this CPU" in capsys.readouterr().err
    output = ShardedOutput(location, {"dtype": "float32"})
    output.begin()
    cpu(SAPPHIRE)
    assert settled_precision("auto", begun_request(location), 0) == "fp32"  # unfinished
    output.commit({}, [])
    assert settled_precision("auto", begun_request(location), 1) == "fp32"  # finished
    assert capsys.readouterr().err == "precision: fp32 (as it was begun with)\n" * 2
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(["something else"]))
    assert settled_precision("auto", begun_request(location), 0) == "bf16"  # the output itself says what is wrong
