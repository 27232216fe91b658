"""Skeletons as data: names, edges, parts and mirror pairs of keypoint layouts, and the graphs that follow."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import cycle
from typing import Any

import numpy as np
import torch

from .layouts_pose_tokenizer import LAYOUTS

# Token groups always come in this order; groups of other names follow.
GROUP_ORDER = ("body", "face", "left_hand", "right_hand")
# Drawing colours of the token groups, Okabe and Ito's (https://jfly.uni-koeln.de/color), which colour-blind readers
# tell apart; groups of other names take those that are left, in their order.
GROUP_COLORS = {"body": "#555555", "face": "#E69F00", "left_hand": "#009E73", "right_hand": "#CC79A7"}
OTHER_COLORS = ("#0072B2", "#D55E00", "#56B4E9", "#000000")
# A skeleton of at most so many keypoints keeps one part node per keypoint: pooling would save nothing.
MAX_UNPOOLED_KEYPOINTS = 25
# Most keypoints in a part node found by clustering. They average 8 then, and 133 keypoints give 17 nodes.
MAX_CLUSTER_SIZE = 11


@dataclass(frozen=True)
class Skeleton:
    """A keypoint layout: N keypoints, P part nodes, G token groups. Make one with `build_skeleton`, which checks it.

    Attributes:
        name: Name of the layout, or None for a custom one.
        keypoint_names: The N unique names.
        edges: (parent, child) keypoints, outward from the root.
        parts: Token group -> part node -> keypoints. Every keypoint is in exactly one part node. Groups and nodes are
            in a canonical order that does not depend on the order of the mapping they were built from.
        flip_pairs: (left, right) keypoints that change places in a mirror image.
        scale_pair: Left and right keypoint whose distance is the unit of length (the shoulders), or None.
    """

    name: str | None
    keypoint_names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    parts: Mapping[str, Mapping[str, tuple[int, ...]]]
    flip_pairs: tuple[tuple[int, int], ...]
    scale_pair: tuple[int, int] | None

    @property
    def num_keypoints(self) -> int:
        """N."""
        return len(self.keypoint_names)

    @property
    def groups(self) -> tuple[str, ...]:
        """The G token group names: body, face, left_hand, right_hand, then others."""
        return tuple(self.parts)

    @cached_property
    def part_nodes(self) -> tuple[str, ...]:
        """The P part nodes as `group/node`, group by group."""
        return tuple(f"{group}/{node}" for group, nodes in self.parts.items() for node in nodes)

    @property
    def num_parts(self) -> int:
        """P."""
        return len(self.part_nodes)

    @cached_property
    def part_keypoints(self) -> tuple[tuple[int, ...], ...]:
        """Keypoints of each of the P part nodes, in the order of `part_nodes`."""
        return tuple(keypoints for nodes in self.parts.values() for keypoints in nodes.values())

    @cached_property
    def part_groups(self) -> tuple[int, ...]:
        """Index into `groups` for each of the P part nodes."""
        return tuple(index for index, nodes in enumerate(self.parts.values()) for _ in nodes)

    @cached_property
    def group_keypoints(self) -> dict[str, tuple[int, ...]]:
        """Keypoints of each token group, in ascending order."""
        return {
            group: tuple(sorted(k for node in nodes.values() for k in node)) for group, nodes in self.parts.items()
        }

    @cached_property
    def colors(self) -> dict[str, str]:
        """Drawing colour of each token group, `#rrggbb`."""
        others = cycle(OTHER_COLORS)
        return {group: GROUP_COLORS.get(group) or next(others) for group in self.groups}

    @cached_property
    def part_of_keypoint(self) -> tuple[int, ...]:
        """Index of the part node of each of the N keypoints."""
        part_of = {keypoint: part for part, keypoints in enumerate(self.part_keypoints) for keypoint in keypoints}
        return tuple(part_of[keypoint] for keypoint in range(self.num_keypoints))

    @cached_property
    def part_edges(self) -> tuple[tuple[int, int], ...]:
        """(parent, child) part nodes: where an edge of the skeleton crosses from one part node to another.

        Where the skeleton falls into several components, each further one is joined to the first, since token groups
        that no path connects could not inform each other.
        """
        edges: dict[tuple[int, int], None] = {}
        for parent, child in self.edges:
            edge = (self.part_of_keypoint[parent], self.part_of_keypoint[child])
            if edge[0] != edge[1] and edge[::-1] not in edges:
                edges.setdefault(edge)
        roots = [order[0] for order in _spanning_forest(range(self.num_parts), edges)[0]]
        return (*edges, *((roots[0], root) for root in roots[1:]))

    @cached_property
    def flip_permutation(self) -> tuple[int, ...]:
        """The keypoint that takes the place of each of the N keypoints in a mirror image: `poses[:, permutation]`."""
        permutation = list(range(self.num_keypoints))
        for left, right in self.flip_pairs:
            permutation[left], permutation[right] = right, left
        return tuple(permutation)

    @cached_property
    def flip_part_groups(self) -> dict[str, str]:
        """For each token group, the group where (most of) its keypoints come to lie in a mirror image."""
        group_of = {keypoint: group for group, keypoints in self.group_keypoints.items() for keypoint in keypoints}
        return {
            group: Counter(group_of[self.flip_permutation[keypoint]] for keypoint in keypoints).most_common(1)[0][0]
            for group, keypoints in self.group_keypoints.items()
        }


def build_skeleton(
    keypoint_names: Sequence[str],
    edges: Iterable[Sequence[int]],
    parts: Mapping[str, Any] | None = None,
    flip_pairs: Iterable[Sequence[int]] = (),
    scale_pair: Sequence[int] | None = None,
    name: str | None = None,
) -> Skeleton:
    """Checks a layout and completes its parts.

    Args:
        keypoint_names: The N unique names.
        edges: (parent, child) keypoints, outward from the root.
        parts: `{group: {node: [keypoint, ...]}}`, or `{group: [keypoint, ...]}` whose nodes are then found by
            clustering the graph, or None for one group `body`. A skeleton of at most 25 keypoints gets one node per
            keypoint instead of clusters.
        flip_pairs: (left, right) keypoints that change places in a mirror image.
        scale_pair: Left and right keypoint whose distance is the unit of length, e.g. the shoulders.
        name: Name of the layout.

    Returns:
        The skeleton, with groups and part nodes in canonical order: groups as in `GROUP_ORDER`, everything else by
        its lowest keypoint. (A configuration file sorts the keys of a mapping, so their order must not matter.)

    Raises:
        ValueError: A key contradicts itself or another; the message names it.
    """
    names = tuple(str(keypoint) for keypoint in keypoint_names)
    if not names:
        raise ValueError("keypoint_names is empty: a skeleton needs at least one keypoint.")
    twice = [keypoint for keypoint, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"keypoint_names holds {twice[0]!r} more than once: give each keypoint a name of its own.")
    checked_edges = tuple(dict.fromkeys(_check_pair("edges", edge, len(names)) for edge in edges))
    checked_flips = tuple(_check_pair("flip_pairs", pair, len(names)) for pair in flip_pairs)
    for keypoint, count in Counter(keypoint for pair in checked_flips for keypoint in pair).items():
        if count > 1:
            raise ValueError(
                f"flip_pairs holds keypoint {keypoint} ({names[keypoint]}) in {count} pairs, expected one."
            )
    return Skeleton(
        name=name,
        keypoint_names=names,
        edges=checked_edges,
        parts=_complete_parts(names, checked_edges, parts),
        flip_pairs=checked_flips,
        scale_pair=None if scale_pair is None else _check_pair("scale_pair", scale_pair, len(names)),
    )


def _check_pair(key: str, pair: Sequence[int], num_keypoints: int) -> tuple[int, int]:
    """Two different keypoints in range, as ints."""
    if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise ValueError(f"{key} holds {pair!r}, expected two keypoint indices.")
    first, second = (_check_keypoint(key, keypoint, num_keypoints) for keypoint in pair)
    if first == second:
        raise ValueError(f"{key} joins keypoint {first} to itself, expected two different keypoints.")
    return first, second


def _check_keypoint(key: str, keypoint: Any, num_keypoints: int) -> int:
    """A keypoint index in range, as int."""
    if isinstance(keypoint, bool) or not isinstance(keypoint, int | np.integer) or not 0 <= keypoint < num_keypoints:
        raise ValueError(f"{key} holds {keypoint!r}, expected a keypoint index from 0 to {num_keypoints - 1}.")
    return int(keypoint)


def _complete_parts(
    names: Sequence[str], edges: Sequence[tuple[int, int]], parts: Mapping[str, Any] | None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Brings every form of `parts` into `{group: {node: keypoints}}`, checked and in canonical order."""
    if parts is None:
        parts = {"body": range(len(names))}
    elif not isinstance(parts, Mapping):
        raise ValueError(f"parts is {parts!r}, expected a mapping from token groups to part nodes.")
    places: list[tuple[str, str | None, Any]] = []
    for group, content in parts.items():
        nodes = content.items() if isinstance(content, Mapping) and content else [(None, content)]
        places += [(group, node, keypoints) for node, keypoints in nodes]
    _check_partition(names, places)
    size = 1 if len(names) <= MAX_UNPOOLED_KEYPOINTS else MAX_CLUSTER_SIZE
    complete: dict[str, dict[str, tuple[int, ...]]] = {group: {} for group in parts}
    for group, node, keypoints in places:
        members = [int(keypoint) for keypoint in keypoints]
        clusters = cluster_graph(members, edges, size) if node is None else [tuple(members)]
        complete[group] |= {node or names[cluster[0]]: tuple(sorted(cluster)) for cluster in clusters}
    rank = {group: index for index, group in enumerate(GROUP_ORDER)}
    groups = sorted(complete, key=lambda group: (rank.get(group, len(rank)), min(complete[group].values())))
    return {group: dict(sorted(complete[group].items(), key=lambda item: item[1])) for group in groups}


def _check_partition(names: Sequence[str], places: Iterable[tuple[str, str | None, Any]]) -> None:
    """Every keypoint is in exactly one place, and no place is empty."""
    owner: dict[int, str] = {}
    for group, node, keypoints in places:
        place = f"parts[{group!r}]" if node is None else f"parts[{group!r}][{node!r}]"
        if isinstance(keypoints, str | Mapping) or not hasattr(keypoints, "__len__") or not len(keypoints):
            raise ValueError(f"{place} is {keypoints!r}, expected a list of keypoint indices that is not empty.")
        for keypoint in keypoints:
            label = names[_check_keypoint(place, keypoint, len(names))]
            if keypoint in owner:
                raise ValueError(f"{place} holds keypoint {keypoint} ({label}), which {owner[keypoint]} holds too.")
            owner[keypoint] = place
    missing = [keypoint for keypoint in range(len(names)) if keypoint not in owner]
    if missing:
        raise ValueError(
            f"parts leaves out {len(missing)} of {len(names)} keypoints, the first is {missing[0]} "
            f"({names[missing[0]]}): put every keypoint into one part."
        )


def cluster_graph(
    keypoints: Sequence[int], edges: Iterable[tuple[int, int]], size: int = MAX_CLUSTER_SIZE
) -> list[tuple[int, ...]]:
    """Splits keypoints into clusters of at most `size` by cutting subtrees off a spanning tree.

    From the leaves upward every keypoint takes in the open clusters of its children, smallest first, while there is
    room; the others are closed. Those smaller than half of `size` are put together with their siblings first: a star,
    or keypoints without edges, would fall into single points otherwise. So a cluster is connected, at the least
    through the one keypoint above it.

    Args:
        keypoints: The keypoints to split; edges to others are ignored.
        edges: (parent, child) keypoints.
        size: Largest number of keypoints in a cluster.

    Returns:
        The clusters. Each lists the keypoint nearest to the root first.
    """
    orders, children = _spanning_forest(keypoints, edges)
    open_cluster: dict[int | None, list[int]] = {}
    closed: list[list[int]] = []
    # None stands for a root above all components, so that stray keypoints are gathered like siblings.
    above: list[tuple[int | None, list[int]]] = [(None, [order[0] for order in orders])]
    above += [(keypoint, children[keypoint]) for order in orders for keypoint in order]
    for keypoint, below in reversed(above):
        own = [] if keypoint is None else [keypoint]
        bundle: list[int] = []
        for branch in sorted((open_cluster.pop(child) for child in below), key=len):
            if keypoint is not None and len(own) + len(branch) <= size:
                own += branch
            elif 2 * len(branch) >= size:
                closed.append(branch)
            elif len(bundle) + len(branch) <= size:
                bundle += branch
            else:
                closed.append(bundle)
                bundle = branch
        closed += [bundle] if bundle else []
        open_cluster[keypoint] = own
    return sorted(map(tuple, closed), key=min)


def _spanning_forest(
    nodes: Iterable[int], edges: Iterable[tuple[int, int]]
) -> tuple[list[list[int]], dict[int, list[int]]]:
    """Breadth-first spanning tree of each component, started where no edge points to.

    Returns:
        The nodes of each component in breadth-first order, and the children of each node in its tree.
    """
    inside = dict.fromkeys(nodes)
    neighbours: dict[int, list[int]] = {node: [] for node in inside}
    has_parent = set()
    for parent, child in edges:
        if parent in inside and child in inside:
            neighbours[parent].append(child)
            neighbours[child].append(parent)
            has_parent.add(child)
    orders: list[list[int]] = []
    children: dict[int, list[int]] = {node: [] for node in inside}
    seen: set[int] = set()
    for start in sorted(inside, key=lambda node: (node in has_parent, node)):
        if start in seen:
            continue
        seen.add(start)
        order, queue = [], deque([start])
        while queue:
            node = queue.popleft()
            order.append(node)
            children[node] = [other for other in dict.fromkeys(neighbours[node]) if other not in seen]
            seen.update(children[node])
            queue.extend(children[node])
        orders.append(order)
    return orders, children


def spatial_adjacency(num_nodes: int, edges: Iterable[Sequence[int]]) -> torch.Tensor:
    """Adjacency in the spatial partition of ST-GCN (arXiv 1801.07455): a node itself, its parents, its children.

    Args:
        num_nodes: V.
        edges: (parent, child) nodes, outward from the root.

    Returns:
        (3, V, V) float32 on the CPU. Partition 0 is self, 1 inward (row: child, column: parent), 2 outward (row:
        parent, column: child). Row v holds the weights with which node v takes in the others, `adjacency @ features`
        with features (V, C); every row sums to 1, or to 0 where a node has no such neighbour.
    """
    adjacency = np.zeros((3, num_nodes, num_nodes), dtype=np.float32)
    adjacency[0] = np.eye(num_nodes)
    for edge in edges:
        parent, child = _check_pair("edges", edge, num_nodes)
        adjacency[1, child, parent] = adjacency[2, parent, child] = 1.0
    adjacency /= np.maximum(adjacency.sum(axis=-1, keepdims=True), 1.0)
    # from_numpy and not torch.tensor: models are built under a meta device, where the latter would hold no values.
    return torch.from_numpy(adjacency)


SKELETONS: dict[str, Skeleton] = {name: build_skeleton(name=name, **layout) for name, layout in LAYOUTS.items()}


def get_skeleton(name: str) -> Skeleton:
    """Looks up a named layout.

    Raises:
        ValueError: No layout has this name; the message gives the nearest one.
    """
    if name not in SKELETONS:
        near = get_close_matches(str(name), SKELETONS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"skeleton is {name!r}, expected one of {', '.join(SKELETONS)}.{hint}")
    return SKELETONS[name]


def suggest_layout(num_keypoints: int) -> str | None:
    """Name of the named layout that has so many keypoints, or None where no one has."""
    return next((name for name, layout in SKELETONS.items() if layout.num_keypoints == num_keypoints), None)


def likely_layout(num_keypoints: int) -> str:
    """What a refusal of so many keypoints adds, e.g. ` (543 keypoints: this looks like mediapipe_holistic_543)`."""
    name = suggest_layout(num_keypoints)
    return f" ({num_keypoints} keypoints: this looks like {name})" if name else ""


__all__ = [
    "SKELETONS",
    "Skeleton",
    "build_skeleton",
    "get_skeleton",
    "likely_layout",
    "spatial_adjacency",
    "suggest_layout",
]
