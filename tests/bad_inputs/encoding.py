"""Bad requests of encodings: samplers and models that no way leads back from, and images that do not fit."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from bad_inputs.datasets import as_column, data_set, with_shape, with_shard
from bad_inputs.harness import Case
from bad_inputs.model_files import model_files
from support.image_files import write


def _case(
    name: str,
    *options: str,
    says: str,
    kind: str = "eps",
    make: Callable[[Path], None] = data_set,
    code: int = 2,
) -> Case:
    """Asked of a model of a `kind` and 20 images."""

    def build(at: Path) -> list[str]:
        make(at / "data")
        write(at / "model", model_files(kind=kind))
        arguments = ["--model", "model", "--data", "data", "--output", "out", "--root", "root"]
        return ["encode.py", *arguments, *options]

    return Case("Encoding", name, build, (says,), code)


_DDIM = ("--sampler.name", "ddim")

CASES = [
    _case(
        "a sampler that draws noise", "--sampler.name", "ddpm", says="sampler.name = 'ddpm': draws noise, and no way"
    ),
    _case("DDIM with noise", *_DDIM, "--sampler.eta", "0.5", says="sampler.eta = 0.5: draws noise, and no way leads"),
    _case("steps by tolerance", "--sampler.tolerance", "0.1", says="sampler.tolerance = 0.1: is for sampling; give"),
    _case(
        "one step",
        *_DDIM,
        "--sampler.steps",
        "1",
        says="sampler.steps: 1 is from the noisiest time to the image at once",
    ),
    _case(
        "more steps than the model has",
        *("--sampler.steps", "21"),
        says="sampler.steps = 21: the model has 20 diffusion steps; ask for at most as many",
    ),
    _case("a model that ends at SNR 0", kind="v, zero terminal SNR", says="model = 'model': its SNR ends at 0, where"),
    _case("more images than there are", "--num_images", "21", says="num_images = 21: data holds 20; ask for at most"),
    _case("no images", "--num_images", "0", says="num_images = 0: must be at least 1"),
    _case("shards of no images", "--shard_size", "0", says="shard_size = 0: must be in 1..1048576"),
    _case("labels of a model without", "--labels", "given", says="labels = 'given': the model was trained without"),
    _case(
        "labels that the data have not",
        *("--labels", "given"),
        kind="eps, labels",
        says="data = data: has no labels, which labels = given needs; ingest with labels",
        code=1,
    ),
    _case(
        "more classes than the model has",
        kind="eps, labels",
        make=with_shard(as_column("label", pa.array([7] * 20, pa.int64()))),
        says="data = data: has the label 7, the model's classes are 0..2; take data with the labels",
        code=1,
    ),
    _case(
        "images of another shape",
        make=with_shape(4, 16),
        says="data = data: images are 4x16x1 (H x W x C), the model's are 8x8x1; ingest the source again",
        code=1,
    ),
    _case("an output in the data set", "--output", "data/out", says="data/out: lies in the data set"),
]
