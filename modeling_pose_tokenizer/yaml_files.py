"""YAML as people write it: plain values only, a key once, and one sentence for what cannot be read."""

from pathlib import Path
from typing import Any

import yaml

# A preset or a skeleton takes some kilobytes.
MAX_BYTES = 2**20


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if doubled is not None:
            raise yaml.YAMLError(f"the key {doubled} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> Any:
    """The content of a YAML file, None where it is empty. No tag makes anything but plain values.

    Raises:
        ValueError: It cannot be read, is too large, or is not valid; the message is one sentence with the path.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path}: has {size} bytes; expected a file of at most {MAX_BYTES}.")
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise ValueError(f"{path}: is not valid YAML: it is nested too deeply.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
