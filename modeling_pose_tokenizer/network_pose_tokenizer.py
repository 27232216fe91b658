"""The encoder and the decoder: poses to latents, and back.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last), C channels, P part nodes, G token
groups, S code steps, h frames per step (`hop_length`), d dimensions of a latent.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_pose_tokenizer import PoseTokenizerConfig
from .graph_pose_tokenizer import (
    CodecGraph,
    PoseTokenizerBlock,
    PoseTokenizerGraphConv,
    PoseTokenizerHead,
    PoseTokenizerPaddingCache,
    PoseTokenizerPooling,
    PoseTokenizerUnpooling,
    convolve_in_time,
    mask_steps,
    temporal_conv,
)

# The network starts as a small correction of the linear path: a thousandth of a shoulder width.
INITIAL_NETWORK_GAIN = 0.001


class PoseTokenizerEncoder(nn.Module):
    """Keypoints to one latent per token group and code step.

    A linear path from the patch of coordinates, fitted by PCA and not trained; where the configuration asks for it
    (`num_encoder_layers`), a graph network adds what a linear encoder cannot say.
    """

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__()
        graph = CodecGraph.from_config(config)
        self.hop_length = config.hop_length
        self.linear_path = PoseTokenizerPooling(
            graph.group_keypoints, config.hop_length * (config.keypoint_dim - 1), config.codebook_dim
        )
        self.linear_path.requires_grad_(False)
        self.network = PoseTokenizerEncoderNetwork(config, graph) if config.num_encoder_layers else None

    def forward(
        self, poses: torch.Tensor, step_mask: torch.Tensor, cache: PoseTokenizerPaddingCache | None = None
    ) -> torch.Tensor:
        """Completed poses `(B, S h, N, D)`, keypoints part by part, to latents `(B, S, G, d)`."""
        patches = poses.unflatten(1, (-1, self.hop_length)).permute(0, 1, 3, 2, 4)  # (B, S, N, h, D)
        latents = self.linear_path(patches[..., :-1].flatten(3))
        return latents if self.network is None else latents + self.network(patches.flatten(3), step_mask, cache)


class PoseTokenizerEncoderNetwork(nn.Module):
    """ST-GCN blocks on keypoints and on part nodes, pooled to token groups."""

    def __init__(self, config: PoseTokenizerConfig, graph: CodecGraph):
        super().__init__()
        joint, features, num_joint = config.joint_hidden_size, config.hidden_size, config.num_joint_layers
        patch = config.hop_length * config.keypoint_dim
        self.joint_projection = PoseTokenizerGraphConv(len(graph.order), graph.edges, patch, joint)
        self.joint_layers = nn.ModuleList(
            PoseTokenizerBlock(config, len(graph.order), graph.edges, joint, layer) for layer in range(num_joint)
        )
        self.part_pooling = PoseTokenizerPooling(graph.part_sizes, joint, features)
        self.part_layers = nn.ModuleList(
            PoseTokenizerBlock(config, len(graph.part_sizes), graph.part_edges, features, num_joint + layer)
            for layer in range(config.num_encoder_layers)
        )
        self.norm = nn.LayerNorm(features)
        self.group_pooling = PoseTokenizerPooling(
            graph.group_nodes, features, config.codebook_dim, INITIAL_NETWORK_GAIN
        )

    def forward(
        self, patches: torch.Tensor, step_mask: torch.Tensor, cache: PoseTokenizerPaddingCache | None
    ) -> torch.Tensor:
        """Patches `(B, S, N, h D)` to latents `(B, S, G, d)`."""
        hidden_states = F.gelu(self.joint_projection(patches))  # (B, S, N, C_joint)
        for layer in self.joint_layers:
            hidden_states = layer(hidden_states, step_mask, cache)
        hidden_states = self.part_pooling(hidden_states)  # (B, S, P, C)
        for layer in self.part_layers:
            hidden_states = layer(hidden_states, step_mask, cache)
        return self.group_pooling(self.norm(hidden_states))


class PoseTokenizerDecoder(nn.Module):
    """Latents to keypoints: a linear path, fitted with the encoder's, and a graph network that sees steps before and
    after, with a head per keypoint and a light refinement at the full frame rate."""

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__()
        graph = CodecGraph.from_config(config)
        hop, dim = config.hop_length, config.keypoint_dim
        joint, features, num_part = config.joint_hidden_size, config.hidden_size, config.num_part_layers
        self.hop_length = hop
        self.group_unpooling = PoseTokenizerUnpooling(graph.group_nodes, config.codebook_dim, features)
        self.part_layers = nn.ModuleList(
            PoseTokenizerBlock(config, len(graph.part_sizes), graph.part_edges, features, layer)
            for layer in range(num_part)
        )
        self.norm = nn.LayerNorm(features)
        self.part_unpooling = PoseTokenizerUnpooling(graph.part_sizes, features, joint)
        self.joint_layers = nn.ModuleList(
            PoseTokenizerBlock(config, len(graph.order), graph.edges, joint, num_part + layer)
            for layer in range(config.num_joint_layers)
        )
        self.head = PoseTokenizerHead(len(graph.order), joint, hop * dim, INITIAL_NETWORK_GAIN)
        self.linear_path = PoseTokenizerUnpooling(graph.group_keypoints, config.codebook_dim, hop * (dim - 1))
        self.refinement = PoseTokenizerRefinement(config, num_part + config.num_joint_layers)

    def forward(
        self, latents: torch.Tensor, step_mask: torch.Tensor, cache: PoseTokenizerPaddingCache | None = None
    ) -> torch.Tensor:
        """Latents `(B, S, G, d)` to poses `(B, S h, N, D)`, keypoints part by part, the confidence as a logit."""
        linear = self.linear_path(latents).unflatten(-1, (self.hop_length, -1))  # (B, S, N, h, D - 1)
        hidden_states = self.group_unpooling(latents)  # (B, S, P, C)
        for layer in self.part_layers:
            hidden_states = layer(hidden_states, step_mask, cache)
        hidden_states = F.gelu(self.part_unpooling(self.norm(hidden_states)))  # (B, S, N, C_joint)
        for layer in self.joint_layers:
            hidden_states = layer(hidden_states, step_mask, cache)
        patches = self.head(hidden_states).unflatten(-1, (self.hop_length, -1))  # (B, S, N, h, D)
        poses = (patches + F.pad(linear, (0, 1))).permute(0, 1, 3, 2, 4).flatten(1, 2)  # (B, T, N, D)
        return self.refinement(poses, step_mask.repeat_interleave(self.hop_length, 1), cache)

    def group_gain(self, weight: torch.Tensor) -> torch.Tensor:
        """Squared error of poses, keypoints weighted by `weight` `(N,)`, for one of a latent's: `(G,)`, by the linear
        path."""
        squares = self.linear_path.weight.detach().float().square().mean(1)  # (N h (D - 1),)
        squares = squares.unflatten(0, (len(weight), -1)).sum(1) * weight.to(squares)
        return torch.stack([group.sum() for group in squares.split(self.linear_path.sizes)])


class PoseTokenizerRefinement(nn.Module):
    """Two small temporal convolutions at the full frame rate, shared by all keypoints, so that no seam shows."""

    kernel_size, features = 5, 16

    def __init__(self, config: PoseTokenizerConfig, layer: int):
        super().__init__()
        self.causal, self.layer = config.use_causal_conv, layer
        self.conv_in = temporal_conv(config.keypoint_dim, self.features, self.kernel_size, self.causal)
        self.conv_out = temporal_conv(self.features, config.keypoint_dim, self.kernel_size, self.causal)
        self.conv_out.gain = 0.0  # it starts by changing nothing

    def forward(
        self, poses: torch.Tensor, frame_mask: torch.Tensor, cache: PoseTokenizerPaddingCache | None = None
    ) -> torch.Tensor:
        """`(B, T, N, D)` to the same shape; frames that are False in `frame_mask` `(B, T)` reach no other frame."""
        refined = poses
        for number, conv in enumerate((self.conv_in, self.conv_out)):
            refined = F.gelu(refined) if number else refined
            refined = mask_steps(refined, frame_mask)
            refined = convolve_in_time(conv, refined, self.causal, cache, self.layer + number)
        return poses + refined
