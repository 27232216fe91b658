"""Learned pose tokenizers of others, in their authors' form.

| class | after | what it is |
|---|---|---|
| `ConvRVQ` | MoMask, arXiv 2312.00063; EricGuo5513/momask-codes, models/vq | convolutions on flat poses, RVQ |
| `SeparateConvVQ` | SOKE, arXiv 2411.17799; 2000ZRL/SOKE, mGPT/archs/mgpt_vq.py | one each for body and hands |
| `FrameTransformerFSQ` | sign-language-processing/sign-vq, sign_vq/model.py | a token per frame, transformers, FSQ |
| `JointSTGCN` | ST-GCN, arXiv 1801.07455; yysijie/st-gcn, net/st_gcn.py | joint graph averaged to one latent, RVQ |

Letters: B batch, T frames, N keypoints, D values per keypoint, F = N D features of a frame, C channels, S code steps.
"""

import math
from collections.abc import Sequence

import torch
from peer_base import FiniteScalars, Peer, ResidualCodebooks
from torch import nn
from torch.nn import functional as F

from modeling_pose_tokenizer.skeleton_pose_tokenizer import Skeleton, spatial_adjacency

# --- MoMask and SOKE: the VQ-VAE of T2M-GPT (arXiv 2301.06052) -------------------------------------------------------


class ConvResidual(nn.Module):
    """ReLU, dilated convolution over 3 steps, ReLU, pointwise convolution, dropout, residual: `(B, C, S)` alike."""

    def __init__(self, width: int, dilation: int, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation),
            nn.ReLU(),
            nn.Conv1d(width, width, 1),
            nn.Dropout(dropout),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.layers(hidden_states)


def residual_stack(width: int, dropout: float) -> nn.Sequential:
    """Depth 3, dilation growth 3, the widest first."""
    return nn.Sequential(*(ConvResidual(width, dilation, dropout) for dilation in (9, 3, 1)))


def conv_encoder(features: int, width: int, dropout: float) -> nn.Sequential:
    """Flat poses `(B, F, T)` to latents `(B, C, T / 4)` (models/vq/encdec.py, `Encoder`)."""
    layers = [nn.Conv1d(features, width, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv1d(width, width, 4, stride=2, padding=1), residual_stack(width, dropout)]
    return nn.Sequential(*layers, nn.Conv1d(width, width, 3, padding=1))


def conv_decoder(features: int, width: int, dropout: float) -> nn.Sequential:
    """Latents `(B, C, T / 4)` to flat poses `(B, F, T)` (models/vq/encdec.py, `Decoder`)."""
    layers = [nn.Conv1d(width, width, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [residual_stack(width, dropout), nn.Upsample(scale_factor=2), nn.Conv1d(width, width, 3, padding=1)]
    head = [nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, features, 3, padding=1)]
    return nn.Sequential(*layers, *head)


class ConvVQ(Peer):
    """A convolutional VQ-VAE for each part of the keypoints, blind to the others."""

    def __init__(
        self,
        layout: Skeleton,
        keypoint_dim: int,
        width: int,
        parts: Sequence[Sequence[int]],
        quantizers: Sequence[ResidualCodebooks],
        dropout: float,
    ):
        super().__init__(layout, keypoint_dim, quantizers)
        self.parts = [list(part) for part in parts]
        order = torch.tensor([keypoint for part in parts for keypoint in part])
        self.register_buffer("place", order.argsort(), persistent=False)
        sizes = [len(part) * keypoint_dim for part in parts]
        self.encoders = nn.ModuleList(conv_encoder(size, width, dropout) for size in sizes)
        self.decoders = nn.ModuleList(conv_decoder(size, width, dropout) for size in sizes)

    def analyse(self, poses: torch.Tensor) -> torch.Tensor:
        flat = [poses[:, :, part].flatten(2).transpose(1, 2) for part in self.parts]
        latents = [encoder(piece) for encoder, piece in zip(self.encoders, flat, strict=True)]
        return torch.cat(latents, 1).transpose(1, 2)

    def synthesise(self, latents: torch.Tensor) -> torch.Tensor:
        pieces = latents.transpose(1, 2).chunk(len(self.parts), 1)
        flat = torch.cat([decoder(piece) for decoder, piece in zip(self.decoders, pieces, strict=True)], 1)
        poses = flat.transpose(1, 2).unflatten(2, (self.num_keypoints, self.keypoint_dim))  # part by part
        return poses.index_select(2, self.place)


class ConvRVQ(ConvVQ):
    """MoMask's RVQ-VAE: flat poses, 4-fold stride, residual codebooks of the network's width.

    Dropout 0.2 in the residual blocks and quantizer dropout 0.2 are its code's defaults. Its sampling of codes with
    Gumbel noise in training is left out.
    """

    def __init__(
        self,
        layout: Skeleton,
        keypoint_dim: int = 3,
        width: int = 512,
        levels: int = 8,
        codebook_size: int = 1024,
        dropout: float = 0.2,
    ):
        quantizer = ResidualCodebooks(width, levels, codebook_size, dropout=0.2)
        super().__init__(layout, keypoint_dim, width, [range(layout.num_keypoints)], [quantizer], dropout)


class SeparateConvVQ(ConvVQ):
    """SOKE's decoupled tokenizer: a VQ-VAE for the body with the face, one for each hand.

    Theirs have one codebook each, of 96 and 192 codes (configs/deto.yaml). To spend the 20 bits per frame of the
    others, the body has 4 residual codebooks of 1,024 codes and each hand 2. A skeleton without hands is one part.
    """

    def __init__(
        self,
        layout: Skeleton,
        keypoint_dim: int = 3,
        width: int = 512,
        part_levels: Sequence[int] = (4, 2, 2),
        codebook_size: int = 1024,
    ):
        hands = [members for group, members in layout.group_keypoints.items() if group.endswith("hand")]
        body = sorted(set(range(layout.num_keypoints)).difference(*hands))
        parts = [body, *hands]
        quantizers = [ResidualCodebooks(width, levels, codebook_size) for levels in part_levels[: len(parts)]]
        super().__init__(layout, keypoint_dim, width, parts, quantizers, dropout=0.0)


# --- sign-vq ---------------------------------------------------------------------------------------------------------


def sinusoids(frames: int, width: int, device: torch.device) -> torch.Tensor:
    """Sine and cosine of a frame's number at geometric wavelengths, `(T, C)` (arXiv 1706.03762, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angles = torch.arange(frames, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


class FrameTransformer(nn.Module):
    """Positions added, dropout, then post-norm transformer layers over the frames: `(B, T, C)` alike.

    sign-vq's positions number the sequences of the batch, as its layout is batch first; these number the frames.
    """

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.TransformerEncoder(layer, layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        frames, width = hidden_states.shape[1:]
        return self.layers(self.dropout(hidden_states + sinusoids(frames, width, hidden_states.device)))


class FrameTransformerFSQ(Peer):
    """sign-vq's autoencoder: a token per frame, transformers around finite scalar quantization.

    Width 512, 16 heads, 6 layers on either side, dropout 0.1 and 0.15 at the input are its code's. It has 4 codebooks
    of 8 x 5 x 5 x 5 codes a frame; 2 are 20 bits.
    """

    hop_length = 1
    grid = (8, 5, 5, 5)

    def __init__(
        self,
        layout: Skeleton,
        keypoint_dim: int = 3,
        width: int = 512,
        heads: int = 16,
        layers: int = 6,
        codebooks: int = 2,
        dropout: float = 0.1,
        input_dropout: float = 0.15,
    ):
        super().__init__(layout, keypoint_dim, [FiniteScalars(width, self.grid, codebooks)])
        features = layout.num_keypoints * keypoint_dim
        self.project_in = nn.Sequential(nn.Dropout(input_dropout), nn.Linear(features, width, bias=False))
        self.encoder = FrameTransformer(width, heads, layers, dropout)
        self.decoder = FrameTransformer(width, heads, layers, dropout)
        self.project_out = nn.Linear(width, features)

    def analyse(self, poses: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.project_in(poses.flatten(2)))

    def synthesise(self, latents: torch.Tensor) -> torch.Tensor:
        return self.project_out(self.decoder(latents)).unflatten(2, (self.num_keypoints, self.keypoint_dim))


# --- ST-GCN on joints ------------------------------------------------------------------------------------------------


class JointBlock(nn.Module):
    """ST-GCN block on the joint graph (net/st_gcn.py, `st_gcn`): `(B, C, T, N)` to `(B, C', T / stride, N)`.

    Graph convolution in three spatial partitions with learned edge importance, then a dense convolution over 9 frames.

    Buffers (derived, not saved):
        adjacency (3, N, N): self, inward and outward neighbours.
    """

    def __init__(self, layout: Skeleton, in_features: int, features: int, stride: int, residual: bool):
        super().__init__()
        adjacency = spatial_adjacency(layout.num_keypoints, layout.edges)
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.importance = nn.Parameter(torch.ones_like(adjacency))
        self.projection = nn.Conv2d(in_features, 3 * features, 1)
        self.temporal = nn.Sequential(
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, (9, 1), (stride, 1), (4, 0)),
            nn.BatchNorm2d(features),
        )
        self.shortcut: nn.Module | None = None
        if residual and stride == 1 and in_features == features:
            self.shortcut = nn.Identity()
        elif residual:
            projection = nn.Conv2d(in_features, features, 1, (stride, 1))
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.projection(hidden_states).unflatten(1, (3, -1))
        gathered = torch.einsum("bkctw,kvw->bctv", projected, self.adjacency * self.importance)
        inside = self.temporal(gathered)
        return F.relu(inside if self.shortcut is None else inside + self.shortcut(hidden_states))


class JointSTGCN(Peer):
    """ST-GCN on the joints, averaged over them into one latent per 4 frames, RVQ, and an upsampling MLP.

    Two blocks have stride 2, the one that ends the first half and the last. The decoder doubles the frames twice, each
    time behind a temporal convolution, and writes all keypoints by an MLP of `decoder_width`.
    """

    def __init__(
        self,
        layout: Skeleton,
        keypoint_dim: int = 3,
        width: int = 256,
        blocks: int = 4,
        levels: int = 8,
        codebook_size: int = 1024,
        decoder_width: int = 256,
    ):
        super().__init__(layout, keypoint_dim, [ResidualCodebooks(width, levels, codebook_size, dropout=0.2)])
        features = layout.num_keypoints * keypoint_dim
        self.data_norm = nn.BatchNorm1d(features)
        halving = (blocks // 2 - 1, blocks - 1)
        self.encoder = nn.Sequential(
            *(
                JointBlock(layout, width if block else keypoint_dim, width, 1 + (block in halving), residual=block > 0)
                for block in range(blocks)
            )
        )
        layers: list[nn.Module] = []
        for size in (width, decoder_width):
            layers += [nn.Conv1d(size, decoder_width, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)]
        head = [nn.Conv1d(decoder_width, decoder_width, 1), nn.ReLU(), nn.Conv1d(decoder_width, features, 1)]
        self.decoder = nn.Sequential(*layers, *head)

    def analyse(self, poses: torch.Tensor) -> torch.Tensor:
        normed = self.data_norm(poses.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, poses.shape[2:])
        return self.encoder(normed.permute(0, 3, 1, 2)).mean(-1).transpose(1, 2)  # (B, S, C)

    def synthesise(self, latents: torch.Tensor) -> torch.Tensor:
        flat = self.decoder(latents.transpose(1, 2)).transpose(1, 2)
        return flat.unflatten(2, (self.num_keypoints, self.keypoint_dim))
