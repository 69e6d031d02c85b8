"""Of each class, how many samples a classifier of the real digits takes for that class.

    uv run jobs/sample.py --model models:/digits_labels@champion --labels all:100 --output /tmp/samples
    uv run benchmarks/recognised.py /tmp/samples

The classifier is scikit-learn's support vector machine with a radial kernel, fitted on the real training digits. Beside
its verdict on the samples stands that on the real test digits, each with Wilson's 95% interval.
"""

import argparse
import tempfile

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from sklearn.svm import SVC

from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.decode import decode_image
from pipelines.data.opening import ensure_embedded
from pipelines.outputs.manifest import read_manifest
from pipelines.sampling.shard import decode_rows
from pipelines.storage.location import Location
from pipelines.training.config import DIGITS, DIGITS_TEST


def main() -> None:
    """Fit the classifier, then show what it recognises."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("samples", help="a sample set of digits with labels")
    location = Location.parse(arguments.parse_args().samples)
    with tempfile.TemporaryDirectory() as directory:
        train, test = (ensure_embedded(uri, f"{directory}/{i}") for i, uri in enumerate((DIGITS, DIGITS_TEST)))
        classifier = SVC(gamma=5.0 / 64, C=10.0).fit(*pixels_and_labels(train))
        show("real test digits", *pixels_and_labels(test), classifier)
    manifest = read_manifest(location)
    rows = [
        row
        for shard in manifest["shards"]
        for row in decode_rows((location / "data" / shard["name"]).read_bytes(), manifest["request"]["format"])
    ]
    images = np.stack([decode_image(row.png, None, None) for row in rows])
    show("samples", scaled(images), np.array([row.label for row in rows]), classifier)


def pixels_and_labels(data: PreparedDataset) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """All images as vectors [N, 64] of numbers in [0, 1], and their labels [N]."""
    _, images, labels = data.read_images(0, data.num_rows)
    return scaled(images), labels


def scaled(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """uint8 [N, H, W, C] as vectors of numbers in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def show(what: str, pixels: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], classifier: SVC) -> None:
    """Print the share that is recognised, over all and of the class with the smallest one."""
    right = classifier.predict(pixels) == labels
    of_class = {int(label): float(right[labels == label].mean()) for label in np.unique(labels)}
    worst = min(of_class, key=lambda label: of_class[label])
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    print(
        f"{what}: {right.mean():.1%} of {len(right):,} recognised ({interval.low:.1%} to {interval.high:.1%}); "
        f"least of class {worst}, {of_class[worst]:.1%}"
    )


if __name__ == "__main__":
    main()
