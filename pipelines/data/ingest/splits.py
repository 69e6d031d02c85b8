"""Which split (train, test, ...) of a data set a file belongs to, so that none leaks into another."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from pipelines.cli.errors import DataError
from pipelines.data.ingest.recognise import LeftOut

# Words for a split, as the Hugging Face Hub reads them, too; and MNIST's own.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "t10k"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
}
_NUMBERED = re.compile(r"^(.+)-\d{5}-of-\d{5}")
_WORD = re.compile(r"t10k|[a-z]+")
ALL = "all"


def split_of(file: str, format: str) -> str | None:
    """The split that the path names, None where it names none.

    Of image files the folders count, where they are a word for a split and nothing else: a file `train.png` may show
    one. Of all others the words in the file's name count first (`mnist-train.parquet`), then those in its folders',
    from the last on; and `NAME-00000-of-00001` is a split of that name, whatever it is.

    >>> split_of("default/train/0000.parquet", "parquet"), split_of("cat/train.png", "folder")
    ('train', None)
    """
    *folders, name = PurePosixPath(file).parts
    if format == "folder":
        return next((_WORDS[folder.lower()] for folder in folders if folder.lower() in _WORDS), None)
    for part in (name.split(".", 1)[0], *reversed(folders)):
        words = (_WORDS[word] for word in _WORD.findall(part.lower()) if word in _WORDS)
        if found := next(words, None):
            return found
    numbered = _NUMBERED.match(name)
    return numbered[1] if numbered else None


def without_split(file: str) -> tuple[str, ...]:
    """The folders of an image file without the one that names its split."""
    folders = list(PurePosixPath(file).parts[:-1])
    named = next((index for index, folder in enumerate(folders) if folder.lower() in _WORDS), None)
    if named is not None:
        del folders[named]
    return tuple(folders)


def choose_split(
    where: str, files: Sequence[str], format: str, split: str | None, left_out: LeftOut
) -> tuple[list[str], bool]:
    """The files of the split asked for.

    Args:
        where: What an error begins with.
        files: Paths below the source's base.
        format: A key of `sources.FORMATS`.
        split: A word for a split, or its own name; `ALL` for every file; None to refuse a mixture.
        left_out: Takes what belongs to other splits.

    Returns:
        The files, and whether the folder that names their split is no class of theirs.

    Raises:
        DataError: Several splits, or files of one and of none, and `split` does not say which; or it names none of
            them.
    """
    found = {file: split_of(file, format) for file in files}
    names = sorted({name for name in found.values() if name is not None})
    loose = [file for file, name in found.items() if name is None]
    if split == ALL:
        return list(files), False
    if split is not None:
        wanted = _WORDS.get(split.lower(), split)
        kept = [file for file, name in found.items() if name == wanted]
        if not kept:
            raise DataError(f"{where}: holds no split {split!r}, but {_listed(names, loose)}; correct `split`")
        for file, name in found.items():
            if name != wanted:
                left_out.add(f"of {'no split' if name is None else f'split {name}'}, as split = {wanted}", file)
        return kept, format == "folder"
    # One folder `train` among classes is most likely a class: trains.
    if len(names) > 1 or (names and loose and format != "folder"):
        raise DataError(
            f"{where}: holds {_listed(names, loose)}; choose one with split = {names[-1]}, or mix them with "
            f"split = {ALL}"
        )
    return list(files), format == "folder" and bool(names) and not loose


def _listed(names: Iterable[str], loose: Sequence[str]) -> str:
    names = list(names)
    listed = f"the split{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else ""
    return " and ".join(filter(None, [listed, f"files of no split, such as {loose[0]}" if loose else ""]))
