"""Bad requests of comparisons: sides that do not fit, too few images, and networks that are not what they are said."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

from bad_inputs.datasets import data_set
from bad_inputs.harness import Case
from support.image_files import images, png, write


def _case(
    name: str,
    *options: str,
    says: str,
    make: Callable[[Path], None] = lambda at: None,
    files: Mapping[str, bytes] = {},
    code: int = 1,
    leaves: tuple[str, ...] = (),
) -> Case:
    """Of the 20 images in data against the 21 in other."""

    def build(at: Path) -> list[str]:
        data_set(at / "data")
        data_set(at / "other", count=21)
        make(at)
        write(at, dict(files))
        arguments = [
            "--samples",
            "data",
            "--reference",
            "other",
            "--output",
            "out",
            "--root",
            "root",
            "--features",
            "pixels",
        ]
        return ["quality.py", *arguments, *options]

    return Case("Quality", name, build, (says,), code, leaves)


_INGESTED = ("features", "features/*")

CASES = [
    _case("samples that are not there", "--samples", "nowhere", says="samples = nowhere: ", leaves=_INGESTED),
    _case(
        "one image",
        "--samples",
        "photos",
        make=lambda at: images(at / "photos", 1),
        says="holds 1 image(s); intervals",
        leaves=_INGESTED,
    ),
    _case("a set against itself", "--reference", "data", says="reference = data: holds the very images of samples"),
    _case(
        "sides of different shapes",
        *("--reference", "photos"),
        make=lambda at: write(at / "photos", {f"{i}.png": png(i, 9, 9) for i in range(20)}),
        says="reference = photos: images are 9x9x1 (H x W x C), those of samples 8x8x1; give --resize",
        leaves=_INGESTED,
    ),
    _case("an unknown extractor", "--features", "fid", says="features = 'fid': must be one of random_conv", code=2),
    _case(
        "random features of another number",
        "--features",
        "random_conv:65",
        says="must be random_conv, random_conv:64",
        code=2,
    ),
    _case("no file of weights", "--features", "inception:", says="must name", code=2),
    _case("weights that are not there", "--features", "inception:nowhere.pth", says="nowhere.pth"),
    _case(
        "weights of another sha256",
        *("--features", "inception:w.pth"),
        files={"w.pth": b"hello"},
        says="w.pth: its sha256 begins with",
    ),
    _case(
        "a pickle for weights",
        *("--features", "inception:w.pth", "--any_weights", "true"),
        files={"w.pth": pickle.dumps(Path)},
        says="w.pth: is no file of weights, or holds objects that could run code; refused",
    ),
    _case(
        "a text for an ONNX network",
        "--features",
        "onnx:net.onnx",
        files={"net.onnx": b"hello"},
        says="net.onnx: is no ONNX model",
    ),
    _case("no neighbours", "--neighbours", "0", says="neighbours = 0: must be in 1..100", code=2),
    _case("resizing to nothing", "--resize", "0", says="resize = 0: must be in 4..4096", code=2),
    _case(
        "unseen images that were trained on",
        *("--memorisation.train_data", "data", "--memorisation.unseen_data", "data"),
        says="memorisation.unseen_data = 'data': are the training images; name others",
        code=2,
    ),
    _case("promoting what no model made", "--promote", "true", says="promote: the samples are no sample set"),
    _case(
        "comparing with a data set",
        "--compare_with",
        "data",
        says="compare_with = data: is no output of jobs/quality.py",
    ),
]
