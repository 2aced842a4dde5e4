"""Names of data sets (files, folders, hub ids) → the rows of one split."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from utils.data.files import FILES, TEXT_FILES, number_rows, read_file, refusals_named
from utils.data.rows import BadRows, DataError, Row

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Split:
    """Files that are read here, or a datasets.Dataset that `load` gives."""

    label: str
    paths: Sequence[str] = ()
    load: Callable | None = None

    def files(self) -> list[str]:
        """The files that the rows are in: of a Dataset the Arrow files that `datasets` made."""
        if not self.load:
            return list(self.paths)
        with refusals_named(self.label):
            return [each["filename"] for each in self.load().cache_files]

    def rows(self, bad: BadRows) -> Iterator[Row]:
        if self.load:
            with refusals_named(self.label):
                yield from number_rows(self.label, self.load())
        problems = []
        for path in self.paths:
            try:
                yield from read_file(path, bad)
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems)


def stream_rows(name: str, split_candidates: Sequence[str], bad: BadRows) -> Iterator[Row]:
    """The rows of a data set, one by one as they are read.

    Arguments: name (a .json, .jsonl, .csv or .parquet file, a folder or a hub id; of the latter two
    also NAME:SPLIT, NAME:CONFIG or NAME:CONFIG:SPLIT), split_candidates (the first that the data
    set has is read; a plain file is read whole), bad (gets the rows that cannot be read). Raises
    DataError for what is wrong with a whole file.
    """
    rows = _split(name, split_candidates).rows(bad)
    while True:
        before = len(bad)  # the caller may add rows in between
        row = next(rows, None)
        bad.seen += len(bad) - before + (row is not None)
        if row is None:
            return
        yield row


def files_behind(name: str, split_candidates: Sequence[str]) -> list[str]:
    """The files that stream_rows reads. Raises DataError as it does."""
    return _split(name, split_candidates).files()


def has_split(name: str, split_candidates: Sequence[str]) -> bool:
    """Whether a data set has one of the splits, to evaluate on while another is trained on.

    False for a plain file, which has none, and for NAME:SPLIT, which means that split for both.
    Raises DataError for a name that cannot be found.
    """
    kind, path, pinned = _locate(name)
    if kind == "file":
        return False
    splits, split = _splits(name, kind, path, pinned)
    return not split and not splits.keys().isdisjoint(split_candidates)


def _split(name: str, candidates: Sequence[str]) -> Split:
    kind, path, pinned = _locate(name)
    if kind == "file":
        return Split(path, [path])
    splits, pinned = _splits(name, kind, path, pinned)
    wanted = (pinned,) if pinned else tuple(candidates)
    for split in wanted:
        if split in splits:
            return splits[split]
    raise DataError(
        f"{name}: has the splits {', '.join(splits) or '(none)'}, but not {' or '.join(wanted)};"
        " name one of them as NAME:SPLIT"
    )


def _locate(name: str) -> tuple[str, str, str]:
    """("file" | "folder" | "hub", path or hub id, what follows it behind colons or "")."""
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
        return "file", path, ""
    if path.lower().endswith(FILES) or path.startswith(("/", ".", "~")):
        raise DataError(f"{name}: no such file or folder (looked in {os.getcwd()})")
    if not HUB_ID.fullmatch(path):
        raise DataError(f"{name!r}: neither a file, nor a folder, nor a hub id (owner/name)")
    return "hub", path, pinned


def _splits(name: str, kind: str, path: str, pinned: str) -> tuple[dict[str, Split], str]:
    """(the splits of a folder or hub data set by name, the pinned split or ""). pinned: SPLIT,
    CONFIG, CONFIG:SPLIT or "". Raises DataError where one of several configurations must be named.
    """
    with refusals_named(name):
        import datasets

        marks = ("dataset_dict.json", "state.json")
        if kind == "folder" and any(os.path.exists(os.path.join(path, mark)) for mark in marks):
            saved = datasets.load_from_disk(path)
            if not isinstance(saved, dict):
                saved = {str(saved.split or "train"): saved}
            splits = {key: Split(f"{path}[{key}]", load=lambda t=t: t) for key, t in saved.items()}
            return splits, pinned
        config, split = _configuration(name, path, pinned)
        if kind == "folder":
            files = datasets.load_dataset_builder(path, config).config.data_files or {}
            paths = {str(key): [str(file) for file in part] for key, part in files.items()}
            every = [file for part in paths.values() for file in part]
            _refuse_unread(name, path, every)
            # Text files are read here rather than by datasets, which cannot name a bad line.
            if every and all(file.lower().endswith(TEXT_FILES) for file in every):
                return {key: Split(f"{path}[{key}]", part) for key, part in paths.items()}, split
        names = map(str, datasets.get_dataset_split_names(path, config))
        return {
            key: Split(
                f"{path}[{key}]", load=partial(datasets.load_dataset, path, config, split=key)
            )
            for key in names
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


def _refuse_unread(name: str, folder: str, read: list[str]) -> None:
    """Raises DataError for data files of a folder that are in none of its splits.

    Of files of several kinds `datasets` reads one kind, and of train.jsonl beside more.jsonl only
    the first. A README that lists the files of the set (data_files) has the last word.
    """
    from datasets.data_files import FILES_TO_IGNORE

    readme, known = Path(folder, "README.md"), set(map(os.path.realpath, read))
    if readme.exists() and "data_files:" in readme.read_text("utf-8", errors="replace"):
        return
    left = sorted(
        str(path)
        for path in Path(folder).rglob("*")
        if path.name.lower().endswith(FILES)
        and path.name not in FILES_TO_IGNORE
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and not path.is_dir()
        and os.path.realpath(path) not in known
    )
    if left:
        raise DataError(
            f"{name}: {', '.join(left[:5])}{' …' if len(left) > 5 else ''} ({len(left)} in all) "
            "would be read into none of its splits; name the files that are meant, or take these "
            "out of the folder"
        )
