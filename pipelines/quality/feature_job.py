"""Making the features of an image set, or finding them: a use of the shard engine without an MLflow run of its own."""

import importlib.metadata

from pipelines.cli.config import digest
from pipelines.cli.console import ProgressLine, event, waiting
from pipelines.cli.errors import StorageError
from pipelines.cluster import connection
from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import GpuClusterConfig
from pipelines.outputs.shards import Progress
from pipelines.outputs.version import code_version
from pipelines.quality.extractors.asking import Asked
from pipelines.quality.features import EXTRACTOR, FEATURES, FeatureRequest, FeatureSet, FeatureShards
from pipelines.quality.image_set import ImageSet
from pipelines.storage.location import Location

# For each pixel of an image, about: it decides no more than whether actors are started.
_MULTIPLICATIONS = {"pixels": 1.0, "random_conv": 2e3, "inception": 1e6, "onnx": 1e6, "model": 1e5}


def features_at(store: Location, request: FeatureRequest) -> Location:
    """Where the features of a request lie in a store: by their own name, so that every job finds them."""
    return store / f"{request.extractor.name}-{digest(request.to_json())[:16]}"


def ensure_features(
    store: Location, request: FeatureRequest, images: ImageSet, extractor: Asked, cluster: GpuClusterConfig, what: str
) -> FeatureSet:
    """The features of `images`, called `what`: those that are in the store, or else made, or gone on with.

    Raises:
        ConfigError: Files of something else are in their place.
        DataError: The images cannot be read, or have features that are not finite.
        StorageError: The store cannot be read or written; a lost shard came out different.
        ClusterError: Ray is out of reach, or gave up.
    """
    location = features_at(store, request)
    output = FEATURES.output(location, request)
    manifest = output.committed()
    lost = [] if manifest is None else output.lost(manifest)
    if manifest is not None and not lost:
        event(f"features of {what}: {request.num_images:,} images, made before, in {location}")
        return FeatureSet.open(location)
    pool = ActorPool.of(cluster)
    pool.check()
    if manifest is None:
        output.begin()
    shards = FeatureShards(location, request, images, cluster.threads)
    left = lost if manifest is not None else list(range(request.num_shards))
    height, width = request.extractor.image_shape[:2]
    each = _MULTIPLICATIONS[request.extractor.kind] * height * width
    weights = each * min(len(left) * request.shard_size, request.num_images)
    used = pool.unless_small(lambda: (len(left), weights))
    extractor.keep(location / EXTRACTOR)
    if manifest is not None:
        event(f"{location}: {len(lost)} of {len(manifest['shards'])} shards are lost; making them again")
        output.restore(shards, lost, manifest, used)
        return FeatureSet.open(location)
    with waiting("preparing the features"):
        where = f"on {connection.connect(used.address)}" if used else "in this process"
    event(f"taking {request.extractor.name} features of {what}, {request.num_images:,} images, {where} into {location}")
    line = ProgressLine("features", request.num_images, "images", first="waiting for the first images")

    def show(progress: Progress) -> None:
        line.update(progress.rows + int(progress.making), progress.rate)

    try:
        records = output.compute(shards, request.num_shards, pool=used, on_progress=show)
    except StorageError:
        # A racing run of the same features committed first, and removed the work directory.
        if output.committed() is None:
            raise
        return FeatureSet.open(location)
    finally:
        line.close()
    fields = {
        "format": FEATURES.format,
        "version": FEATURES.version,
        "num_rows": request.num_images,
        "images": images.location.uri,
        "code_version": code_version(),
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", "pillow", "pyarrow")},
    }
    try:
        output.commit(fields, records)
    except StorageError:  # as above; of images that lie elsewhere
        if output.committed() is None:
            raise
    return FeatureSet.open(location)
