"""Which files are read, and which split each sequence goes to."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .formats import FORMATS, PoseDataError, PoseFileError, find_format, walk_folders

SPLITS = ("train", "val", "test")
# Names that folders of splits go by.
_SPLIT_FOLDERS = {**{name: name for name in SPLITS}, "training": "train", "dev": "val", "validation": "val"}


class SplitRule:
    """Gives each sequence its split.

    Args:
        by: `folder`: the folder named train, val or test that the file is in. `prefix`: what the sequence's id begins
            with. `hash`: a share, by the hash of the id, so that a sequence stays where it is when others are added.
            Or the path of a JSON file, a mapping from splits to lists of ids.
        splits: For `prefix`, split -> prefixes, joined by commas; for `hash`, split -> share. The rest is `train`.

    Raises:
        PoseDataError: The rule makes no sense.
    """

    def __init__(self, by: str, splits: Mapping[str, str]) -> None:
        self.by = by
        self.shares: dict[str, float] = {}
        self.names: dict[str, str] = {}  # id or prefix -> split
        if splits and by not in ("prefix", "hash"):
            raise PoseDataError(f"split.{next(iter(splits))} goes with a split by prefix or hash, but it is by {by}.")
        if by == "prefix":
            self.names = {prefix: split for split, text in splits.items() for prefix in text.split(",") if prefix}
        elif by == "hash":
            self.shares = _read_shares(splits)
        elif by != "folder":
            self.names = _read_split_file(by)

    def __call__(self, id: str, folder: str | None) -> str:
        """The split of a sequence, given its id and the split whose folder its file is in.

        Raises:
            PoseDataError: The rule gives it none.
        """
        if self.by == "folder":
            if folder is None:
                raise PoseDataError(
                    f"{id} is in no folder named {', '.join(SPLITS)}: split by prefix, hash or a file."
                )
            return folder
        if self.by == "hash":
            place = int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
            for split, share in self.shares.items():
                if place < share:
                    return split
                place -= share
        if self.by == "prefix":
            return next((split for prefix, split in self.names.items() if id.startswith(prefix)), "train")
        return self.names.get(id, "train")

    def unused(self, ids: Iterable[str]) -> list[str]:
        """Prefixes or ids of the rule that fit no sequence: most likely misspelt, and test data gone to training."""
        left = set(self.names)
        for id in ids:
            left -= {prefix for prefix in left if id.startswith(prefix)} if self.by == "prefix" else {id}
        return sorted(left)


def _read_shares(splits: Mapping[str, str]) -> dict[str, float]:
    try:
        shares = {split: float(text) for split, text in splits.items()}
    except ValueError:
        raise PoseDataError(f"A split by hash takes shares such as 0.1, not {', '.join(splits.values())}.") from None
    if not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) > 1:
        raise PoseDataError(f"A split by hash takes shares above 0 that sum to 1 at most, not {shares}.")
    return shares


def _read_split_file(path: str) -> dict[str, str]:
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all(isinstance(ids, list) for ids in table.values()) or not set(table) <= set(SPLITS):
            raise ValueError(path)
        return {str(id): split for split in SPLITS for id in table.get(split, ())}
    except OSError as error:
        raise PoseDataError(
            f"{path} is not folder, prefix, hash or a JSON file to split by ({error.strerror})."
        ) from None
    except (ValueError, AttributeError, RecursionError):
        raise PoseDataError(f"{path} is not a JSON file that maps {', '.join(SPLITS)} to lists of ids.") from None


@dataclass(frozen=True)
class Source:
    """A file, the id of its sequence, and the split whose folder it is in."""

    path: Path
    id: str
    split: str | None


def find_input(text: str) -> Path:
    """A file or folder, given as a path or, inside an installed Python package, as `package:path`.

    Raises:
        PoseDataError: There is none.
    """
    if os.path.exists(text):  # unlike `Path.exists`, of a name that is too long as well
        return Path(text)
    package, colon, inner = text.partition(":")
    if not colon or not package.isidentifier():
        raise PoseDataError(f"There is no file or folder {text}.")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PoseDataError(f"The Python package {package} of the input {text} is not installed.")
    path = Path(next(iter(spec.submodule_search_locations)), inner)
    if not os.path.exists(path):
        raise PoseDataError(f"The Python package {package} has no file or folder {inner}.")
    return path


def _find_files(top: Path) -> Iterator[tuple[Path, bool]]:
    """The files below a folder, sorted, and folders that are one sequence; whether each is a pose file."""
    own = {suffix for kind in FORMATS.values() for suffix in kind.suffixes}
    companions = {suffix for kind in FORMATS.values() for suffix in kind.companions}
    for folder, folders, names in walk_folders(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if find_format(folder):
            folders.clear()
            yield Path(folder), True
            continue
        for path in (Path(folder, name) for name in sorted(names)):
            suffix = path.suffix.lower()
            if path.name.startswith(".") or path.name == "rejected.jsonl" or suffix in companions:
                continue
            try:
                yield path, suffix in own or find_format(path) is not None
            except PoseFileError:
                yield path, False


def find_sources(text: str, by_folder: bool) -> tuple[list[Source], list[dict[str, str]]]:
    """The pose files of an input, sorted, and the files that are of no known kind.

    The id is the path below the input, or below the folder of the split.
    """
    top = find_input(text).absolute()
    found = [(top, True)] if top.is_file() or find_format(top) else sorted(_find_files(top))
    reason = f"is of no known kind, expected {', '.join(FORMATS)}"
    unknown = [{"path": os.fspath(path), "reason": reason} for path, known in found if not known]
    files = [path for path, known in found if known]
    if not files:
        raise PoseDataError(f"There are no pose files in {text}, expected {', '.join(FORMATS)}.")
    above = top.parent.parent if files == [top] else top.parent
    sources = []
    for path in files:
        first, *names = path.relative_to(above).with_suffix("").parts
        split = None
        if by_folder:
            folders = [first, *names[:-1]]
            at = max((index for index, folder in enumerate(folders) if folder in _SPLIT_FOLDERS), default=0)
            split = _SPLIT_FOLDERS.get(folders[at])
            names = names[at:]
        sources.append(Source(path, "_".join(names), split))
    return sources, unknown
