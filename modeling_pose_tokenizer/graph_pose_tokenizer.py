"""Graph layers: pooling between keypoints, part nodes and token groups, convolution over edges, the ST-GCN block.

Letters: B batch, S code steps, N keypoints, P part nodes, V nodes of whichever graph, G token groups, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_pose_tokenizer import PoseTokenizerConfig
from .skeleton_pose_tokenizer import spatial_adjacency


@dataclass(frozen=True)
class CodecGraph:
    """The skeleton as the network sees it: keypoints reordered part by part, so that members are neighbours.

    Attributes:
        order: For each of the N places, the keypoint of the layout that stands there.
        edges: Bones, between places.
        part_edges: Edges between the P part nodes.
        part_sizes: Keypoints of each part node.
        group_nodes, group_keypoints: Part nodes and keypoints of each of the G token groups.
        anchors: For each of the N places, the place in the first group that its group hangs on (a hand on its wrist),
            or -1 where there is none.
    """

    order: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    part_edges: tuple[tuple[int, int], ...]
    part_sizes: tuple[int, ...]
    group_nodes: tuple[int, ...]
    group_keypoints: tuple[int, ...]
    anchors: tuple[int, ...]

    @classmethod
    def from_config(cls, config: PoseTokenizerConfig) -> "CodecGraph":
        layout = config.layout
        order = [keypoint for keypoints in layout.part_keypoints for keypoint in keypoints]
        place = {keypoint: index for index, keypoint in enumerate(order)}
        whole = config.token_groups == "whole"
        first, *others = layout.group_keypoints.values()
        anchors = [-1] * layout.num_keypoints
        for keypoints in others:
            inside = set(keypoints)
            bones = [(a, b) if b in inside else (b, a) for a, b in layout.edges if (a in inside) != (b in inside)]
            held = [place[outer] for outer, _ in bones if outer in first]
            for keypoint in keypoints:
                anchors[place[keypoint]] = held[0] if held else -1
        return cls(
            order=tuple(order),
            edges=tuple((place[parent], place[child]) for parent, child in layout.edges),
            part_edges=layout.part_edges,
            part_sizes=tuple(map(len, layout.part_keypoints)),
            group_nodes=(layout.num_parts,) if whole else tuple(len(nodes) for nodes in layout.parts.values()),
            group_keypoints=(layout.num_keypoints,) if whole else tuple(map(len, layout.group_keypoints.values())),
            anchors=tuple(anchors),
        )


class PoseTokenizerPooling(nn.Module):
    """Fine nodes to coarse ones: each coarse node reads its members through weights of its own, never an average.

    Members are neighbours: the `sizes[0]` first fine nodes belong to coarse node 0, and so on. `gain` scales the
    initial weights.
    """

    def __init__(self, sizes: Sequence[int], in_features: int, out_features: int, gain: float = 1.0):
        super().__init__()
        self.sizes, self.in_features, self.gain = list(sizes), in_features, gain
        self.weight = nn.Parameter(torch.zeros(out_features, sum(sizes) * in_features))
        self.bias = nn.Parameter(torch.zeros(len(sizes), out_features))

    def reset_parameters(self) -> None:
        fan_in = torch.tensor([size * self.in_features for size in self.sizes for _ in range(size * self.in_features)])
        deviation = self.gain * fan_in.to(self.weight).rsqrt()
        init.copy_(self.weight, torch.randn_like(self.weight) * deviation)
        init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, sum(sizes), in_features)` to `(B, S, len(sizes), out_features)`."""
        widths = [size * self.in_features for size in self.sizes]
        members = hidden_states.flatten(2).split(widths, -1)
        weights = self.weight.split(widths, 1)
        pooled = [F.linear(*both) for both in zip(members, weights, strict=True)]
        return torch.stack(pooled, 2) + self.bias


class PoseTokenizerUnpooling(nn.Module):
    """Coarse nodes to fine ones, the mirror of `PoseTokenizerPooling`: each member has weights of its own."""

    def __init__(self, sizes: Sequence[int], in_features: int, out_features: int):
        super().__init__()
        self.sizes, self.out_features = list(sizes), out_features
        self.weight = nn.Parameter(torch.zeros(sum(sizes) * out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(sum(sizes), out_features))

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, len(sizes), in_features)` to `(B, S, sum(sizes), out_features)`."""
        weights = self.weight.split([size * self.out_features for size in self.sizes])
        written = [F.linear(*both) for both in zip(hidden_states.unbind(2), weights, strict=True)]
        return torch.cat(written, -1).unflatten(-1, (-1, self.out_features)) + self.bias


class PoseTokenizerHead(nn.Module):
    """A linear map of its own for every keypoint. `gain` scales the initial weights."""

    def __init__(self, num_keypoints: int, in_features: int, out_features: int, gain: float = 1.0):
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.zeros(num_keypoints, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(num_keypoints, 1, out_features))

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.gain * self.weight.shape[1] ** -0.5)
        init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, N, in_features)` to `(B, S, N, out_features)`."""
        rows = hidden_states.flatten(0, 1).transpose(0, 1)  # (N, M, in)
        written = torch.baddbmm(self.bias, rows, self.weight)
        return written.transpose(0, 1).unflatten(0, hidden_states.shape[:2])


class PoseTokenizerGraphConv(nn.Module):
    """Spatial graph convolution with learnable edge importance (ST-GCN, arXiv 1801.07455, equation 10).

    Buffers (derived, not saved):
        adjacency (3, V, V): self, inward and outward neighbours, each row-normalised.
    """

    def __init__(self, num_nodes: int, edges: Sequence[Sequence[int]], in_features: int, out_features: int):
        super().__init__()
        self.num_nodes, self.edges = num_nodes, edges
        # Neighbours are gathered on the side with fewer channels: the result is the same, the work is not.
        self.gather_first = in_features < out_features
        sizes = (3 * in_features, out_features) if self.gather_first else (in_features, 3 * out_features)
        self.projection = nn.Linear(*sizes)
        self.importance = nn.Parameter(torch.ones(3, num_nodes, num_nodes))
        self.register_buffer("adjacency", self.constants()["adjacency"], persistent=False)

    def constants(self) -> dict[str, torch.Tensor]:
        return {"adjacency": spatial_adjacency(self.num_nodes, self.edges)}

    def reset_parameters(self) -> None:
        init.ones_(self.importance)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, V, C_in)` to `(B, S, V, C_out)`: x'_v = sum_k sum_w A_kvw W_k x_w."""
        adjacency = self.adjacency.to(self.importance.dtype) * self.importance
        if self.gather_first:
            gathered = torch.einsum("kvw,bswc->bsvkc", adjacency, hidden_states)
            return self.projection(gathered.flatten(3))
        projected = self.projection(hidden_states).unflatten(-1, (3, -1)).flatten(2, 3)  # (B, S, V 3, C)
        # One matrix (V, V 3) does all three partitions; given for each step, it leaves the features where they are.
        neighbours = adjacency.permute(1, 2, 0).flatten(1).expand(projected.shape[0] * projected.shape[1], -1, -1)
        return torch.bmm(neighbours, projected.flatten(0, 1)).unflatten(0, projected.shape[:2])


def last_seen(observed: torch.Tensor, causal: bool) -> torch.Tensor:
    """The frame, from 1, in which each keypoint was observed last, before there is one the first that comes, or 0.

    Args:
        observed (`torch.BoolTensor` of shape `(B, T, N)`): Where keypoints are there.
        causal (`bool`): Whether it is 0 until the first comes, and not only where none comes.

    Returns:
        `torch.LongTensor` of shape `(B, T, N)`.
    """
    last = observed.shape[1] + 1
    frames = torch.arange(1, last, device=observed.device, dtype=torch.int32)[:, None]
    latest = torch.where(observed, frames, 0)
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # for any T: the k-th observed frame lies in place k
        count = observed.long().cumsum(1)
        places = torch.zeros_like(torch.cat([latest[:, :1], latest], 1))
        latest = places.scatter(1, torch.where(observed, count, 0), latest).gather(1, count)
    else:  # the running maximum, of twice as many frames each time: several times as fast as `cummax`
        reach = 1
        while reach < len(frames):
            latest = torch.cat([latest[:, :reach], latest[:, reach:].maximum(latest[:, :-reach])], 1)
            reach *= 2
    if not causal:
        coming = torch.where(observed, frames, last).amin(1, keepdim=True)
        latest = latest.maximum(torch.where(coming == last, 0, coming))
    return latest.long()


def hold(values: torch.Tensor, latest: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Values `(B, T, N, D)` of the frames that `last_seen` names `(B, T, N)`; 0 names `first` `(B, N, D)`."""
    values = torch.cat([first[:, None], values], 1)
    return values.gather(1, latest[..., None].expand(-1, -1, -1, values.shape[-1]))


class PoseTokenizerPaddingCache:
    """What a stream, of poses or of codes, needs of its past to go on where it stopped.

    Attributes:
        states (`list[torch.Tensor]`): The last steps that each causal convolution saw, one
            `(B, kernel_size - 1, V, C)` per convolution, in the order of the layers.
        held (`torch.Tensor` of shape `(B, N, D - 1)`): Where each keypoint was seen last, relative to its anchor.
        quantizer (`QuantizerState`): The quantizer's own.
    """

    def __init__(self, num_layers: int):
        self.states: list[torch.Tensor | None] = [None] * num_layers
        self.held: torch.Tensor | None = None
        self.quantizer: Any = None

    def extend(self, layer: int, hidden_states: torch.Tensor, length: int) -> torch.Tensor:
        """Put the past before `hidden_states` `(B, S, V, C)` and remember its last `length` steps."""
        past = self.states[layer]
        if past is None:
            past = hidden_states.new_zeros(hidden_states.shape[0], length, *hidden_states.shape[2:])
        extended = torch.cat([past, hidden_states], 1)
        self.states[layer] = extended[:, extended.shape[1] - length :]
        return extended


def temporal_conv(in_features: int, out_features: int, kernel_size: int, causal: bool, groups: int = 1) -> nn.Conv2d:
    """A convolution over steps for `convolve_in_time`; one that sees both sides pads its input itself."""
    padding = 0 if causal else kernel_size // 2
    return nn.Conv2d(in_features, out_features, (kernel_size, 1), padding=(padding, 0), groups=groups)


def convolve_in_time(
    conv: nn.Conv2d, hidden_states: torch.Tensor, causal: bool, cache: PoseTokenizerPaddingCache | None, layer: int
) -> torch.Tensor:
    """`(B, S, V, C_in)` to `(B, S, V, C_out)`: zeros stand around, or in a stream its past in front.

    `layer` is the convolution's number in the cache.
    """
    past = conv.kernel_size[0] - 1
    if cache is not None:
        hidden_states = cache.extend(layer, hidden_states, past)
    elif causal:
        hidden_states = F.pad(hidden_states, (0, 0, 0, 0, past, 0))
    # (B, S, V, C) is (B, C, S, V) in channels-last order: no copy.
    return conv(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def mask_steps(hidden_states: torch.Tensor, step_mask: torch.Tensor) -> torch.Tensor:
    """`(B, S, V, C)`, zeros where `step_mask` `(B, S)` is False: by `where`, since what stands there may be NaN."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    # Windows are real to the last step. To ask costs a CPU less than to copy; a GPU would have to wait for the answer.
    if not traced and step_mask.device.type == "cpu" and step_mask.all():
        return hidden_states
    return torch.where(step_mask[..., None, None], hidden_states, 0.0)


class PoseTokenizerBlock(GradientCheckpointingLayer):
    """Pre-norm ST-GCN block: graph convolution, nonlinearity, depthwise temporal convolution, projection, residual."""

    def __init__(
        self, config: PoseTokenizerConfig, num_nodes: int, edges: Sequence[Sequence[int]], features: int, layer: int
    ):
        super().__init__()
        self.layer, self.causal = layer, config.use_causal_conv
        self.norm = nn.LayerNorm(features)
        self.graph_conv = PoseTokenizerGraphConv(num_nodes, edges, features, features)
        self.temporal_conv = temporal_conv(features, features, config.kernel_size, self.causal, groups=features)
        self.projection = nn.Linear(features, features)

    def forward(
        self, hidden_states: torch.Tensor, step_mask: torch.Tensor, cache: PoseTokenizerPaddingCache | None = None
    ) -> torch.Tensor:
        """`(B, S, V, C)` to the same shape; steps that are False in `step_mask` `(B, S)` reach no other step."""
        inside = F.gelu(self.graph_conv(self.norm(hidden_states)))
        inside = mask_steps(inside, step_mask)
        inside = convolve_in_time(self.temporal_conv, inside, self.causal, cache, self.layer)
        return hidden_states + self.projection(F.gelu(inside))
