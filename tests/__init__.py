"""A package, so that on Ray's workers, too, `tests` is this folder, and not what a library installs under that name."""
