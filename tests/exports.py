"""Small models for the tests of export: fitted to motion, so that codes and predictions mean something, and stable
over long sequences, so that differences do."""

from functools import cache
from typing import Any

import torch

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerConfig, PoseTokenizerModel
from modeling_pose_tokenizer.export import sample_poses
from models import CUSTOM

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "joint_hidden_size": 8,
    "num_part_layers": 1,
    "codebook_size": 64,
    "codebook_dim": 8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "parts": {**CUSTOM, "num_quantizers": [2, 1]},
    "whole": {"skeleton": "coco_17", "token_groups": "whole", "num_quantizers": 2, "downsampling_ratio": 3},
    "fsq": {**CUSTOM, "quantizer": "fsq", "num_quantizers": [1, 2], "key_interval": 0},
    "causal": {
        **CUSTOM,
        "use_causal_conv": True,
        "num_encoder_layers": 1,
        "num_quantizers": [2, 1],
        "downsampling_ratio": 2,
        "key_interval": 5,
    },
}


def fitted_model(config: PoseTokenizerConfig, mean: list[list[float]]) -> PoseTokenizerModel:
    """A model whose codebooks and predictions fit motion, the network's layers perturbed: zeros hide bugs."""
    torch.manual_seed(0)
    model = PoseTokenizerModel(config).eval()
    poses, mask = sample_poses(model, mean, [64] * 8, seed=7)
    model.initialize_from_data([{"input_values": poses, "padding_mask": mask}])
    with torch.no_grad():
        if config.quantizer == "rvq":  # of so little data k-means makes equal codes, and either is as near
            codes = model.quantizer.codebook[:, 1:]
            codes += 0.02 * torch.randn_like(codes)
        for name, parameter in model.named_parameters():
            if not name.startswith("quantizer") and "linear_path" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@cache
def export_model_of(variant: str) -> tuple[PoseTokenizerModel, PoseFeatureExtractor]:
    """Model and feature extractor of a variant. Shared: do not change them."""
    config = PoseTokenizerConfig(**{**SIZES, **VARIANTS[variant]})
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(config.layout.num_keypoints, config.keypoint_dim - 1, generator=generator).tolist()
    return fitted_model(config, mean), PoseFeatureExtractor.from_config(config, mean=mean)
