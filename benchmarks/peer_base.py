"""What the learned tokenizers of others share in this benchmark: their interface, their input and their quantizers.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last), h frames per code step
(`hop_length`), S code steps, Q codebooks, L levels, d dimensions of a latent.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, ResidualVQ

from modeling_pose_tokenizer.skeleton_pose_tokenizer import Skeleton

# A keypoint below it is missing, as for our own model.
CONFIDENCE_THRESHOLD = 0.3
# Shoulder widths: keypoints that hardly move are not blown up to the size of those that do.
MIN_DEVIATION = 1e-2
# What a training step brings a codebook: 32 windows of 32 frames in steps of 4.
VECTORS_PER_TRAINING_STEP = 256


@dataclass
class PeerOutput:
    """
    Attributes:
        pose_values (`torch.Tensor` of shape `(B, T, N, D)`): Reconstruction in the input's units, confidence 0 to 1.
        pose_codes (`torch.LongTensor` of shape `(B, Q, S)`): Codes; -1 where training dropped a level.
        commitment_loss (`torch.Tensor`): Mean squared distance of residuals to their codes, mean over levels.
    """

    pose_values: torch.Tensor
    pose_codes: torch.Tensor
    commitment_loss: torch.Tensor


class PeerQuantizer(nn.Module, ABC):
    """A quantizer of the library. `dim`: d; `codebook_sizes`: codes of each of its codebooks."""

    dim: int
    codebook_sizes: list[int]

    @abstractmethod
    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents `(B, S, d)` to quantized latents, codes `(B, Q, S)` and the commitment loss."""

    @abstractmethod
    def read(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, q, S)`, all or the first ones, to quantized latents `(B, S, d)`."""

    @abstractmethod
    def fit(self, latents: torch.Tensor) -> None:
        """Start from latents `(B, S, d)` of the training data."""


class ResidualCodebooks(PeerQuantizer):
    """`ResidualVQ` as MoMask uses its own: running means, straight-through, a codebook of its own at every level.

    MoMask replaces a code below one vector a step, in steps of eight vectors per code; the library suggests 2. Here a
    step brings fewer vectors than there are codes, and either would replace nearly the whole codebook at every step.
    So the threshold is MoMask's as a share of uniform use, and a new code starts at uniform use.

    Args:
        dim: Dimensions of a vector.
        levels: Codebooks.
        codebook_size: Codes of each.
        dropout: Probability that a training step keeps a random prefix of the levels.
    """

    def __init__(self, dim: int, levels: int, codebook_size: int, dropout: float = 0.0):
        super().__init__()
        self.dim, self.codebook_sizes, self.dropout = dim, [codebook_size] * levels, dropout
        uniform_use = VECTORS_PER_TRAINING_STEP / codebook_size
        self.rvq = ResidualVQ(
            dim=dim,
            num_quantizers=levels,
            codebook_size=codebook_size,
            kmeans_init=True,
            decay=0.99,
            threshold_ema_dead_code=uniform_use / 8,
            rotation_trick=False,
            quantize_dropout=True,
        )
        for level in self.rvq.layers:
            level._codebook.reset_cluster_size = uniform_use

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The library drops levels at every training step or never; MoMask does so with a probability.
        self.rvq.quantize_dropout = self.training and torch.rand(()).item() < self.dropout
        quantized, codes, losses = self.rvq(latents)
        return quantized, codes.transpose(1, 2), losses.sum() / (codes[0, 0] >= 0).sum()

    def read(self, codes: torch.Tensor) -> torch.Tensor:
        missing = F.pad(codes, (0, 0, 0, len(self.codebook_sizes) - codes.shape[1]), value=-1)
        return self.rvq.get_codes_from_indices(missing.transpose(1, 2)).sum(0)

    def fit(self, latents: torch.Tensor) -> None:
        """k-means. The library would run it on the first training batch, which has fewer vectors than a codebook."""
        training = self.rvq.training
        self.rvq.quantize_dropout = False
        self.rvq.train()(latents)
        self.rvq.train(training)
        # Running counts start as if the sample had come in steps of the usual size.
        share = VECTORS_PER_TRAINING_STEP / latents[..., 0].numel()
        for level in self.rvq.layers:
            level._codebook.cluster_size.mul_(share)
            level._codebook.embed_avg.mul_(share)


class FiniteScalars(PeerQuantizer):
    """`FSQ` with several codebooks side by side, each of `math.prod(grid)` codes (arXiv 2309.15505)."""

    def __init__(self, dim: int, grid: Sequence[int], codebooks: int):
        super().__init__()
        self.dim, self.codebook_sizes = dim, [math.prod(grid)] * codebooks
        self.fsq = FSQ(list(grid), dim=dim, num_codebooks=codebooks, keep_num_codebooks_dim=True)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        quantized, codes = self.fsq(latents)
        return quantized, codes.long().transpose(1, 2), latents.new_zeros(())

    def read(self, codes: torch.Tensor) -> torch.Tensor:
        return self.fsq.indices_to_codes(codes.transpose(1, 2))

    def fit(self, latents: torch.Tensor) -> None:
        """A grid has nothing to fit."""


class Peer(nn.Module, ABC):
    """A tokenizer: standardised poses to latents, one quantizer per slice of the latents, and back.

    Coordinates are standardised by the training clips; a missing keypoint stands at the mean. The confidence is an
    input and an output of its own.

    Attributes:
        hop_length: Frames per code step.
        codebook_sizes: Codes of each of the Q codebooks, quantizer by quantizer.
        levels: How many prefixes of the codebooks decode; 1 where only the whole does.

    Buffers:
        mean, deviation (N, D - 1): of each coordinate.
    """

    hop_length = 4

    def __init__(self, layout: Skeleton, keypoint_dim: int, quantizers: Sequence[PeerQuantizer]):
        super().__init__()
        self.num_keypoints, self.keypoint_dim = layout.num_keypoints, keypoint_dim
        self.quantizers = nn.ModuleList(quantizers)
        self.codebook_sizes = [size for quantizer in quantizers for size in quantizer.codebook_sizes]
        residual = len(quantizers) == 1 and isinstance(quantizers[0], ResidualCodebooks)
        self.levels = len(self.codebook_sizes) if residual else 1
        self.register_buffer("mean", torch.zeros(layout.num_keypoints, keypoint_dim - 1))
        self.register_buffer("deviation", torch.ones(layout.num_keypoints, keypoint_dim - 1))

    @abstractmethod
    def analyse(self, poses: torch.Tensor) -> torch.Tensor:
        """Standardised poses `(B, S h, N, D)` to latents `(B, S, d)`, those of all quantizers side by side."""

    @abstractmethod
    def synthesise(self, latents: torch.Tensor) -> torch.Tensor:
        """Quantized latents `(B, S, d)` to standardised poses `(B, S h, N, D)`, the confidence as a logit."""

    def fit_statistics(self, clips: Iterable[np.ndarray]) -> None:
        """Mean and deviation of each coordinate over the observed values of clips `(T, N, D)`."""
        count = np.zeros((self.num_keypoints, 1))
        total, square = np.zeros((2, self.num_keypoints, self.keypoint_dim - 1))
        for clip in clips:
            observed = np.isfinite(clip).all(-1) & (clip[..., -1] >= CONFIDENCE_THRESHOLD)
            values = np.where(observed[..., None], clip[..., :-1], 0.0).astype(np.float64)
            count += observed.sum(0)[:, None]
            total += values.sum(0)
            square += (values**2).sum(0)
        mean = total / count.clip(min=1)
        deviation = np.sqrt((square / count.clip(min=1) - mean**2).clip(min=MIN_DEVIATION**2))
        self.mean.copy_(torch.from_numpy(mean))
        self.deviation.copy_(torch.from_numpy(np.where(count > 0, deviation, 1.0)))

    @torch.no_grad()
    def initialize(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Fit the codebooks to the latents of `batches` (`input_values`, `padding_mask`), before training."""
        latents = torch.cat([self.analyse(self._standardise(b["input_values"], b["padding_mask"])) for b in batches])
        for quantizer, piece in zip(self.quantizers, latents.chunk(len(self.quantizers), -1), strict=True):
            quantizer.fit(piece)

    def forward(self, input_values: torch.Tensor, padding_mask: torch.Tensor | None = None) -> PeerOutput:
        """Encode, quantize and decode `(B, T, N, D)`; in training mode the codebooks learn too."""
        quantized, codes, loss = self._quantize(self.analyse(self._standardise(input_values, padding_mask)))
        poses = self._restore(self.synthesise(quantized))
        return PeerOutput(poses[:, : input_values.shape[1]], codes, loss)

    def reconstruct_without_quantizer(self, input_values: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """`forward`, the latents as they are: `(B, T, N, D)`."""
        poses = self.synthesise(self.analyse(self._standardise(input_values, padding_mask)))
        return self._restore(poses)[:, : input_values.shape[1]]

    def encode(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None = None, num_quantizers: int | None = None
    ) -> torch.Tensor:
        """Poses `(B, T, N, D)` to codes `(B, Q, S)`, or those of the first `num_quantizers` levels."""
        codes = self._quantize(self.analyse(self._standardise(input_values, padding_mask)))[1]
        return codes if num_quantizers is None else codes[:, : num_quantizers * codes.shape[1] // self.levels]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, q, S)` to poses `(B, S h, N, D)`."""
        latents, start = [], 0
        for quantizer in self.quantizers:
            stop = start + len(quantizer.codebook_sizes)
            latents.append(quantizer.read(codes[:, start:stop]))
            start = stop
        return self._restore(self.synthesise(torch.cat(latents, -1)))

    def _quantize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pieces = zip(self.quantizers, latents.chunk(len(self.quantizers), -1), strict=True)
        quantized, codes, losses = zip(*(quantizer(piece) for quantizer, piece in pieces), strict=True)
        return torch.cat(quantized, -1), torch.cat(codes, 1), torch.stack(losses).mean()

    def _standardise(self, input_values: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Whole code steps of standardised poses; what follows the last real frame repeats it."""
        batch, frames = input_values.shape[:2]
        device = input_values.device
        real = torch.ones(batch, frames, device=device) if padding_mask is None else padding_mask
        last = (real.bool() * torch.arange(frames, device=device)).amax(1)  # (B,)
        whole = frames + -frames % self.hop_length
        places = torch.arange(whole, device=device).minimum(last[:, None])  # (B, S h)
        rows = torch.arange(batch, device=device)[:, None]
        values = input_values[rows, places]
        there = values.isfinite().all(-1) & real.bool()[rows, places, None]  # (B, S h, N)
        confidence = torch.where(there, values[..., -1], 0.0)
        observed = (there & (confidence >= CONFIDENCE_THRESHOLD))[..., None]
        coordinates = torch.where(observed, (values[..., :-1] - self.mean) / self.deviation, 0.0)
        return torch.cat([coordinates, confidence[..., None]], -1)

    def _restore(self, poses: torch.Tensor) -> torch.Tensor:
        """The inverse of `_standardise`, and the confidence as a probability."""
        return torch.cat([poses[..., :-1] * self.deviation + self.mean, poses[..., -1:].sigmoid()], -1)
