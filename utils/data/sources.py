"""Any file, folder or hub name -> rows, with every bad one named by its file and line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from utils.data.files import FILES, TEXT_FILES, number_rows, read_file, refusals_named
from utils.data.rows import BadRows, DataError, Row

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_rows(name: str, split_candidates: Sequence[str], bad: BadRows) -> list[Row]:
    """All rows of `name` at once; see stream_rows."""
    return list(stream_rows(name, split_candidates, bad))


def stream_rows(name: str, split_candidates: Sequence[str], bad: BadRows) -> Iterator[Row]:
    """The rows of a local file, a local folder or a hub data set, one by one as they are read.

    Arguments: name (a .json, .jsonl, .csv or .parquet file, a folder or a hub id; of the latter two
    also NAME:SPLIT, NAME:CONFIG or NAME:CONFIG:SPLIT), split_candidates (the first that the data
    set has is read; a plain file is read whole), bad (takes the rows that cannot be read). Raises
    DataError for what is wrong with a whole file.
    """
    rows = _source(name, split_candidates).read(bad)
    while True:
        before = len(bad)  # whoever takes the rows may find more of them bad
        row = next(rows, None)
        bad.seen += len(bad) - before + (row is not None)
        if row is None:
            return
        yield row


def files_behind(name: str, split_candidates: Sequence[str]) -> list[str]:
    """The files that stream_rows reads: those of `name`, or the Arrow files that `datasets` made
    of them. Raises DataError as it does."""
    return _source(name, split_candidates).files()


@dataclass(frozen=True)
class _Source:
    """One split: the files it lies in, and the function that reads its rows."""

    files: Callable[[], list[str]]
    read: Callable[[BadRows], Iterator[Row]]


def _source(name: str, split_candidates: Sequence[str]) -> _Source:
    kind, path, pinned = _locate(name)
    if kind == "file":
        return _Source(lambda: [path], partial(read_file, path))
    found, pinned = _splits(name, kind, path, pinned)
    wanted = (pinned,) if pinned else tuple(split_candidates)
    for split in wanted:
        if split in found:
            return found[split]
    raise DataError(
        f"{name}: has the splits {', '.join(found) or '(none)'}, but not {' or '.join(wanted)};"
        " name one of them as NAME:SPLIT"
    )


def has_split(name: str, split_candidates: Sequence[str]) -> bool:
    """Whether `name` has one of the splits, to evaluate on while another is trained on.

    False for a plain file, which has none, and for NAME:SPLIT, which means that split for both.
    Raises DataError for a name that cannot be found.
    """
    kind, path, pinned = _locate(name)
    if kind == "file":
        return False
    found, split = _splits(name, kind, path, pinned)
    return not split and not found.keys().isdisjoint(split_candidates)


def _locate(name: str) -> tuple[str, str, str]:
    """("file" | "folder" | "hub", path or hub id, what is pinned of it behind colons or "")."""
    path, pinned = name, ""
    while ":" in path and not os.path.exists(path) and pinned.count(":") < 1:
        base, _, word = path.rpartition(":")
        if not base or not re.fullmatch(r"[\w.-]+", word):
            break
        path, pinned = base, f"{word}:{pinned}" if pinned else word
    if os.path.isdir(path):
        return "folder", path, pinned
    if os.path.exists(path):
        if pinned:
            raise DataError(f"{name}: {path} is a plain file and has no split {pinned}")
        return "file", path, None
    if path.lower().endswith(FILES) or path.startswith(("/", ".", "~")):
        raise DataError(f"{name}: no such file or folder (looked in {os.getcwd()})")
    if not HUB_ID.fullmatch(path):
        raise DataError(f"{name!r}: neither a file, nor a folder, nor a hub id (owner/name)")
    return "hub", path, pinned


def _splits(name: str, kind: str, path: str, pinned: str) -> tuple[dict[str, _Source], str]:
    """(the splits that a folder or hub data set has, by name; the pinned split or ""). pinned:
    SPLIT, CONFIG, CONFIG:SPLIT or "". Raises DataError where a set of several configurations is
    named without one."""
    with refusals_named(name):
        import datasets

        if kind == "folder" and any(
            os.path.exists(os.path.join(path, mark)) for mark in ("dataset_dict.json", "state.json")
        ):
            saved = datasets.load_from_disk(path)
            if not isinstance(saved, dict):
                saved = {str(saved.split or "train"): saved}
            found = {key: _table(f"{path}[{key}]", lambda t=t: t) for key, t in saved.items()}
            return found, pinned
        config, split = _configuration(name, path, pinned)
        if kind == "folder":
            files = datasets.load_dataset_builder(path, config).config.data_files or {}
            taken = {str(key): [str(file) for file in part] for key, part in files.items()}
            _refuse_unread(name, path, [file for part in taken.values() for file in part])
            # Text files are read here rather than by datasets, which cannot name a bad line.
            if taken and all(
                file.lower().endswith(TEXT_FILES) for part in taken.values() for file in part
            ):
                found = {
                    key: _Source(lambda part=part: part, partial(_read_files, part))
                    for key, part in taken.items()
                }
                return found, split
        return {
            key: _table(f"{path}[{key}]", partial(_load_split, path, config, key))
            for key in map(str, datasets.get_dataset_split_names(path, config))
        }, split


def _configuration(name: str, path: str, pinned: str) -> tuple[str | None, str]:
    """(configuration or None for the only one, pinned split or "") of a folder or hub data set."""
    import datasets

    configs = datasets.get_dataset_config_names(path)
    config, colon, split = pinned.partition(":")
    if not colon and config not in configs:
        config, split = "", pinned  # NAME:SPLIT
    if config and config not in configs:
        raise DataError(f"{name}: has the configurations {', '.join(configs)}, but not {config}")
    if not config and len(configs) > 1 and not datasets.get_dataset_default_config_name(path):
        raise DataError(
            f"{name}: has the configurations {', '.join(configs)}; name one of them as "
            f"{path}:{configs[0]}{':' if split else ''}{split}"
        )
    return config or None, split


def _refuse_unread(name: str, path: str, taken: list[str]) -> None:
    """Raises DataError for data files of a folder that are in none of its splits.

    Of files of several kinds `datasets` takes one kind, and of train.jsonl beside more.jsonl only
    the first. A README that says which files make up the set (data_files) has the last word.
    """
    from datasets.data_files import FILES_TO_IGNORE

    readme = os.path.join(path, "README.md")
    if os.path.exists(readme):
        with open(readme, encoding="utf-8", errors="replace") as file:
            if "data_files:" in file.read():
                return
    known, left = {os.path.realpath(file) for file in taken}, []
    for folder, inner, files in os.walk(path):
        inner[:] = [each for each in inner if not each.startswith((".", "__"))]
        for file in files:
            data = file.lower().endswith(FILES) and not file.startswith((".", "__"))
            if data and file not in FILES_TO_IGNORE:
                left.append(os.path.join(folder, file))
    left = sorted(file for file in left if os.path.realpath(file) not in known)
    if left:
        raise DataError(
            f"{name}: {', '.join(left[:5])}{' …' if len(left) > 5 else ''} ({len(left)} in all) "
            "would be read into none of its splits; name the files that are meant, or take these "
            "out of the folder"
        )


def _load_split(path: str, config: str | None, split: str):
    from datasets import load_dataset

    return load_dataset(path, config, split=split)


def _table(label: str, load: Callable) -> _Source:
    """A split that `load` gives as a datasets.Dataset."""

    def files() -> list[str]:
        with refusals_named(label):
            return [each["filename"] for each in load().cache_files]

    def read(bad: BadRows) -> Iterator[Row]:
        with refusals_named(label):
            yield from number_rows(label, load())

    return _Source(files, read)


def _read_files(paths: Iterable[str], bad: BadRows) -> Iterator[Row]:
    problems = []
    for path in paths:
        try:
            yield from read_file(path, bad)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
