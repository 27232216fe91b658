"""Configuration of the pose tokenizer: the skeleton, the codec's sizes, and the rates that follow from them."""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .skeleton_pose_tokenizer import Skeleton, build_skeleton, get_skeleton, likely_layout

# Finite scalar quantization: values per latent dimension for the usual codebook sizes (arXiv 2309.15505, section 4.1,
# with powers of two so that a code's bits are whole).
FSQ_LEVELS = {
    64: (8, 8),
    128: (8, 4, 4),
    256: (8, 8, 4),
    512: (8, 8, 8),
    1024: (8, 8, 4, 4),
    2048: (8, 8, 8, 4),
    4096: (8, 8, 8, 8),
    8192: (8, 8, 8, 4, 4),
    16384: (8, 8, 8, 8, 4),
    65536: (8, 8, 8, 8, 4, 4),
}


@strict
class PoseTokenizerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PoseTokenizerModel`]. Letters: T frames, N keypoints, D values per keypoint, G token groups,
    L residual levels, Q codebooks, S code steps.

    Args:
        skeleton (`str`, *optional*, defaults to `"coco_wholebody_133"`):
            A named layout (see `skeleton_pose_tokenizer.SKELETONS`), or `None` for a custom one given by
            `keypoint_names`, `edges`, `parts`, `flip_pairs` and `scale_pair`.
        keypoint_names (`list[str]`, *optional*): The N names of a custom skeleton.
        edges (`list[list[int]]`, *optional*): Its bones as (parent, child), outward from the root.
        parts (`dict`, *optional*):
            Its token groups: `{group: [keypoints]}` or `{group: {part node: [keypoints]}}`. Without it the graph is
            clustered into part nodes of one group.
        flip_pairs (`list[list[int]]`, *optional*): Its (left, right) keypoints.
        scale_pair (`list[int]`, *optional*): The two keypoints whose distance is the unit of length (shoulders).
        num_keypoints (`int`, *optional*): N; follows from the skeleton, and must agree with it where given.
        keypoint_dim (`int`, *optional*, defaults to 3): D, coordinates and the confidence last: 3 or 4.
        sampling_rate (`float`, *optional*, defaults to 25.0): Frames per second of the input.
        hidden_size (`int`, *optional*, defaults to 128): Channels C of a part node. Alias: `hidden_dim`.
        joint_hidden_size (`int`, *optional*, defaults to 32): Channels of a keypoint.
        num_joint_layers (`int`, *optional*, defaults to 0): ST-GCN blocks of the decoder on the keypoint graph.
        num_part_layers (`int`, *optional*, defaults to 3):
            ST-GCN blocks of the decoder on the part graph. Alias: `num_hidden_layers`.
        num_encoder_layers (`int`, *optional*, defaults to 0):
            ST-GCN blocks of the encoder on the part graph, with `num_joint_layers` before them; 0 leaves it linear,
            which lost less in trials of some hundred steps (benchmarks/README.md).
        kernel_size (`int`, *optional*, defaults to 5): Code steps that a temporal convolution sees; odd.
        downsampling_ratio (`int`, *optional*, defaults to 4): Frames per code step (`hop_length`).
        token_groups (`str`, *optional*, defaults to `"parts"`):
            `"parts"`: each group of the skeleton has its own quantizer; `"whole"`: one quantizer for all.
        num_quantizers (`int` or `list[int]`, *optional*, defaults to 4):
            Residual levels, of every group or one number per group in the order of `group_names`.
        codebook_size (`int`, *optional*, defaults to 1024): Codes per codebook K.
        codebook_dim (`int`, *optional*, defaults to 32): Dimensions of a group's latent.
        quantizer (`str`, *optional*, defaults to `"rvq"`): `"rvq"` (arXiv 2107.03312) or `"fsq"` (arXiv 2309.15505).
        quantizer_dropout (`float`, *optional*, defaults to 0.5):
            Probability that a training sequence keeps a random prefix of the levels only.
        key_interval (`int`, *optional*, defaults to 32):
            Every so many code steps one is coded without prediction from the step before, so that a stream can be
            entered there and no wrong code spreads further; 1 turns prediction in time off, 0 has only the first.
        beam_size (`int`, *optional*, defaults to 1):
            Paths of codes that encoding goes on with from level to level; 1 takes the nearest code at each. More lower
            the error at the same bits and take longer. Fewer levels are then no prefix of the codes of all of them.
        ema_decay (`float`, *optional*, defaults to 0.99): Decay of the codebooks' running means.
        threshold_usage_ratio (`float`, *optional*, defaults to 0.1):
            A code used less than this share of uniform use is dead and is replaced.
        use_causal_conv (`bool`, *optional*, defaults to `False`): See only the past, as streaming needs.
        confidence_threshold (`float`, *optional*, defaults to 0.3): A keypoint below it is missing.
        reconstruction_weight, hand_weight, temporal_weight, perceptual_weight, confidence_weight, quantization_weight:
            Loss weights: position, the factor of hand keypoints in it, velocity and acceleration, bone vectors,
            confidence, commitment.

    Raises:
        ValueError: an impossible value; the message names the key, what was found and what is possible.

    Example:

    ```python
    >>> from modeling_pose_tokenizer import PoseTokenizerConfig

    >>> config = PoseTokenizerConfig(num_quantizers=[3, 1, 2, 2])
    >>> config.num_codebooks, config.bits_per_frame
    (8, 20.0)
    ```"""

    model_type = "pose_tokenizer"
    attribute_map = {"hidden_dim": "hidden_size", "num_hidden_layers": "num_part_layers"}

    skeleton: str | None = "coco_wholebody_133"
    keypoint_names: list | tuple | None = None
    edges: list | tuple | None = None
    parts: dict | None = None
    flip_pairs: list | tuple | None = None
    scale_pair: list | tuple | None = None
    num_keypoints: int | None = None
    keypoint_dim: int = 3
    sampling_rate: int | float = 25.0
    hidden_size: int = 128
    joint_hidden_size: int = 32
    num_joint_layers: int = 0
    num_part_layers: int = 3
    num_encoder_layers: int = 0
    kernel_size: int = 5
    downsampling_ratio: int = 4
    token_groups: str = "parts"
    num_quantizers: int | list[int] | tuple[int, ...] = 4
    codebook_size: int = 1024
    codebook_dim: int = 32
    quantizer: str = "rvq"
    quantizer_dropout: int | float = 0.5
    key_interval: int = 32
    beam_size: int = 1
    ema_decay: int | float = 0.99
    threshold_usage_ratio: int | float = 0.1
    use_causal_conv: bool = False
    confidence_threshold: int | float = 0.3
    reconstruction_weight: int | float = 1.0
    hand_weight: int | float = 5.0
    temporal_weight: int | float = 0.5
    perceptual_weight: int | float = 0.5
    confidence_weight: int | float = 0.05
    quantization_weight: int | float = 0.25

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_keypoints = self.layout.num_keypoints if self.num_keypoints is None else self.num_keypoints
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses what cannot be built, naming the key."""
        layout = self.layout
        if self.num_keypoints != layout.num_keypoints:
            raise ValueError(
                f"num_keypoints is {self.num_keypoints}, but the skeleton {self.skeleton or 'given'} has "
                f"{layout.num_keypoints} keypoints{likely_layout(self.num_keypoints or 0)}; name the skeleton of your "
                "data or leave num_keypoints out."
            )
        if self.keypoint_dim not in (3, 4):
            raise ValueError(
                f"keypoint_dim is {self.keypoint_dim}; expected 3 (x, y, confidence) or 4 (x, y, z, confidence)."
            )
        choices = {"token_groups": ("parts", "whole"), "quantizer": ("rvq", "fsq")}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}; expected one of {', '.join(allowed)}.")
        at_least = {"hidden_size": 1, "joint_hidden_size": 1, "num_joint_layers": 0, "num_part_layers": 0}
        at_least |= {"key_interval": 0, "num_encoder_layers": 0}
        at_least |= {"beam_size": 1, "downsampling_ratio": 1, "codebook_size": 2, "codebook_dim": 1, "kernel_size": 1}
        for key, least in at_least.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} is {getattr(self, key)}; expected at least {least}.")
        # A configuration from elsewhere must not take all memory.
        at_most = {"hidden_size": 2**14, "joint_hidden_size": 2**14, "codebook_dim": 2**14, "codebook_size": 2**20}
        at_most |= {"num_joint_layers": 256, "num_part_layers": 256, "num_encoder_layers": 256}
        at_most |= {"beam_size": 256, "kernel_size": 1025, "downsampling_ratio": 1024}
        for key, most in at_most.items():
            if getattr(self, key) > most:
                raise ValueError(f"{key} is {getattr(self, key)}; expected at most {most}.")
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size is {self.kernel_size}; expected an odd number, so that a step has a centre."
            )
        if not self.sampling_rate > 0:
            raise ValueError(f"sampling_rate is {self.sampling_rate}; expected frames per second above 0.")
        for key in ("quantizer_dropout", "ema_decay", "threshold_usage_ratio", "confidence_threshold"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} is {getattr(self, key)}; expected a number from 0 to 1.")
        if isinstance(self.num_quantizers, (list, tuple)) and len(self.num_quantizers) != len(self.group_names):
            raise ValueError(
                f"num_quantizers has {len(self.num_quantizers)} entries; expected one per token group "
                f"({', '.join(self.group_names)}), or a single number for all."
            )
        levels = [self.num_quantizers] if isinstance(self.num_quantizers, int) else self.num_quantizers
        if max(levels) > 64:
            raise ValueError(f"num_quantizers is {self.num_quantizers}; expected at most 64 levels.")
        if min(self.levels_per_group) < 1:
            raise ValueError(f"num_quantizers is {self.num_quantizers}; expected at least one level for every group.")
        if self.quantizer == "fsq" and self.codebook_size not in FSQ_LEVELS:
            raise ValueError(
                f"codebook_size is {self.codebook_size}; quantizer 'fsq' knows {', '.join(map(str, FSQ_LEVELS))}."
            )

    @property
    def layout(self) -> Skeleton:
        """The skeleton's table: names, edges, part nodes, token groups, mirror pairs."""
        custom = (self.keypoint_names, self.edges, self.parts, self.flip_pairs, self.scale_pair)
        if self.skeleton is not None:
            if any(value is not None for value in custom):
                raise ValueError(
                    f"skeleton is {self.skeleton!r} and a custom skeleton is given too; "
                    "expected skeleton: null with keypoint_names and edges, or the name alone."
                )
            return get_skeleton(self.skeleton)
        if self.edges is None or (self.keypoint_names is None and self.num_keypoints is None):
            raise ValueError(
                "skeleton is null and no custom skeleton is given; expected keypoint_names and edges, or a name."
            )
        names = self.keypoint_names or [f"keypoint_{index}" for index in range(self.num_keypoints or 0)]
        return build_skeleton(names, self.edges, self.parts, self.flip_pairs or (), self.scale_pair)

    @property
    def keypoint_weights(self) -> torch.Tensor:
        """Weight of each keypoint's error `(N,)`: `hand_weight` for those of the hands, 1 for the others."""
        weights = torch.ones(self.layout.num_keypoints)
        for group, keypoints in self.layout.group_keypoints.items():
            if group.endswith("hand"):
                weights[list(keypoints)] = float(self.hand_weight)
        return weights

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the G token groups, in the order of `num_quantizers`."""
        return ("whole",) if self.token_groups == "whole" else tuple(self.layout.groups)

    @property
    def levels_per_group(self) -> tuple[int, ...]:
        """Residual levels of each of the G groups."""
        if isinstance(self.num_quantizers, int):
            return (self.num_quantizers,) * len(self.group_names)
        return tuple(self.num_quantizers)

    @property
    def num_levels(self) -> int:
        """L, the levels of the group that has most."""
        return max(self.levels_per_group)

    @property
    def codebook_index(self) -> tuple[tuple[str, int], ...]:
        """(group, level) of each of the Q codebooks, level-major: the first ones are a prefix of levels."""
        return tuple(
            (group, level)
            for level in range(self.num_levels)
            for group, levels in zip(self.group_names, self.levels_per_group, strict=True)
            if level < levels
        )

    @property
    def num_codebooks(self) -> int:
        """Q, the tokens of one code step."""
        return sum(self.levels_per_group)

    @property
    def fsq_levels(self) -> tuple[int, ...]:
        """Values per dimension of a code under `quantizer="fsq"`; their product is `codebook_size`."""
        return FSQ_LEVELS[self.codebook_size]

    @property
    def hop_length(self) -> int:
        """Frames per code step."""
        return self.downsampling_ratio

    @property
    def frame_rate(self) -> float:
        """Code steps per second."""
        return self.sampling_rate / self.hop_length

    @property
    def token_rate(self) -> float:
        """Tokens per second, all codebooks together."""
        return self.frame_rate * self.num_codebooks

    @property
    def bits_per_frame(self) -> float:
        """Bits per input frame at the fixed rate (log2 K bits per token)."""
        return self.num_codebooks * math.log2(self.codebook_size) / self.hop_length

    @property
    def bitrate(self) -> float:
        """Bits per second at the fixed rate."""
        return self.bits_per_frame * self.sampling_rate

    def skeleton_fields(self) -> dict:
        """The keys that describe the skeleton, as the feature extractor takes them too."""
        keys = ("skeleton", "keypoint_names", "edges", "parts", "flip_pairs", "scale_pair", "keypoint_dim")
        return {key: getattr(self, key) for key in keys}

    def to_dict(self) -> dict:
        output = super().to_dict()
        # A class name with "Tokenizer" in it makes `custom_object_save` write (slow, fast) pairs, which AutoModel
        # cannot read back.
        for key, value in (output.get("auto_map") or {}).items():
            if isinstance(value, (list, tuple)):
                output["auto_map"][key] = next(entry for entry in value if entry is not None)
        return output


__all__ = ["PoseTokenizerConfig"]

PoseTokenizerConfig.register_for_auto_class()
