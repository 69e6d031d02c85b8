"""Recipes and command lines become a config, or one line that names the field, the value and the rule."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli.config import as_dict, differences, digest, parse, require
from pipelines.cli.errors import ConfigError
from pipelines.data.ingest.config import IngestConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.sampling.config import SampleConfig
from pipelines.training.config import TrainConfig
from pipelines.verify.config import VerifyConfig


@dataclass(frozen=True)
class Section:
    """A section."""

    size: int = 4
    """Pixels."""
    kind: Literal["a", "b"] = "a"
    """A choice."""
    shape: tuple[int, ...] = (1, 2)
    """Numbers."""
    mirror: bool = False
    """A flag."""

    def __post_init__(self) -> None:
        require(self.size > 0, "section.size", self.size, "must be positive")


@dataclass(frozen=True)
class Config:
    """A job."""

    name: str = "x"
    """Its name."""
    workers: int | tuple[int, int] = 1
    """A number or a range."""
    section: Section = field(default_factory=Section)
    """The section."""
    dry_run: bool = False
    """Another flag."""


def read(*argv: str) -> Config:
    return parse(Config, argv, "A job.")


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_nothing_given_is_the_default() -> None:
    assert read() == Config()


def test_a_recipe_and_later_overrides(tmp_path: Path) -> None:
    path = recipe(tmp_path, "name: y\nworkers: [2, 4]\nsection: {size: 8, shape: [3]}\n")
    assert read("--config", path) == Config("y", (2, 4), Section(8, "a", (3,)))
    assert read("--config", path, "--section.size", "16", "--section.kind=b").section == Section(16, "b", (3,))
    assert read("--section.size", "16", "--config", path).section.size == 8


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--FLAG"], True),
        (["--FLAG", "--name", "y"], True),
        (["--FLAG", "true"], True),
        (["--FLAG=true"], True),
        (["--FLAG", "false"], False),
        (["--FLAG=false"], False),
        (["--FLAG", "--FLAG", "false"], False),
    ],
)
@pytest.mark.parametrize("flag", ["dry_run", "section.mirror"])
def test_a_boolean_is_a_flag_that_also_takes_a_value(words: list[str], value: bool, flag: str) -> None:
    config = read(*(word.replace("FLAG", flag) for word in words))
    assert (config.dry_run if flag == "dry_run" else config.section.mirror) is value


def booleans(config_class: type, prefix: str = "") -> Iterator[str]:
    """Names of the boolean fields of a job, also of its sections."""
    for name, kind in get_type_hints(config_class).items():
        if is_dataclass(kind):
            yield from booleans(cast(type, kind), f"{prefix}{name}.")
        elif kind is bool:
            yield prefix + name


JOBS: list[tuple[type[Any], list[str]]] = [
    (TrainConfig, []),
    (IngestConfig, ["--source", "a", "--output", "b"]),
    (SampleConfig, ["--model", "a", "--output", "b", "--num_images", "1"]),
    (EvaluateConfig, ["--model", "a", "--data", "b", "--output", "c"]),
    (VerifyConfig, ["--uri", "a"]),
]


# What else makes it fit.
BESIDE = {
    "diffusion.learned_ends": ["--diffusion.schedule", "gamma_learned", "--train.loss", "vlb"],
    "diffusion.zero_terminal_snr": ["--diffusion.prediction", "v"],
    "network.learned_variance": ["--train.loss", "hybrid"],
}


@pytest.mark.parametrize(("config_class", "required"), JOBS)
def test_every_boolean_of_every_job_is_a_flag(config_class: type[Any], required: list[str]) -> None:
    names = [*booleans(config_class)]
    assert names or config_class in (IngestConfig, VerifyConfig)
    for name in names:
        for words, value in ([], True), (["true"], True), (["false"], False):
            beside = BESIDE.get(name, []) if value else []
            config = parse(config_class, [*required, *beside, f"--{name}", *words], "")
            assert attrgetter(name)(config) is value


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--section.siz", "3"], "--section.siz 3; did you mean --section.size?"),
        (["--section.siz=3"], "--section.siz=3; did you mean --section.size?"),
        (["--dry"], "--dry; did you mean --dry_run?"),
        (["--w", "3"], "--w 3; did you mean --workers?"),
        (["--nothing-like-it", "3"], "--nothing-like-it 3; --help lists every field"),
    ],
)
def test_an_abbreviation_is_refused_with_the_full_name(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(*words)
    assert str(refusal.value) == f"unrecognized arguments: {told}"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--dry_run", "perhaps"], "dry_run"),
        (["--section.sise", "3"], "section.sise"),
        (["--section.size", "three"], "section.size"),
        (["--section.size", "0"], "section.size = 0: must be positive"),
        (["--section.kind", "c"], "section.kind"),
        (["--workers", "[1, 2, 3]"], "workers"),
        (["--config", "/nowhere/recipe.yaml"], "config = /nowhere/recipe.yaml: cannot be read (No such file"),
        (["--config=/"], "config = /: is not a regular file"),
        (["--config"], "expected one argument"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_command_lines_are_one_line(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(*argv)
    line = str(refusal.value)
    assert told in line
    assert "\n" not in line
    assert "Traceback" not in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("section: {sise: 3}", "sise"),
        ("naem: y", "naem"),
        ("section: {size: three}", "size"),
        ("section: {size: -1}", "section.size = -1: must be positive"),
        ("section: [", "recipe.yaml: is not YAML (while parsing"),
        ("section: 3", "section = 3: must be a section"),
        ("section: [1]", "section = [1]: must be a section"),
        ("section:", "recipe.yaml: section = None: is empty"),
        ("section: {size: null}", "section.size = None: must not be null"),
        ("name: null", "recipe.yaml: name = None: is empty"),
        ("", "recipe.yaml': must hold fields"),
        ("hello", "recipe.yaml': must hold fields"),
        ("- name: y", "recipe.yaml': must hold fields"),
    ],
)
def test_bad_recipes_are_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read("--config", recipe(tmp_path, text))
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_recipe_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: is not YAML \(.*can't decode"):
        read("--config", str(tmp_path / "recipe.yaml"))


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--section.size", "Pixels.", "A choice.", "Its name.", "A number or a range."):
        assert text in shown


def test_what_print_config_prints_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--name", "z", "--workers", "[1, 2]", "--section.kind", "b", "--print_config")
    assert ended.value.code == 0
    assert read("--config", recipe(tmp_path, capsys.readouterr().out)) == Config("z", (1, 2), Section(kind="b"))


@pytest.mark.parametrize(("config_class", "required"), JOBS)
def test_what_a_job_prints_as_its_config_is_a_recipe_of_it(
    config_class: type[Any], required: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(config_class, [*required, "--cluster.num_workers", "[1, 2]", "--print_config"], "")
    again = parse(config_class, ["--config", recipe(tmp_path, capsys.readouterr().out)], "")
    assert again == parse(config_class, [*required, "--cluster.num_workers", "[1, 2]"], "")


def shared_fields(config_class: type[Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(name, type) of the fields that the jobs share."""
    for name, kind in get_type_hints(config_class).items():
        if is_dataclass(kind) and name in ("cluster", "tracking"):
            yield from shared_fields(cast(type, kind), f"{name}.")
        elif prefix or name in ("name", "root", "precision", "batch_size", "seed"):
            yield f"{prefix}{name}", kind


def test_the_jobs_have_one_vocabulary() -> None:
    fields: dict[str, set[object]] = {}
    for config_class, _ in JOBS:
        for name, kind in shared_fields(config_class):
            fields.setdefault(name, set()).add(kind)
    several = {"name": {str, str | None}, "seed": {int, int | str}}  # a training has a name; '{date}' is a seed
    assert {name: kinds for name, kinds in fields.items() if len(kinds) > 1} == several
    sections = {name.partition(".")[0] for name in fields if "." in name}
    assert sections == {"cluster", "tracking"}
    for name in ("precision", "batch_size", "cluster.gpus_per_worker", "tracking.uri", "root"):
        assert sum(name in dict(shared_fields(config_class)) for config_class, _ in JOBS) == 3, name
    assert all("cluster.address" in dict(shared_fields(config_class)) for config_class, _ in JOBS)


@pytest.mark.parametrize(
    ("config_class", "words", "told"),
    [
        (SampleConfig, ["--dtype", "float32"], "--dtype is now --precision; write --precision fp32"),
        (EvaluateConfig, ["--dtype=bfloat16"], "--dtype is now --precision; write --precision bf16"),
        (SampleConfig, ["--dtype=auto"], "--dtype is now --precision; write --precision auto"),
        (
            SampleConfig,
            ["--sampler", "ddim", "--steps", "50"],
            "--sampler is now --sampler.name, --steps is now --sampler.steps; "
            "write --sampler.name ddim --sampler.steps 50",
        ),
        (
            SampleConfig,
            ["--sampler=ddpm", "--sigma2=beta", "--eta", "0"],
            "--sampler is now --sampler.name, --sigma2 is now --sampler.sigma2, --eta is now --sampler.eta; "
            "write --sampler.name ddpm --sampler.sigma2 beta --sampler.eta 0",
        ),
        (TrainConfig, ["--train.seed", "3"], "--train.seed is now --seed; write --seed 3"),
        (TrainConfig, ["--train.precision=bf16"], "--train.precision is now --precision; write --precision bf16"),
        (
            TrainConfig,
            ["--cluster.use_gpu", "--train.batch_size", "8"],
            "--cluster.use_gpu is now --cluster.gpus_per_worker, --train.batch_size is now --batch_size; "
            "write --cluster.gpus_per_worker 1 --batch_size 8",
        ),
        (
            TrainConfig,
            ["--cluster.use_gpu=false"],
            "--cluster.use_gpu is now --cluster.gpus_per_worker; write --cluster.gpus_per_worker 0",
        ),
        (
            IngestConfig,
            ["--num_workers", "[1,4]"],
            "--num_workers is now --cluster.num_workers; write --cluster.num_workers [1,4]",
        ),
        (
            VerifyConfig,
            ["--cpus_per_worker", "2"],
            "--cpus_per_worker is now --cluster.cpus_per_worker; write --cluster.cpus_per_worker 2",
        ),
        (
            EvaluateConfig,
            ["--gpus_per_worker", "0.5", "--tracking_uri", "http://host"],
            "--gpus_per_worker is now --cluster.gpus_per_worker, --tracking_uri is now --tracking.uri; "
            "write --cluster.gpus_per_worker 0.5 --tracking.uri http://host",
        ),
    ],
)
def test_a_name_of_an_earlier_version_is_refused_with_the_name_of_today(
    config_class: type[Any], words: list[str], told: str
) -> None:
    required = dict(JOBS)[config_class]
    with pytest.raises(ConfigError) as refusal:
        parse(config_class, [*required, *words], "")
    assert str(refusal.value) == told
    parse(config_class, [*required, *told.partition("; write ")[2].split()], "")


def test_a_recipe_of_an_earlier_version_is_refused_with_its_lines_of_today(tmp_path: Path) -> None:
    old = "train:\n  steps: 5\n  batch_size: 8\n  precision: bf16\ncluster: {use_gpu: true, num_workers: [1, 2]}\n"
    path = recipe(tmp_path, old)
    with pytest.raises(ConfigError) as refusal:
        parse(TrainConfig, ["--config", path], "")
    assert str(refusal.value) == (
        f"config = {path}: train.batch_size is now batch_size, train.precision is now precision, cluster.use_gpu is "
        "now cluster.gpus_per_worker; write batch_size: 8, precision: bf16, cluster.gpus_per_worker: 1"
    )
    new = str(refusal.value).partition("; write ")[2].replace(", ", "\n")
    config = parse(TrainConfig, ["--config", recipe(tmp_path, f"train: {{steps: 5}}\n{new}\n")], "")
    assert (config.batch_size, config.precision, config.cluster.gpus_per_worker) == (8, "bf16", 1)
    path = recipe(tmp_path, "dtype: float32\nnum_workers: [1, 2]\n")
    with pytest.raises(ConfigError) as refusal:
        parse(SampleConfig, ["--config", path], "")
    assert str(refusal.value) == (
        f"config = {path}: dtype is now precision, num_workers is now cluster.num_workers; "
        "write precision: fp32, cluster.num_workers: [1, 2]"
    )


def test_the_variances_of_an_evaluation_are_a_field_of_their_own() -> None:
    assert parse(EvaluateConfig, [*dict(JOBS)[EvaluateConfig], "--sigma2", "beta"], "").sigma2 == "beta"


def test_a_name_of_another_job_alone_is_no_name_of_an_earlier_version() -> None:
    with pytest.raises(ConfigError, match=r"^unrecognized arguments: --dtype float32"):
        parse(VerifyConfig, ["--uri", "a", "--dtype", "float32"], "")


leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2)
trees = st.recursive(leaves, lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, max_size=3), max_leaves=6)


@given(trees, trees)
def test_differences_are_empty_exactly_for_equal_values(left: object, right: object) -> None:
    # None stands for "not given": a key with None and no key are the same to a reader of the message
    assert differences(left, left) == []
    if left != right and not _holds_none(left) and not _holds_none(right) and _no_empty(left) and _no_empty(right):
        assert differences(left, right)


def _holds_none(value: object) -> bool:
    return value is None or (isinstance(value, dict) and any(map(_holds_none, value.values())))


def _no_empty(value: object) -> bool:
    return value != {} and (not isinstance(value, dict) or all(map(_no_empty, value.values())))


def test_differences_name_the_leaf() -> None:
    stored, given_ = as_dict(Config()), as_dict(Config(name="y", section=Section(shape=(3,))))
    assert differences(stored, given_) == ["name: 'x' -> 'y'", "section.shape: [1, 2] -> [3]"]
    assert differences({}, {"a": 1}) == ["a: None -> 1"]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a: {'b': 1} -> 2"]


def test_differences_have_the_names_of_today() -> None:
    """Stored requests and checkpoints keep their own."""
    assert differences({"dtype": "float32"}, {"dtype": "bfloat16"}) == ["precision: 'fp32' -> 'bf16'"]
    assert differences({"train": {"seed": 1}}, {"train": {"seed": 2}}) == ["seed: 1 -> 2"]
    for name in ("sampler", "steps", "eta", "sigma2"):  # stored by several jobs
        assert differences({name: 1}, {name: 2}) == [f"{name}: 1 -> 2"]


def test_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert len({digest(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, [1, 2], [2, 1], {"a": "1"})}) == 6


@pytest.mark.parametrize("kind", ["root", "output of ingest", "output of sample", "output of evaluate"])
def test_what_would_be_lost_with_rays_copy_of_the_working_directory_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipelines.data.ingest.config import IngestConfig
    from pipelines.evaluation.config import EvaluateConfig
    from pipelines.sampling.config import SampleConfig
    from pipelines.training.config import TrainConfig

    makers: dict[str, Callable[[str], object]] = {
        "root": lambda place: TrainConfig(root=place),
        "output of ingest": lambda place: IngestConfig("photos", place),
        "output of sample": lambda place: SampleConfig("model", place, 1),
        "output of evaluate": lambda place: EvaluateConfig("model", "data", place),
    }
    make = makers[kind]
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0123"
    copy.mkdir(parents=True)
    make("out")
    monkeypatch.chdir(copy)
    for place in ("out", "./out", "../out", str(copy / "out")):
        with pytest.raises(ConfigError, match=rf"^{kind.split()[0]} = '.*out': would lie in Ray's temporary copy"):
            make(place)
    for place in (str(tmp_path / "out"), "s3://bucket/out", "~/out", "file:///data/out"):
        make(place)
