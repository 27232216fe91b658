"""A user's own skeleton, from a short YAML file.

```yaml
keypoint_names: hips chest head left_hand right_hand   # or a list
edges: [hips chest head, chest left_hand, chest right_hand]   # chains outward from the root, by name or by index
parts: {body: hips chest head, left_hand: left_hand, right_hand: right_hand}   # optional
flip_pairs: [left_hand right_hand]   # optional, left first
scale_pair: hips chest   # optional
```

`configuration/skeletons/` has a whole one. `--model.skeleton FILE` trains on it, `--layout FILE` prepares and draws.
"""

import reprlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from .skeleton_pose_tokenizer import Skeleton, build_skeleton, get_skeleton
from .yaml_files import load_yaml

SKELETON_KEYS = ("keypoint_names", "edges", "parts", "flip_pairs", "scale_pair")
_REQUIRED = ("keypoint_names", "edges")


def is_skeleton_file(text: str | None) -> bool:
    """Whether this names a YAML file and not a layout."""
    return str(text).lower().endswith((".yaml", ".yml"))


def load_skeleton(name_or_path: str) -> Skeleton:
    """The layout of this name, or the one in this YAML file.

    Raises:
        ValueError: No layout has this name, or the file is no skeleton; the message names the file and the key.
    """
    if not is_skeleton_file(name_or_path):
        return get_skeleton(name_or_path)
    return build_skeleton(**read_skeleton(name_or_path))


def read_skeleton(path: str | Path) -> dict[str, Any]:
    """Reads a skeleton file.

    Args:
        path: A YAML file of the keys `SKELETON_KEYS`. Keypoints stand by name or by index; several names may stand in
            one text, separated by spaces.

    Returns:
        The keys of [`PoseTokenizerConfig`] that describe the skeleton, with indices for names: plain lists and
        mappings, checked by `build_skeleton`.

    Raises:
        ValueError: An unknown, doubled, missing or contradictory key; the message is one sentence with the path.
    """
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {reprlib.repr(content)}; expected the keys {', '.join(SKELETON_KEYS)}.")
    for key in content:
        if key not in SKELETON_KEYS:
            near = get_close_matches(str(key), SKELETON_KEYS, n=1, cutoff=0.5)
            advice = f"the nearest valid one is {near[0]}" if near else f"expected {', '.join(SKELETON_KEYS)}"
            raise ValueError(f"{path}: unknown key {reprlib.repr(key)}; {advice}.")
    lacking = [key for key in _REQUIRED if content.get(key) is None]
    if lacking:
        raise ValueError(f"{path}: lacks {lacking[0]}; expected {' and '.join(_REQUIRED)}.")
    try:
        fields = _resolve(content)
        build_skeleton(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return fields


def _resolve(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with indices for names."""
    names = [str(name) for name in _words("keypoint_names", content["keypoint_names"])]
    index = {name: number for number, name in enumerate(names)}

    def keypoints(key: str, value: Any) -> list[int]:
        for word in (words := _words(key, value)):
            if isinstance(word, str) and word not in index:
                near = get_close_matches(word, names, n=1, cutoff=0.5)
                hint = f", the nearest of keypoint_names is {near[0]!r}" if near else ""
                raise ValueError(f"{key} holds {word!r}, expected a name of keypoint_names{hint}.")
        return [index[word] if isinstance(word, str) else word for word in words]

    def chains(key: str) -> list[list[int]]:
        value = content.get(key)
        if not isinstance(value, list | None):
            raise ValueError(f"{key} is {reprlib.repr(value)}, expected a list.")
        return [keypoints(key, entry) for entry in value or ()]

    edges = [list(bone) for chain in chains("edges") for bone in pairwise(chain)]
    parts = content.get("parts")
    if not isinstance(parts, dict | None):
        raise ValueError(f"parts is {reprlib.repr(parts)}, expected a mapping from token groups to part nodes.")
    pair = content.get("scale_pair")
    return {
        "keypoint_names": names,
        "edges": edges,
        "parts": None if parts is None else {str(group): _part(group, own, keypoints) for group, own in parts.items()},
        "flip_pairs": chains("flip_pairs"),
        "scale_pair": None if pair is None else keypoints("scale_pair", pair),
    }


def _part(group: str, content: Any, keypoints: Any) -> Any:
    """A token group: its keypoints, or a mapping from part nodes to theirs."""
    key = f"parts[{str(group)!r}]"
    if isinstance(content, dict):
        return {str(node): keypoints(f"{key}[{str(node)!r}]", own) for node, own in content.items()}
    return keypoints(key, content)


def _words(key: str, value: Any) -> Sequence[str | int]:
    """`"a b"`, `[a, b]` or `[0, 1]` as a list of names and indices."""
    words = value.split() if isinstance(value, str) else [value] if isinstance(value, int) else value
    if not isinstance(words, list) or not all(isinstance(word, str | int) for word in words):
        raise ValueError(f"{key} is {reprlib.repr(value)}, expected keypoints, by name or by index.")
    return words


__all__ = ["SKELETON_KEYS", "is_skeleton_file", "load_skeleton", "read_skeleton"]
