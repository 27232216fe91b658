"""Small models for the tests: trained for a few steps and perturbed, since zero biases and equal codes hide bugs."""

from functools import cache
from typing import Any

import torch

from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerModel

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "joint_hidden_size": 8,
    "num_part_layers": 2,
    "codebook_size": 64,
    "codebook_dim": 8,
}
# A body of nine keypoints in 3D, with two groups of unlike size.
CUSTOM: dict[str, Any] = {
    "skeleton": None,
    "keypoint_names": [f"k{index}" for index in range(9)],
    "edges": [[0, 1], [1, 2], [2, 3], [1, 4], [4, 5], [0, 6], [6, 7], [6, 8]],
    "parts": {"body": [0, 1, 6, 7, 8, 2, 3], "left_hand": [4, 5]},
    "flip_pairs": [[7, 8]],
    "scale_pair": [7, 8],
    "keypoint_dim": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "parts": {"skeleton": "unisign_69", "num_quantizers": [3, 1, 2, 2]},
    # Here and below key steps come so often that even short sequences have several.
    "whole": {
        "skeleton": "coco_17",
        "token_groups": "whole",
        "num_quantizers": 3,
        "downsampling_ratio": 3,
        "key_interval": 4,
    },
    "fsq": {"skeleton": "unisign_69", "quantizer": "fsq", "num_quantizers": [1, 2, 2, 3], "key_interval": 3},
    "causal": {
        "skeleton": "phoenix_50",
        "use_causal_conv": True,
        "num_encoder_layers": 2,
        "num_quantizers": 2,
        "downsampling_ratio": 2,
        "key_interval": 5,
    },
    "joint": {"skeleton": "coco_17", "num_joint_layers": 2, "num_encoder_layers": 1, "token_groups": "whole"},
    "custom": {**CUSTOM, "num_quantizers": [3, 2], "downsampling_ratio": 1, "kernel_size": 3},
}


def small_config(variant: str, **changes: Any) -> PoseTokenizerConfig:
    return PoseTokenizerConfig(**{**SIZES, **VARIANTS[variant], **changes})


def random_poses(config: PoseTokenizerConfig, batch: int, frames: int, seed: int) -> torch.Tensor:
    """Smooth random motion `(B, T, N, D)`; about a fifth of the keypoints are missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames, config.num_keypoints, config.keypoint_dim)
    poses = 0.1 * torch.randn(shape, generator=generator).cumsum(1)
    poses += torch.randn(1, 1, *shape[2:], generator=torch.Generator().manual_seed(0))
    poses[..., -1] = torch.rand(shape[:-1], generator=generator).mul(1.5).clamp(max=1)
    return poses


def train_model(config: PoseTokenizerConfig, seed: int, steps: int, batch: int, frames: int) -> PoseTokenizerModel:
    """A fresh model after a few steps of training on random motion, in training mode."""
    torch.manual_seed(seed)
    model = PoseTokenizerModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        model(random_poses(config, batch, frames, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@cache
def trained_model(variant: str) -> PoseTokenizerModel:
    """A model of the variant after three steps of training, every parameter perturbed. Shared: do not change it."""
    config = small_config(variant)
    model = train_model(config, seed=0, steps=3, batch=8, frames=24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        # Codes and scales were fitted to few latents, and to those of before: k-means makes equal codes of so few, and
        # scales would be far too small. Rounding would choose between codes.
        quantizer = model.quantizer
        if config.quantizer == "rvq":
            quantizer.codebook[:, 1:] += 0.1 * torch.randn_like(quantizer.codebook[:, 1:])
        quantizer.gain.past.uniform_(0.0, 0.1)
        quantizer.gain.past[:, -1].uniform_(0.5, 1.5)
        quantizer.gain.largest.fill_(2.0)
        quantizer.gain.key.uniform_(0.5, 1.5)
        quantizer.gain.factor.uniform_(0.5, 1.0)
    return model.eval()


def differing(codes: torch.Tensor, others: torch.Tensor) -> float:
    """Share of codes that differ."""
    assert codes.shape == others.shape
    return (codes != others).float().mean().item()
