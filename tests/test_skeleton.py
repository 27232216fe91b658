"""Skeletons: the named layouts keep their published order, custom ones are completed or refused, graphs are right."""

import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pose_tokenizer.skeleton_pose_tokenizer import (
    MAX_CLUSTER_SIZE,
    MAX_UNPOOLED_KEYPOINTS,
    SKELETONS,
    Skeleton,
    build_skeleton,
    cluster_graph,
    get_skeleton,
    spatial_adjacency,
)

COUNTS = {
    "coco_wholebody_133": 133,
    "mediapipe_holistic_543": 543,
    "mediapipe_holistic_178": 178,
    "openpose_137": 137,
    "phoenix_50": 50,
    "coco_17": 17,
    "unisign_69": 69,
}
every_layout = pytest.mark.parametrize("skeleton", SKELETONS.values(), ids=SKELETONS.keys())
quick = settings(max_examples=60, deadline=None)


def components(nodes, edges):
    """Oracle: merges sets until no edge joins two of them."""
    sets = [{node} for node in nodes]
    for first, second in edges:
        joined = [group for group in sets if first in group or second in group]
        sets = [group for group in sets if group not in joined] + [set().union(*joined)]
    return sets


def swap_side(name):
    return "_".join({"left": "right", "right": "left"}.get(word, word) for word in name.split("_"))


@st.composite
def trees(draw, max_size=120):
    """(N, edges) of a random tree; recent parents make long chains, node 0 as the only parent makes a star."""
    size = draw(st.integers(1, max_size))
    reach = draw(st.sampled_from([1, 2, 5, size]))
    star = draw(st.booleans())
    numbers = draw(st.randoms(use_true_random=False))
    labels = list(range(size))
    numbers.shuffle(labels)
    parents = [0 if star else numbers.randrange(max(0, node - reach), node) for node in range(1, size)]
    return size, [(labels[parent], labels[node]) for node, parent in enumerate(parents, start=1)]


def names_of(size):
    return [f"point_{index}" for index in range(size)]


# --- named layouts


def test_every_layout_is_there_with_its_number_of_keypoints():
    assert {name: skeleton.num_keypoints for name, skeleton in SKELETONS.items()} == COUNTS
    assert all(get_skeleton(name) is skeleton and skeleton.name == name for name, skeleton in SKELETONS.items())


@every_layout
def test_every_keypoint_is_in_exactly_one_part(skeleton):
    members = [keypoint for keypoints in skeleton.part_keypoints for keypoint in keypoints]
    assert sorted(members) == list(range(skeleton.num_keypoints))
    assert len(skeleton.part_nodes) == len(set(skeleton.part_nodes)) == skeleton.num_parts
    for keypoint, part in enumerate(skeleton.part_of_keypoint):
        group, node = skeleton.part_nodes[part].split("/")
        assert keypoint in skeleton.parts[group][node]
        assert keypoint in skeleton.group_keypoints[group]
        assert skeleton.groups[skeleton.part_groups[part]] == group


@every_layout
def test_both_graphs_are_connected_and_start_at_one_root(skeleton):
    assert len(components(range(skeleton.num_keypoints), skeleton.edges)) == 1
    assert len(components(range(skeleton.num_parts), skeleton.part_edges)) == 1
    assert len(set(range(skeleton.num_keypoints)) - {child for _, child in skeleton.edges}) == 1
    assert len({frozenset(edge) for edge in skeleton.edges}) == len(skeleton.edges)


@every_layout
def test_every_token_group_has_a_drawing_colour_of_its_own(skeleton):
    assert tuple(skeleton.colors) == skeleton.groups
    assert len(set(skeleton.colors.values())) == len(skeleton.groups)
    assert all(re.fullmatch("#[0-9A-F]{6}", color) for color in skeleton.colors.values())


@every_layout
def test_mirror_image_is_an_involution_that_keeps_edges_parts_and_names(skeleton):
    flip = skeleton.flip_permutation
    assert [flip[other] for other in flip] == list(range(skeleton.num_keypoints))
    assert {(flip[parent], flip[child]) for parent, child in skeleton.edges} == set(skeleton.edges)
    mirrored_parts = {tuple(sorted(flip[k] for k in keypoints)) for keypoints in skeleton.part_keypoints}
    assert mirrored_parts == set(skeleton.part_keypoints)
    for keypoint, name in enumerate(skeleton.keypoint_names):
        if not name.startswith("face_"):
            assert skeleton.keypoint_names[flip[keypoint]] == swap_side(name)
    assert all("right" not in skeleton.keypoint_names[left] for left, _ in skeleton.flip_pairs)
    assert flip[skeleton.scale_pair[0]] == skeleton.scale_pair[1]
    assert [skeleton.keypoint_names[keypoint] for keypoint in skeleton.scale_pair] == [
        "left_shoulder",
        "right_shoulder",
    ]


@every_layout
def test_mirror_image_takes_the_left_hand_to_the_right_joint_by_joint(skeleton):
    if skeleton.name == "coco_17":
        assert skeleton.groups == ("body",)
        return
    left, right = skeleton.group_keypoints["left_hand"], skeleton.group_keypoints["right_hand"]
    assert len(left) == 21
    assert [skeleton.flip_permutation[keypoint] for keypoint in left] == list(right)
    assert skeleton.flip_part_groups["left_hand"] == "right_hand"
    assert skeleton.flip_part_groups["right_hand"] == "left_hand"
    assert skeleton.flip_part_groups["body"] == "body"
    for node, keypoints in skeleton.parts["left_hand"].items():
        assert tuple(skeleton.flip_permutation[k] for k in keypoints) == skeleton.parts["right_hand"][node]
    # The body's wrist and the hand's own are two keypoints in two groups, joined by an edge.
    for side in ("left", "right"):
        body_wrist, hand_wrist = (skeleton.keypoint_names.index(f"{side}_{k}") for k in ("wrist", "hand_wrist"))
        assert body_wrist in skeleton.group_keypoints["body"]
        assert hand_wrist in skeleton.group_keypoints[f"{side}_hand"]
        assert (body_wrist, hand_wrist) in skeleton.edges


HAND = ["wrist", *(f"{finger}_{j}" for finger in ("thumb", "index", "middle", "ring", "little") for j in range(1, 5))]


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("coco_wholebody_133", 91, 112),
        ("mediapipe_holistic_543", 501, 522),
        ("mediapipe_holistic_178", 136, 157),
        ("openpose_137", 95, 116),
        ("phoenix_50", 8, 29),
        ("unisign_69", 9, 30),
    ],
)
def test_hands_lie_where_the_format_puts_them(name, left, right):
    names = get_skeleton(name).keypoint_names
    assert list(names[left : left + 21]) == [f"left_hand_{joint}" for joint in HAND]
    assert list(names[right : right + 21]) == [f"right_hand_{joint}" for joint in HAND]


def test_order_of_coco_wholebody():
    skeleton = get_skeleton("coco_wholebody_133")
    body = "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist"
    body += " right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
    feet = "left_big_toe left_small_toe left_heel right_big_toe right_small_toe right_heel"
    assert skeleton.keypoint_names[:23] == tuple(f"{body} {feet}".split())
    assert skeleton.group_keypoints["face"] == tuple(range(23, 91))
    assert get_skeleton("coco_17").keypoint_names == skeleton.keypoint_names[:17]
    assert skeleton.scale_pair == (5, 6)
    assert skeleton.num_parts == 17


def test_ibug_face_mirrors_as_its_drawing_does():
    """The 68 points on a schematic, exactly symmetric face: the mirror image must fall onto itself."""

    def mirrored(points, order):
        return [(-points[i][0], points[i][1]) for i in order]

    def ring(count, width, height):
        angles = np.arange(count) * 2 * np.pi / count
        return [(-width * np.cos(angle), height * np.sin(angle) - 0.5) for angle in angles]

    jaw = [(np.cos(angle), np.sin(angle)) for angle in np.linspace(np.pi, 2 * np.pi, 17)]
    right_brow = [(-0.8 + 0.1 * i, 0.5 + 0.03 * i) for i in range(5)]
    right_eye = [(-0.7, 0.3), (-0.6, 0.35), (-0.5, 0.35), (-0.4, 0.3), (-0.5, 0.25), (-0.6, 0.25)]
    points = np.array(
        jaw
        + right_brow
        + mirrored(right_brow, [4, 3, 2, 1, 0])
        + [(0.0, 0.3 - 0.1 * i) for i in range(4)]
        + [(0.1 * i, -0.1) for i in range(-2, 3)]
        + right_eye
        + mirrored(right_eye, [3, 2, 1, 0, 5, 4])
        + ring(12, 0.4, 0.2)
        + ring(8, 0.3, 0.1)
    )
    for name in ("coco_wholebody_133", "openpose_137"):
        skeleton = get_skeleton(name)
        first = skeleton.keypoint_names.index("face_0")
        flip = np.array(skeleton.flip_permutation[first : first + 68]) - first
        np.testing.assert_allclose(points[flip] * [-1, 1], points, atol=1e-12)
    assert skeleton.keypoint_names[skeleton.flip_permutation[first + 68]] == "face_69"  # the pupils


# Points of FACEMESH_CONTOURS in ascending order, as pose-format's `reduce_holistic` keeps them.
CONTOURS = """
0 7 10 13 14 17 21 33 37 39 40 46 52 53 54 55 58 61 63 65 66 67 70 78 80 81 82 84 87 88 91 93 95 103 105 107 109 127
132 133 136 144 145 146 148 149 150 152 153 154 155 157 158 159 160 161 162 163 172 173 176 178 181 185 191 234 246
249 251 263 267 269 270 276 282 283 284 285 288 291 293 295 296 297 300 308 310 311 312 314 317 318 321 323 324 332
334 336 338 356 361 362 365 373 374 375 377 378 379 380 381 382 384 385 386 387 388 389 390 397 398 400 402 405 409
415 454 466
"""
# MediaPipe's own names for both sides of an eye, a brow and the mouth.
MESH_MIRROR = {33: 263, 133: 362, 159: 386, 145: 374, 70: 300, 46: 276, 107: 336, 61: 291, 78: 308, 234: 454, 172: 397}


def test_order_of_mediapipe_holistic():
    full, reduced = get_skeleton("mediapipe_holistic_543"), get_skeleton("mediapipe_holistic_178")
    assert full.group_keypoints["face"] == tuple(range(33, 501))
    assert [full.keypoint_names[i] for i in (0, 7, 9, 11, 16, 23, 32)] == [
        "nose", "left_ear", "mouth_left", "left_shoulder", "right_wrist", "left_hip", "right_foot_index",
    ]  # fmt: skip
    body = "left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hip right_hip"
    assert reduced.keypoint_names[:8] == tuple(body.split())
    assert reduced.keypoint_names[8:136] == tuple(f"face_{point}" for point in CONTOURS.split())
    for right, left in MESH_MIRROR.items():
        for skeleton in (full, reduced):
            right_index, left_index = (skeleton.keypoint_names.index(f"face_{p}") for p in (right, left))
            assert (left_index, right_index) in skeleton.flip_pairs
    # The reduction keeps names, parts and mirror images of the full layout.
    to_full = [full.keypoint_names.index(name) for name in reduced.keypoint_names]
    assert [full.flip_permutation[k] for k in to_full] == [to_full[k] for k in reduced.flip_permutation]
    for keypoint, name in enumerate(reduced.keypoint_names):
        part = full.part_nodes[full.part_of_keypoint[full.keypoint_names.index(name)]]
        assert reduced.part_nodes[reduced.part_of_keypoint[keypoint]] == part


def test_face_mesh_parts_are_connected_and_of_like_size():
    skeleton = get_skeleton("mediapipe_holistic_543")
    for keypoints in skeleton.parts["face"].values():
        inside = [edge for edge in skeleton.edges if set(edge) <= set(keypoints)]
        assert 60 <= len(keypoints) <= 120
        # The two eyes' lids and brows, and both lips, are rings that only the rest of the face joins.
        assert len(components(keypoints, inside)) <= 2


def test_order_of_openpose_and_phoenix():
    openpose, phoenix = get_skeleton("openpose_137"), get_skeleton("phoenix_50")
    assert openpose.keypoint_names[1:9] == (
        "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist", "mid_hip",
    )  # fmt: skip
    assert openpose.keypoint_names[15:25] == (
        "right_eye", "left_eye", "right_ear", "left_ear", "left_big_toe", "left_small_toe", "left_heel",
        "right_big_toe", "right_small_toe", "right_heel",
    )  # fmt: skip
    assert openpose.group_keypoints["face"] == tuple(range(25, 95))
    assert phoenix.keypoint_names[0] == "head"
    assert phoenix.keypoint_names[1:8] == openpose.keypoint_names[1:8]
    assert (7, 8) in phoenix.edges and (4, 29) in phoenix.edges
    assert phoenix.groups == ("body", "left_hand", "right_hand")


def test_order_of_unisign():
    """Body 0 and 3-10, both hands, every second jaw point, inner lips and tip of the nose of COCO-WholeBody."""
    whole, subset = get_skeleton("coco_wholebody_133"), get_skeleton("unisign_69")
    kept = [0, *range(3, 11), *range(91, 112), *range(112, 133), *range(23, 40, 2), *range(83, 91), 53]
    assert subset.keypoint_names == tuple(whole.keypoint_names[keypoint] for keypoint in kept)
    assert [kept[k] for k in subset.flip_permutation] == [whole.flip_permutation[k] for k in kept]
    named = {(subset.keypoint_names[parent], subset.keypoint_names[child]) for parent, child in subset.edges}
    assert {
        ("nose", "left_ear"),
        ("left_wrist", "left_hand_wrist"),
        ("face_8", "face_6"),
        ("nose", "face_30"),
    } <= named


@pytest.mark.parametrize("name", ["coco_wholebody133", "holistic_178", "Phoenix_50"])
def test_unknown_layout_is_answered_with_the_nearest(name):
    nearest = {"coco_wholebody133": "coco_wholebody_133", "holistic_178": "mediapipe_holistic_178"}
    with pytest.raises(ValueError, match=f"Did you mean '{nearest.get(name, 'phoenix_50')}'"):
        get_skeleton(name)


def test_layouts_can_be_pickled_and_compared():
    skeleton = get_skeleton("coco_wholebody_133")
    assert pickle.loads(pickle.dumps(skeleton)) == skeleton


# --- custom skeletons


@quick
@given(trees(), st.sampled_from([1, 2, 3, 8, MAX_CLUSTER_SIZE]))
def test_clusters_partition_the_tree_and_stay_connected(tree, size):
    count, edges = tree
    clusters = cluster_graph(range(count), edges, size)
    assert sorted(keypoint for cluster in clusters for keypoint in cluster) == list(range(count))
    assert all(0 < len(cluster) <= size for cluster in clusters)
    parent_of = {child: parent for parent, child in edges}
    for cluster in clusters:
        # Connected by itself, or through the one keypoint above it.
        around = {*cluster, parent_of.get(cluster[0], cluster[0])}
        assert len(components(around, [edge for edge in edges if set(edge) <= around])) == 1
    assert clusters == cluster_graph(range(count), edges, size)


@quick
@given(trees())
def test_clusters_are_not_crumbs(tree):
    """Two neighbouring crumbs would have been one cluster: on average clusters are at least a quarter full."""
    count, edges = tree
    clusters = cluster_graph(range(count), edges)
    assert len(clusters) <= 1 + 4 * count / MAX_CLUSTER_SIZE


@quick
@given(trees(), st.integers(1, 3))
def test_parts_are_completed_in_every_form(tree, num_groups):
    count, edges = tree
    groups = {f"group_{g}": list(range(g, count, num_groups)) for g in range(min(num_groups, count))}
    for parts in (None, groups):
        skeleton = build_skeleton(names_of(count), edges, parts)
        assert sorted(k for keypoints in skeleton.part_keypoints for k in keypoints) == list(range(count))
        assert len(components(range(skeleton.num_parts), skeleton.part_edges)) == 1
        if count <= MAX_UNPOOLED_KEYPOINTS:
            assert skeleton.num_parts == count
        if parts:
            assert {g: list(k) for g, k in skeleton.group_keypoints.items()} == groups
        # Completed parts are given parts: building again from them changes nothing.
        assert build_skeleton(names_of(count), edges, skeleton.parts) == skeleton


@quick
@given(trees(max_size=40), st.randoms(use_true_random=False))
def test_order_of_the_mapping_does_not_matter(tree, numbers):
    """A saved configuration sorts the keys of `parts`; weights belong to positions, so the order must survive."""
    count, edges = tree
    skeleton = build_skeleton(
        names_of(count), edges, {"right_hand": [0], **({"body": range(1, count)} if count > 1 else {})}
    )
    shuffled = {}
    for group in numbers.sample(sorted(skeleton.parts), len(skeleton.parts)):
        nodes = numbers.sample(sorted(skeleton.parts[group]), len(skeleton.parts[group]))
        shuffled[group] = {node: list(skeleton.parts[group][node])[::-1] for node in nodes}
    again = build_skeleton(names_of(count), edges, shuffled)
    assert (again.part_nodes, again.part_keypoints) == (skeleton.part_nodes, skeleton.part_keypoints)
    assert again.groups == tuple(group for group in ("body", "right_hand") if group in shuffled)


@quick
@given(trees(max_size=60), st.integers(0, 20))
def test_a_skeleton_in_pieces_still_gets_a_connected_part_graph(tree, stray):
    count, edges = tree
    skeleton = build_skeleton(names_of(count + stray), edges)
    assert len(components(range(skeleton.num_parts), skeleton.part_edges)) == 1


def test_an_edge_between_parts_stands_once_in_the_part_graph():
    skeleton = build_skeleton(
        names_of(4), [(0, 1), (1, 2), (2, 3), (3, 0)], {"body": {"a": [0, 3], "b": [1, 2]}}, flip_pairs=[(0, 1)]
    )
    assert skeleton.part_edges == ((0, 1),)
    assert skeleton.flip_permutation == (1, 0, 2, 3)


BASE = {"keypoint_names": ["a", "b", "c"], "edges": [(0, 1), (1, 2)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoint_names": []}, "keypoint_names is empty"),
        ({"keypoint_names": ["a", "b", "a"]}, "keypoint_names holds 'a' more than once"),
        ({"edges": [(0, 3)]}, "edges holds 3, expected a keypoint index from 0 to 2"),
        ({"edges": [(-1, 0)]}, "edges holds -1"),
        ({"edges": [(0, 1.5)]}, "edges holds 1.5"),
        ({"edges": [(0, 1, 2)]}, "edges holds .* expected two"),
        ({"edges": [7]}, "edges holds 7, expected two"),
        ({"edges": [(1, 1)]}, "edges joins keypoint 1 to itself"),
        ({"parts": [0, 1, 2]}, "parts is .* expected a mapping"),
        ({"parts": {}}, "parts leaves out 3 of 3 keypoints"),
        ({"parts": {"body": {"x": [0, 1]}}}, r"parts leaves out 1 of 3 keypoints, the first is 2 \(c\)"),
        ({"parts": {"body": {"x": [0, 1, 2], "y": [1]}}}, r"parts\['body'\]\['y'\] holds keypoint 1 .*'x'"),
        ({"parts": {"body": [0, 1], "face": [1, 2]}}, r"parts\['face'\] holds keypoint 1 \(b\)"),
        ({"parts": {"body": [0, 1, 2], "face": []}}, r"parts\['face'\] is \[\]"),
        ({"parts": {"body": {"x": [0, 1, 2]}, "face": {}}}, r"parts\['face'\] is \{\}"),
        ({"parts": {"body": {"x": [0, 1, 2], "y": "c"}}}, r"parts\['body'\]\['y'\] is 'c'"),
        ({"parts": {"body": {"x": [0, 1, 2, 3]}}}, r"parts\['body'\]\['x'\] holds 3"),
        ({"flip_pairs": [(0, 1), (1, 2)]}, r"flip_pairs holds keypoint 1 \(b\) in 2 pairs"),
        ({"flip_pairs": [(0, 0)]}, "flip_pairs joins keypoint 0 to itself"),
        ({"flip_pairs": [(0, 9)]}, "flip_pairs holds 9"),
        ({"scale_pair": (0, 5)}, "scale_pair holds 5"),
        ({"scale_pair": (0,)}, "scale_pair holds .* expected two"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        build_skeleton(**{**BASE, **change})


# --- adjacency


@quick
@given(trees(max_size=30), st.data())
def test_spatial_adjacency_equals_the_naive_loop(tree, data):
    count, edges = tree
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda pair: pair[0] != pair[1])
    edges = edges + (data.draw(st.lists(pairs, max_size=5)) if count > 1 else [])  # cycles and repeated edges too
    expected = torch.zeros(3, count, count)
    for node in range(count):
        expected[0, node, node] = 1.0
        parents = {parent for parent, child in edges if child == node}
        children = {child for parent, child in edges if parent == node}
        for partition, neighbours in ((1, parents), (2, children)):
            for neighbour in neighbours:
                expected[partition, node, neighbour] = 1.0 / len(neighbours)
    adjacency = spatial_adjacency(count, edges)
    assert adjacency.dtype == torch.float32 and adjacency.shape == (3, count, count)
    torch.testing.assert_close(adjacency, expected)


@every_layout
def test_adjacency_rows_sum_to_one_or_nothing(skeleton: Skeleton):
    for count, edges in ((skeleton.num_keypoints, skeleton.edges), (skeleton.num_parts, skeleton.part_edges)):
        adjacency = spatial_adjacency(count, edges)
        sums = adjacency.sum(dim=-1)
        assert torch.allclose(sums, (sums > 0).float(), atol=1e-6)
        assert (sums[0] == 1).all()
        # Every neighbour is seen from both ends.
        assert torch.equal(adjacency[1].T > 0, adjacency[2] > 0)


def test_adjacency_holds_values_when_a_model_is_built_on_the_meta_device():
    with torch.device("meta"):
        adjacency = spatial_adjacency(3, [(0, 1), (1, 2)])
    assert adjacency.device.type == "cpu"
    assert adjacency.sum() == 3 + 2 + 2


def test_adjacency_refuses_edges_out_of_range():
    with pytest.raises(ValueError, match="edges holds 2"):
        spatial_adjacency(2, [(0, 2)])
