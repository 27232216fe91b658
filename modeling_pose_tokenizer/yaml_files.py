"""YAML as people write it: plain values only, a key once, and one sentence for what cannot be read."""

import re
from collections.abc import Hashable
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

# A preset or a skeleton takes some kilobytes, one of 543 keypoints 25; these are read at once.
MAX_BYTES = 2**15
# Brackets in brackets, or lists that begin on one line: parsers come to the end of their stack.
MAX_DEPTH = 100
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built


class UniqueKeyLoader(_Loader):
    """Refuses a key that stands twice in one mapping: YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen = set()
        for key in keys:
            if isinstance(key, Hashable) and key in seen:
                raise yaml.YAMLError(f"the key {key} stands twice{node.start_mark}")
            seen.add(key if isinstance(key, Hashable) else None)  # what cannot be a key is refused below
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def load_yaml(path: str | Path) -> Any:
    """The content of a YAML file, None where it is empty. No tag makes anything but plain values.

    Raises:
        ValueError: It cannot be read, is too large, or is not valid; the message is one sentence with the path.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path}: has {size} bytes; expected a file of at most {MAX_BYTES}.")
        text = Path(path).read_text(encoding="utf-8")
        depth = accumulate((1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text)), initial=0)
        if max(depth) > MAX_DEPTH or re.search(rf"(?:[-?:][ \t]+){{{MAX_DEPTH}}}", text):
            raise RecursionError
        return yaml.load(text, Loader=UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise ValueError(f"{path}: is not valid YAML: it is nested too deeply.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
