"""The sampling job's configuration: what is refused, and dates."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.cli.config import parse
from pipelines.cli.errors import ConfigError
from pipelines.cluster.actor_pool import ActorPool
from pipelines.sampling.config import GuidanceConfig, SampleConfig

GIVEN = ["--model", "m", "--output", "o", "--num_images", "5"]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_images", 0, "at least 1"),
        ("num_images", -5, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("shard_size", 0, "at least 1"),
        ("seed", -1, "a number >= 0"),
        ("seed", "today", "a number >= 0"),
        ("date", "21.11.2026", "2026-11-21"),
        ("model", "", "must be a directory"),
        ("output", "", "must be a path"),
        ("num_images", None, "must be given; only labels with counts"),
        ("labels", "3:0", "the count of 3 must be a whole number"),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} = .*{rule}"):
        SampleConfig(**{"model": "m", "output": "o", "num_images": 5, field: value})


@pytest.mark.parametrize(
    ("guidance", "told"),
    [
        ({"scale": float("nan")}, r"guidance\.scale = nan: must be finite"),
        ({"scale": float("inf")}, r"guidance\.scale = inf: must be finite"),
        ({"interval": (1.0, 1.0)}, r"guidance\.interval = \(1\.0, 1\.0\): must be two noise levels"),
        ({"interval": (-1.0, 1.0)}, r"guidance\.interval = .*0 <= low < high"),
        ({"interval": (0.0, float("inf"))}, r"guidance\.interval = .*finite"),
        ({"interval": (float("nan"), 1.0)}, r"guidance\.interval = .*0 <= low < high"),
        ({"model": ""}, r"guidance\.model = '': must be a directory"),
        ({"scale": 2.0}, r"guidance\.scale = 2\.0: needs labels, or a weaker model"),
        ({"interval": (0.0, 1.0)}, r"guidance\.interval = .*needs labels, or a weaker model"),
    ],
)
def test_bad_guidance_is_refused(guidance: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}"):
        SampleConfig("m", "o", 5, guidance=GuidanceConfig(**guidance))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--labels", "all:3"], None),
        (["--labels", "0:3,1:2"], None),
        (["--labels", "from:data"], None),
        (["--labels", "all", "--num_images", "30"], None),
        (["--labels", "all"], "^num_images = None: must be given"),
        (["--labels", "balanced"], "^num_images = None: must be given"),
        ([], "^num_images = None: must be given"),
    ],
)
def test_labels_with_counts_tell_how_many_images(argv: list[str], told: str | None) -> None:
    argv = ["--model", "m", "--output", "o", *argv]
    if told is None:
        assert parse(SampleConfig, argv, "").num_images in (None, 30)
        return
    with pytest.raises(ConfigError, match=told):
        parse(SampleConfig, argv, "")


def test_labels_and_guidance_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "sweep.yaml"
    recipe.write_text('model: m\nlabels: "3:50"\nguidance: {scale: 2, interval: [0.3, 5]}\n')
    config = parse(SampleConfig, ["--config", str(recipe), "--output", "o", "--guidance.scale", "3"], "")
    assert (config.labels, config.guidance) == ("3:50", GuidanceConfig(3.0, (0.3, 5.0)))
    recipe.write_text("model: m\nlabels: 3:50\n")  # by the rules of YAML the number 230
    with pytest.raises(ConfigError, match=r"labels: .*Expected a str"):
        parse(SampleConfig, ["--config", str(recipe), "--output", "o"], "")


@pytest.mark.parametrize(
    "argv", [["--model", "m", "--output", "o"], [*GIVEN, "--sampler.name", "euler"], [*GIVEN, "--images", "3"]]
)
def test_the_command_line_is_refused_in_one_line(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$"):
        parse(SampleConfig, argv, "")


@pytest.mark.parametrize(
    ("num_images", "batch_size", "given", "chosen"),
    [
        (1, 64, None, 64),
        (64, 64, None, 64),
        (200, 64, None, 64),  # four shards, for four workers
        (10_000, 64, None, 640),
        (10**6, 64, None, 1024),
        (10**6, 300, None, 900),  # whole batches: the network's calls are all of one shape, and none of it is wasted
        (10**6, 2048, None, 2048),
        (200, 64, 1024, 1024),
    ],
)
def test_shards_follow_the_request(num_images: int, batch_size: int, given: int | None, chosen: int) -> None:
    config = SampleConfig("m", "o", num_images, batch_size=batch_size, shard_size=given)
    assert config.chosen_shard_size == chosen


def test_a_date_takes_the_place_of_its_placeholders() -> None:
    config = parse(
        SampleConfig,
        ["--model=m", "--output=s3://b/{date}/x", "--seed={date}", "--num_images=5", "--date=2026-02-03"],
        "",
    )
    dated = config.with_date()
    assert (dated.output, dated.seed) == ("s3://b/2026-02-03/x", 20260203)
    today = parse(SampleConfig, [*GIVEN, "--seed", "{date}"], "").with_date()
    assert today.seed == int(str(today.date).replace("-", ""))
    assert parse(SampleConfig, GIVEN, "").with_date().seed == 0


def test_the_pool_is_what_was_asked_for() -> None:
    config = parse(SampleConfig, [*GIVEN, "--cluster.num_workers", "[1,4]", "--cluster.gpus_per_worker", "0.5"], "")
    assert ActorPool.of(config.cluster) == ActorPool((1, 4), 1, 0.5)
    assert ActorPool.of(parse(SampleConfig, GIVEN, "").cluster) == ActorPool(None, 1, 0.0)
    assert ActorPool(None, 2, 0.5).bounds({"CPU": 16.0, "GPU": 2.0}) == (4, 4)
    assert ActorPool(None, 1, 1).bounds({"CPU": 16.0}) == (1, 1), "a cluster that has no GPU yet"
    assert ActorPool(3).bounds({}) == (3, 3)
