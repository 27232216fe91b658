"""Pose tokenizer: a neural codec for human pose sequences, above all signing.

What travels with a checkpoint needs torch and transformers alone and is imported at once; data, metrics and the rest
need the `train` extra and are imported when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from .codes_pose_tokenizer import PoseCodeFormatter
from .configuration_pose_tokenizer import PoseTokenizerConfig
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .loss_pose_tokenizer import PoseTokenizerLoss
from .modeling_pose_tokenizer import (
    PoseTokenizerDecoderOutput,
    PoseTokenizerEncoderOutput,
    PoseTokenizerModel,
    PoseTokenizerOutput,
    PoseTokenizerPreTrainedModel,
)
from .skeleton_pose_tokenizer import SKELETONS, Skeleton, build_skeleton, get_skeleton
from .streaming_pose_tokenizer import PoseTokenizerStream

if TYPE_CHECKING:
    from .augmentation import PoseAugmentation
    from .dataset import PoseDataset
    from .metrics import ReconstructionMetrics

_ON_DEMAND = {"PoseAugmentation": "augmentation", "PoseDataset": "dataset", "ReconstructionMetrics": "metrics"}

AutoConfig.register(PoseTokenizerConfig.model_type, PoseTokenizerConfig)
AutoModel.register(PoseTokenizerConfig, PoseTokenizerModel)
AutoFeatureExtractor.register(PoseTokenizerConfig, PoseFeatureExtractor)


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        return getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "SKELETONS",
    "PoseAugmentation",
    "PoseCodeFormatter",
    "PoseDataset",
    "PoseFeatureExtractor",
    "PoseTokenizerConfig",
    "PoseTokenizerDecoderOutput",
    "PoseTokenizerEncoderOutput",
    "PoseTokenizerLoss",
    "PoseTokenizerModel",
    "PoseTokenizerOutput",
    "PoseTokenizerPreTrainedModel",
    "PoseTokenizerStream",
    "ReconstructionMetrics",
    "Skeleton",
    "build_skeleton",
    "get_skeleton",
]
