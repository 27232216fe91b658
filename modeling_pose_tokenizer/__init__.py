"""Pose tokenizer: a neural codec for human pose sequences, above all signing.

Names are imported when first asked for, so that `modeling_pose_tokenizer.runtime` runs an exported model where neither
torch nor transformers is installed. Whatever imports the model makes it known to AutoConfig, AutoModel and
AutoFeatureExtractor. Data, metrics and the rest need the `train` extra.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .augmentation import PoseAugmentation
    from .codes_pose_tokenizer import PoseCodeFormatter
    from .configuration_pose_tokenizer import PoseTokenizerConfig
    from .dataset import PoseDataset
    from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
    from .loss_pose_tokenizer import PoseTokenizerLoss
    from .metrics import ReconstructionMetrics
    from .modeling_pose_tokenizer import (
        PoseTokenizerDecoderOutput,
        PoseTokenizerEncoderOutput,
        PoseTokenizerModel,
        PoseTokenizerOutput,
        PoseTokenizerPreTrainedModel,
    )
    from .runtime import PoseRuntime, PoseRuntimeStream
    from .skeleton_pose_tokenizer import SKELETONS, Skeleton, build_skeleton, get_skeleton
    from .streaming_pose_tokenizer import PoseTokenizerStream

_MODEL = "modeling_pose_tokenizer"
_HOMES = {
    "PoseAugmentation": "augmentation",
    "PoseCodeFormatter": "codes_pose_tokenizer",
    "PoseDataset": "dataset",
    "PoseFeatureExtractor": "feature_extraction_pose_tokenizer",
    "PoseRuntime": "runtime",
    "PoseRuntimeStream": "runtime",
    "PoseTokenizerConfig": "configuration_pose_tokenizer",
    "PoseTokenizerDecoderOutput": _MODEL,
    "PoseTokenizerEncoderOutput": _MODEL,
    "PoseTokenizerLoss": "loss_pose_tokenizer",
    "PoseTokenizerModel": _MODEL,
    "PoseTokenizerOutput": _MODEL,
    "PoseTokenizerPreTrainedModel": _MODEL,
    "PoseTokenizerStream": "streaming_pose_tokenizer",
    "ReconstructionMetrics": "metrics",
    "SKELETONS": "skeleton_pose_tokenizer",
    "Skeleton": "skeleton_pose_tokenizer",
    "build_skeleton": "skeleton_pose_tokenizer",
    "get_skeleton": "skeleton_pose_tokenizer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] != "runtime":
        import_module(f".{_MODEL}", __name__)  # registers the Auto classes, whichever name comes first
    globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "SKELETONS",
    "PoseAugmentation",
    "PoseCodeFormatter",
    "PoseDataset",
    "PoseFeatureExtractor",
    "PoseRuntime",
    "PoseRuntimeStream",
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
