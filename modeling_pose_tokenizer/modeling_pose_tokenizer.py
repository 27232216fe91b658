"""The pose tokenizer: a linear or ST-GCN encoder, predictive residual quantizers per token group, ST-GCN decoder.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last), F features per keypoint and frame,
C channels, P part nodes, V nodes of whichever graph, G token groups, S code steps, h frames per step (`hop_length`),
Q codebooks, M = B S.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_pose_tokenizer import PoseTokenizerConfig
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .graph_pose_tokenizer import CodecGraph, PoseTokenizerPaddingCache, hold, last_seen, mask_steps
from .loss_pose_tokenizer import LossInputs, PoseTokenizerLoss
from .network_pose_tokenizer import PoseTokenizerDecoder, PoseTokenizerEncoder
from .quantization_pose_tokenizer import QUANTIZERS, broadcast_module
from .residual_pose_tokenizer import ResidualQuantizer
from .saving_pose_tokenizer import PoseTokenizerSavingMixin
from .skeleton_pose_tokenizer import likely_layout

if TYPE_CHECKING:  # transformers finds imports by text: so these travel with every copy of the code
    from .codes_pose_tokenizer import PoseCodeFormatter  # noqa: F401
    from .streaming_pose_tokenizer import PoseTokenizerStream  # noqa: F401

_Length = TypeVar("_Length", int, torch.Tensor)
# Code steps the codebooks are fitted to at first: more change little, and the distances have to fit in memory.
MAX_INITIAL_STEPS = 32768
# Halvings of the range in which the price of a bit is looked for, seven decades: to 0.1 %.
PRICE_STEPS = 14


@dataclass
class PoseTokenizerEncoderOutput(ModelOutput):
    """
    Args:
        pose_codes (`torch.LongTensor` of shape `(B, Q, S)`): Codes, level-major; 0 at steps that are padding.
        padding_cache (`PoseTokenizerPaddingCache`, *optional*): What the next streamed piece needs of this one.
    """

    pose_codes: torch.Tensor | None = None
    padding_cache: "PoseTokenizerPaddingCache | None" = None


@dataclass
class PoseTokenizerDecoderOutput(ModelOutput):
    """
    Args:
        pose_values (`torch.FloatTensor` of shape `(B, T, N, D)`): Poses; the last value is the confidence, 0 to 1.
        padding_cache (`PoseTokenizerPaddingCache`, *optional*): What the next streamed piece needs of this one.
    """

    pose_values: torch.Tensor | None = None
    padding_cache: "PoseTokenizerPaddingCache | None" = None


@dataclass
class PoseTokenizerOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*, in training mode): The weighted sum of `losses`.
        pose_values (`torch.FloatTensor` of shape `(B, T, N, D)`): Reconstruction, as long as the input.
        pose_codes (`torch.LongTensor` of shape `(B, Q, S)`): Codes, level-major.
        losses (`dict[str, torch.FloatTensor]`, *optional*, in training mode): The terms, unweighted.
        quantization_error (`torch.FloatTensor`, *optional*): Mean squared distance of latents to quantized latents.
    """

    loss: torch.Tensor | None = None
    pose_values: torch.Tensor | None = None
    pose_codes: torch.Tensor | None = None
    losses: dict | None = None
    quantization_error: torch.Tensor | None = None


class PoseTokenizerPreTrainedModel(PoseTokenizerSavingMixin, PreTrainedModel):
    config: PoseTokenizerConfig
    config_class = PoseTokenizerConfig
    base_model_prefix = "pose_tokenizer"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PoseTokenizerBlock"]
    _keep_in_fp32_modules_strict = ["quantizer"]

    def get_input_embeddings(self) -> None:
        """A codec of poses has no token embeddings; sharding asks."""

    def get_output_embeddings(self) -> None:
        """Nor a language model's head."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, std=getattr(module, "gain", 1.0) * module.weight[0].numel() ** -0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, PoseTokenizerModel):
            init.zeros_(module.missing_pose)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if hasattr(module, "constants"):  # non-persistent buffers of models built on the meta device
            for name, value in module.constants().items():
                init.copy_(getattr(module, name), value)


class PoseTokenizerModel(PoseTokenizerPreTrainedModel):
    """A neural codec for pose sequences: poses to a few codes per step, and codes back to poses.

    `input_values` are normalised poses (shoulder widths), as `PoseFeatureExtractor` makes them: `(B, T, N, D)` with
    the confidence last. A keypoint is missing where its confidence is below `confidence_threshold` or a value is NaN
    or infinite. `padding_mask` `(B, T)` is 1 for real frames: what follows the last of them is padding, and a 0 before
    it a frame without keypoints.

    Example:

    ```python
    >>> import torch
    >>> from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerModel

    >>> model = PoseTokenizerModel(PoseTokenizerConfig()).eval()
    >>> codes = model.encode(torch.rand(1, 50, 133, 3)).pose_codes
    >>> codes.shape, model.decode(codes).pose_values.shape
    (torch.Size([1, 16, 13]), torch.Size([1, 52, 133, 3]))
    ```"""

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__(config)
        start = torch.zeros(config.layout.num_keypoints, config.keypoint_dim - 1)
        self.missing_pose = nn.Parameter(start, requires_grad=False)
        anchors = CodecGraph.from_config(config).anchors
        self.num_free = next((place for place, anchor in enumerate(anchors) if anchor >= 0), len(anchors))
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)
        self.encoder = PoseTokenizerEncoder(config)
        self.quantizer: ResidualQuantizer = QUANTIZERS[config.quantizer](config)
        self.decoder = PoseTokenizerDecoder(config)
        self.loss_function = PoseTokenizerLoss(config)  # type: ignore[misc]
        self.post_init()

    def constants(self) -> dict[str, torch.Tensor]:
        """From the layout's order of keypoints to the network's (part by part), back, and anchors: all `(N,)`."""
        graph = CodecGraph.from_config(self.config)
        order = torch.tensor(graph.order)
        return {"keypoint_order": order, "keypoint_place": order.argsort(), "anchors": torch.tensor(graph.anchors)}

    @property
    def loss_function(self) -> nn.Module:  # type: ignore[misc]
        """The training loss, a module with `forward(LossInputs) -> dict` and `total(dict) -> scalar`.

        Assign another such module to replace it; nn.Module registers it, so no setter is needed.
        """
        return self._modules["loss_function"]

    def get_encoded_length(self, input_length: _Length) -> _Length:
        """Code steps S of T frames: ceil(T / hop_length)."""
        return (input_length + self.config.hop_length - 1) // self.config.hop_length

    def get_pose_codes_mask(self, padding_mask: torch.Tensor) -> torch.Tensor:
        """Which code steps `(B, S)` are real, from which frames `(B, T)` are: those up to the last real frame."""
        frames = torch.arange(1, padding_mask.shape[1] + 1, device=padding_mask.device)
        lengths = torch.where(padding_mask.bool(), frames, 0).amax(1)
        steps = torch.arange(self.get_encoded_length(padding_mask.shape[1]), device=padding_mask.device)
        return steps < self.get_encoded_length(lengths)[:, None]

    def encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        num_quantizers: int | None = None,
        padding_cache: PoseTokenizerPaddingCache | None = None,
        use_streaming: bool | None = None,
        return_dict: bool | None = None,
        target_bits_per_frame: float | None = None,
    ) -> PoseTokenizerEncoderOutput:
        """Poses to codes.

        Args:
            input_values (`torch.Tensor` of shape `(B, T, N, D)`): Normalised poses.
            padding_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real frames.
            num_quantizers (`int`, *optional*): Residual levels to use; all of them by default.
            padding_cache (`PoseTokenizerPaddingCache`, *optional*): That of the piece before, in a stream.
            use_streaming (`bool`, *optional*):
                Whether this is a piece of a stream, T a multiple of `hop_length`; needs `use_causal_conv`. True by
                default where a `padding_cache` is given. You are responsible for buffering, or `PoseTokenizerStream`.
            return_dict (`bool`, *optional*): Whether to return a [`~utils.ModelOutput`] instead of a tuple.
            target_bits_per_frame (`float`, *optional*):
                Spend at most so many bits per frame on each sequence, levels where they gain most, instead of all
                levels everywhere. What is not said has code 0, and `decode` reads the codes as any others;
                `get_spent_bits` counts them. Needs the whole sequence and `quantizer: "rvq"`. Where not every level
                can be paid, the nearest codes are taken, whatever `beam_size`.

        Returns:
            [`PoseTokenizerEncoderOutput`] with `pose_codes` of shape `(B, Q, S)`.

        Raises:
            ValueError: another N or D than the configuration's, too many levels, a stream that cannot be, or a rate
                that cannot be reached.
        """
        use_streaming = padding_cache is not None if use_streaming is None else use_streaming
        self._check_target(target_bits_per_frame, use_streaming)
        if use_streaming:
            self._check_stream(input_values.shape[1])
            num_layers = self.config.num_joint_layers + self.config.num_encoder_layers
            padding_cache = padding_cache or PoseTokenizerPaddingCache(num_layers)
        cache = padding_cache if use_streaming else None
        step_mask = self._step_mask(input_values, padding_mask)
        values, observed = self._clean(input_values, padding_mask)
        latents = self.encoder(self._complete(values, observed, cache), step_mask, cache)
        if cache is not None and cache.quantizer is None:
            cache.quantizer = self.quantizer.new_state(len(latents), latents.device)
        seen, state = self._seen(observed), None if cache is None else cache.quantizer
        codes = self.quantizer.encode(latents, step_mask, seen, num_quantizers, state, beam_size=self.config.beam_size)
        if target_bits_per_frame is not None:
            codes = self._spend(codes, target_bits_per_frame, latents, step_mask, seen, num_quantizers)
        return self._result(PoseTokenizerEncoderOutput(codes, padding_cache), return_dict)

    def get_spent_bits(self, pose_codes: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Bits per frame `(B,)` that codes `(B, Q, S)` need where each group says in each step how many levels follow:
        log2(levels + 1), and log2(K) for each level up to the last that is not 0."""
        config, batch, steps = self.config, len(pose_codes), pose_codes.shape[2]
        valid = torch.ones(batch, steps, dtype=torch.bool, device=pose_codes.device)
        if padding_mask is not None:
            valid = self.get_pose_codes_mask(padding_mask)
        bits = torch.zeros(batch, steps, device=pose_codes.device)
        for group, levels in zip(config.group_names, config.levels_per_group, strict=True):
            rows = [row for row, (owner, _) in enumerate(config.codebook_index) if owner == group]
            said = pose_codes[:, [row for row in rows if row < pose_codes.shape[1]]] != 0  # (B, l, S)
            depth = torch.arange(1, said.shape[1] + 1, device=said.device)[:, None]
            bits += math.log2(levels + 1) + torch.where(said, depth, 0).amax(1) * math.log2(config.codebook_size)
        return (bits * valid).sum(1) / (valid.sum(1).clamp(min=1) * config.hop_length)

    def _spend(
        self,
        codes: torch.Tensor,
        target: float,
        latents: torch.Tensor,
        step_mask: torch.Tensor,
        seen: torch.Tensor,
        num_quantizers: int | None,
    ) -> torch.Tensor:
        """Codes `(B, Q, S)` of at most `target` bits per frame: each sequence pays the same price for each bit,
        wherever it is spent, and that price is found by bisection (Shoham and Gersho, "Efficient bit allocation for an
        arbitrary set of quantizers", IEEE Transactions on Acoustics, Speech, and Signal Processing 36(9), 1988).

        `codes` are those that cost nothing. What a code gains is the squared error of poses, weighted as in the loss.
        """
        frames = step_mask.repeat_interleave(self.config.hop_length, 1)
        gain = self.decoder.group_gain(self.config.keypoint_weights[self.keypoint_order.cpu()])  # (G,)
        energy = latents.float().square().sum(-1) @ gain  # (B, S)
        high = torch.where(step_mask, energy, 0.0).amax(1).clamp(min=1e-9) / math.log2(self.config.codebook_size)
        low, best = high * 1e-7, codes
        fits = self.get_spent_bits(codes, frames) <= target
        best = torch.where(fits[:, None, None], codes, 0)
        for _ in range(PRICE_STEPS):
            middle = (low * high).sqrt()
            price = middle * math.log2(self.config.codebook_size) / gain[:, None]  # (G, B)
            found = self.quantizer.encode(latents, step_mask, seen, num_quantizers, price=price)
            enough = self.get_spent_bits(found, frames) <= target
            best = torch.where((enough & ~fits)[:, None, None], found, best)
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return best

    def decode(
        self,
        pose_codes: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        padding_cache: PoseTokenizerPaddingCache | None = None,
        use_streaming: bool | None = None,
        num_quantizers: int | None = None,
    ) -> PoseTokenizerDecoderOutput:
        """Codes to poses: the inverse of `encode`, up to what quantization loses.

        Args:
            pose_codes (`torch.LongTensor` of shape `(B, Q, S)`): Codes of all levels, or of the first levels.
            padding_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 for real frames, as given to `encode`; the result then has its T frames instead of S * hop_length.
            return_dict (`bool`, *optional*): Whether to return a [`~utils.ModelOutput`] instead of a tuple.
            padding_cache (`PoseTokenizerPaddingCache`, *optional*): That of the piece before, in a stream.
            use_streaming (`bool`, *optional*):
                Whether these are the next steps of a stream; needs `use_causal_conv`. True by default where a
                `padding_cache` is given.
            num_quantizers (`int`, *optional*): Levels to read; all that are there by default.

        Returns:
            [`PoseTokenizerDecoderOutput`] with `pose_values` of shape `(B, T, N, D)`, in shoulder widths.

        Raises:
            ValueError: codes of another shape than this model's, a code outside 0..K-1, or a stream that cannot be.
        """
        self._check_codes(pose_codes, padding_mask)
        if num_quantizers is not None:
            pose_codes = pose_codes[:, : self.quantizer.count_codebooks(num_quantizers)]
        use_streaming = padding_cache is not None if use_streaming is None else use_streaming
        if use_streaming:
            self._check_stream()
            # The decoder's blocks, and the two convolutions of its refinement.
            num_layers = self.config.num_part_layers + self.config.num_joint_layers + 2
            padding_cache = padding_cache or PoseTokenizerPaddingCache(num_layers)
            if padding_cache.quantizer is None:
                padding_cache.quantizer = self.quantizer.new_state(len(pose_codes), pose_codes.device)
        cache = padding_cache if use_streaming else None
        latents = self.quantizer.decode(pose_codes, None if cache is None else cache.quantizer)
        values = self._decode_latents(latents, padding_mask, cache)
        return self._result(PoseTokenizerDecoderOutput(values, padding_cache), return_dict)

    def forward(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        num_quantizers: int | None = None,
        pose_codes: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> PoseTokenizerOutput:
        """Encode, quantize and decode; in training mode also learn the codebooks and compute the loss.

        Args:
            input_values (`torch.Tensor` of shape `(B, T, N, D)`): Normalised poses.
            padding_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real frames.
            num_quantizers (`int`, *optional*): Residual levels; all by default (in training, quantizer dropout).
            pose_codes (`torch.LongTensor` of shape `(B, Q, S)`, *optional*): Decode these instead of encoding.
            return_dict (`bool`, *optional*): Whether to return a [`~utils.ModelOutput`] instead of a tuple.

        Returns:
            [`PoseTokenizerOutput`]; `loss` and `losses` only in training mode.
        """
        frames = input_values.shape[1]
        mask = input_values.new_ones(input_values.shape[:2]) if padding_mask is None else padding_mask
        if pose_codes is not None:
            self._check_codes(pose_codes, mask)
            values = self._decode_latents(self.quantizer.decode(pose_codes), mask)
            return self._result(PoseTokenizerOutput(pose_values=values, pose_codes=pose_codes), return_dict)
        if self.training and not torch.compiler.is_compiling() and not self.quantizer.initialized:
            self.initialize_from_data([{"input_values": input_values, "padding_mask": mask}])
        values, observed = self._clean(input_values, padding_mask)
        step_mask = self._step_mask(input_values, padding_mask)
        latents = self.encoder(self._complete(values, observed), step_mask)
        quantized = self.quantizer(latents, step_mask, self._seen(observed), num_quantizers, self.config.beam_size)
        pose_values = self._decode_latents(quantized.quantized, mask)
        losses = None
        if self.training:
            with torch.autocast(pose_values.device.type, enabled=False):
                losses = self.loss_function(
                    LossInputs(
                        prediction=pose_values.float(),
                        target=input_values.float(),
                        valid=observed[:, :frames],
                        frames=mask.bool(),
                        commitment=quantized.commitment_loss,
                    )
                )
        output = PoseTokenizerOutput(
            loss=None if losses is None else self.loss_function.total(losses),
            pose_values=pose_values,
            pose_codes=quantized.codes,
            losses=losses,
            quantization_error=quantized.quantization_error,
        )
        return self._result(output, return_dict)

    def reconstruct_without_quantizer(self, input_values: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """What the codec loses besides the codes: `(B, T, N, D)` decoded from the latents as they are."""
        step_mask = self._step_mask(input_values, padding_mask)
        latents = self.encoder(self._complete(*self._clean(input_values, padding_mask)), step_mask)
        return self._decode_latents(latents, padding_mask)

    @torch.no_grad()
    def initialize_from_data(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Fit the linear path by PCA and the codebooks by k-means, before training.

        Args:
            batches: Dictionaries with `input_values` `(B, T, N, D)` and `padding_mask` `(B, T)`. Under several ranks
                those of rank 0 count, and all ranks must call.

        Raises:
            ValueError: the batches hold no real frame.
        """
        hop, device = self.config.hop_length, self.missing_pose.device
        cleaned, masks = [], []
        for batch in batches:
            mask = batch["padding_mask"].to(device)
            values, observed = self._clean(batch["input_values"].to(device), mask)
            if mask.any():
                cleaned.append((values, observed))
                masks.append(self.get_pose_codes_mask(mask))
        if not cleaned:
            raise ValueError(
                "initialize_from_data got no real frame; expected batches whose padding_mask is not all 0."
            )
        steps = max(mask.shape[1] for mask in masks)  # batches may differ in length
        values, observed = (
            torch.cat([F.pad(x, (0, 0) * (x.ndim - 2) + (0, steps * hop - x.shape[1])) for x in each])
            for each in zip(*cleaned, strict=True)
        )
        step_mask = torch.cat([F.pad(mask, (0, steps - mask.shape[1])) for mask in masks])
        kept = torch.randperm(len(values), device=device)[: max(1, MAX_INITIAL_STEPS // steps)]
        values, observed, step_mask = values[kept], observed[kept], step_mask[kept]
        self._fit_missing_pose(values, observed)
        poses, seen = self._complete(values, observed), self._seen(observed)
        # Errors count as they do in the loss: those of hands more, those of what is seldom seen less.
        share = (observed.sum((0, 1)) / step_mask.sum().mul(hop).clamp(min=1)).clamp(min=1e-2)
        weight = (self.config.keypoint_weights.to(share) * share)[self.keypoint_order].sqrt()
        patches = poses[..., :-1].unflatten(1, (-1, hop)).transpose(2, 3)
        self._fit_linear_path(patches, step_mask[..., None] & seen, weight)
        latents = [self.encoder(*piece) for piece in zip(poses.split(32), step_mask.split(32), strict=True)]
        self.quantizer.initialize(torch.cat(latents), step_mask, seen)
        broadcast_module(self)

    def _fit_missing_pose(self, values: torch.Tensor, observed: torch.Tensor) -> None:
        """The mean place of each keypoint, relative to its anchor where that is there too."""
        coordinates, there = values[:, :, self.keypoint_order, :-1], observed[:, :, self.keypoint_order]
        hangs = self.anchors >= 0
        anchor = self.anchors.clamp(min=0)
        coordinates = coordinates - torch.where(hangs[:, None], coordinates[:, :, anchor], 0.0)
        there = there & (there[:, :, anchor] | ~hangs)
        total = torch.where(there[..., None], coordinates, 0.0).sum((0, 1))
        self.missing_pose.copy_(total / there.sum((0, 1)).clamp(min=1)[:, None])

    def _fit_linear_path(self, patches: torch.Tensor, seen: torch.Tensor, weight: torch.Tensor) -> None:
        """PCA of each group's patches `(B, S, N, h, D - 1)` where it is seen `(B, S, G)`, and back.

        `weight` `(N,)` scales each keypoint's coordinates.
        """
        encoder, decoder = self.encoder.linear_path, self.decoder.linear_path
        for tensor in (*encoder.parameters(), *decoder.parameters()):
            tensor.zero_()
        start = 0
        for group, size in enumerate(encoder.sizes):
            there = seen[..., group] if seen[..., group].any() else torch.ones_like(seen[..., group])
            rows = patches[:, :, start : start + size][there].flatten(1)  # (m, J h (D - 1))
            columns = slice(start * encoder.in_features, (start + size) * encoder.in_features)
            factor = weight[start : start + size].repeat_interleave(encoder.in_features)
            mean = rows.mean(0)
            centred = (rows - mean) * factor
            variance, basis = torch.linalg.eigh((centred.T @ centred / len(rows)).double())
            used = min(self.config.codebook_dim, basis.shape[1])
            basis = basis[:, -used:].flip(1).to(rows.dtype)  # (J h (D - 1), used), most variance first
            # Latents of unit size in every group, so that the network sees the still face as well as the hands.
            scale = (variance.sum() / used).sqrt().clamp(min=1e-4).to(rows.dtype)
            encoder.weight[:used, columns] = (basis * factor[:, None]).T / scale
            encoder.bias[group, :used] = -((mean * factor) @ basis) / scale
            decoder.weight[columns, :used] = basis / factor[:, None] * scale
            decoder.bias[start : start + size] = mean.unflatten(0, (size, -1))
            start += size

    def _clean(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Poses `(B, S h, N, D)` without NaN, padded to whole steps, and which keypoints `(B, S h, N)` are there."""
        self._check_values(input_values, padding_mask)
        frames = input_values.shape[1]
        missing = self.get_encoded_length(frames) * self.config.hop_length - frames
        # Numbers are padded, not what is said of them: of padded booleans inductor makes C++ that does not compile.
        values = F.pad(input_values, (0, 0, 0, 0, 0, missing), value=torch.nan)
        # A number times 0 is 0, others give NaN: a quarter of the time that `isfinite` and `all` take.
        finite = sum((values * 0).unbind(-1), values.new_zeros(())) == 0
        if padding_mask is not None:
            finite = finite & (F.pad(padding_mask.to(values.dtype), (0, missing)) != 0)[..., None]
        observed = finite & (values[..., -1] >= self.config.confidence_threshold)
        return torch.where(finite[..., None], values, 0.0), observed

    def _complete(
        self, values: torch.Tensor, observed: torch.Tensor, cache: PoseTokenizerPaddingCache | None = None
    ) -> torch.Tensor:
        """Missing keypoints stay where they were seen last, relative to their anchor; keypoints in network order.

        Before a keypoint is seen it is where it will be seen first, or in a causal model at a learned place. A hand
        that is missed for some frames so moves with the arm, and its coming and going costs no bits.
        """
        observed = observed.index_select(2, self.keypoint_order)
        values = values.index_select(2, self.keypoint_order)
        first = self.missing_pose.to(values.dtype).expand(values.shape[0], -1, -1)
        if cache is not None and cache.held is not None:
            first = cache.held
        latest, free = last_seen(observed, self.config.use_causal_conv), self.num_free
        # The first keypoints hang on nothing; anchors are among them.
        coordinates = hold(values[:, :, :free, :-1], latest[:, :, :free], first[:, :free])
        held = coordinates[:, -1]
        if free < values.shape[2]:
            offsets = F.pad(coordinates, (0, 0, 1, 0)).index_select(2, self.anchors[free:] + 1)  # of none, -1: 0
            relative = hold(values[:, :, free:, :-1] - offsets, latest[:, :, free:], first[:, free:])
            held = torch.cat([held, relative[:, -1]], 1)
            coordinates = torch.cat([coordinates, offsets + relative], 2)
        if cache is not None:
            cache.held = held
        return torch.cat([coordinates, values[..., -1:]], -1)

    def _seen(self, observed: torch.Tensor) -> torch.Tensor:
        """Token groups `(B, S, G)` with at least one keypoint observed `(B, S h, N)` in the step."""
        steps = observed.index_select(2, self.keypoint_order).unflatten(1, (-1, self.config.hop_length)).any(2)
        return torch.stack([group.any(-1) for group in steps.split(self.encoder.linear_path.sizes, -1)], -1)

    def _step_mask(self, input_values: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Code steps `(B, S)` that are not padding."""
        batch, frames = input_values.shape[:2]
        if padding_mask is None:
            return torch.ones(batch, self.get_encoded_length(frames), dtype=torch.bool, device=input_values.device)
        return self.get_pose_codes_mask(padding_mask)

    def _decode_latents(
        self,
        latents: torch.Tensor,
        padding_mask: torch.Tensor | None,
        cache: PoseTokenizerPaddingCache | None = None,
    ) -> torch.Tensor:
        batch, steps = latents.shape[:2]
        if padding_mask is None:
            step_mask = torch.ones(batch, steps, dtype=torch.bool, device=latents.device)
        else:
            step_mask = self.get_pose_codes_mask(padding_mask)
        latents = mask_steps(latents, step_mask)
        poses = self.decoder(latents.to(self.decoder.norm.weight.dtype), step_mask, cache)
        poses = poses.index_select(2, self.keypoint_place)
        if padding_mask is not None:
            poses = poses[:, : padding_mask.shape[1]]
        return torch.cat([poses[..., :-1], poses[..., -1:].sigmoid()], -1)

    def _result(self, output: ModelOutput, return_dict: bool | None) -> Any:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check_values(self, input_values: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        expected = (self.config.num_keypoints, self.config.keypoint_dim)
        if input_values.ndim != 4 or tuple(input_values.shape[2:]) != expected or input_values.shape[1] < 1:
            known = input_values.ndim == 4 and input_values.shape[2] != expected[0]
            raise ValueError(
                f"input_values has shape {tuple(input_values.shape)}; expected (batch, frames, {expected[0]}, "
                f"{expected[1]}) with at least one frame{likely_layout(input_values.shape[2]) if known else ''}. "
                "PoseFeatureExtractor makes it from your poses."
            )
        if padding_mask is not None and padding_mask.shape != input_values.shape[:2]:
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask.shape)}; expected {tuple(input_values.shape[:2])}, "
                "a value for each frame of input_values."
            )

    def _check_codes(self, pose_codes: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        if pose_codes.ndim != 3:
            raise ValueError(f"pose_codes has shape {tuple(pose_codes.shape)}; expected (batch, codebooks, steps).")
        if padding_mask is not None:
            steps = self.get_encoded_length(padding_mask.shape[1])
            if steps != pose_codes.shape[2]:
                raise ValueError(
                    f"padding_mask has {padding_mask.shape[1]} frames, which make {steps} code steps, but pose_codes "
                    f"has {pose_codes.shape[2]}; expected the mask that was given to encode."
                )
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not pose_codes.numel():
            return
        low, high = pose_codes.aminmax()
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(
                f"pose_codes holds codes from {low} to {high}; expected 0 to {self.config.codebook_size - 1}."
            )

    def _check_stream(self, frames: int = 0) -> None:
        if not self.config.use_causal_conv:
            raise ValueError("use_streaming needs a causal model; train one with use_causal_conv: true.")
        if frames % self.config.hop_length:
            raise ValueError(
                f"A streamed piece has {frames} frames; expected a multiple of hop_length {self.config.hop_length}. "
                "PoseTokenizerStream buffers frames for you."
            )

    def _check_target(self, target: float | None, use_streaming: bool) -> None:
        if target is None:
            return
        if self.config.quantizer != "rvq":
            raise ValueError("target_bits_per_frame needs a model with quantizer: rvq, whose code 0 says nothing.")
        if use_streaming:
            raise ValueError("target_bits_per_frame needs the whole sequence; in a stream use num_quantizers.")
        least = sum(math.log2(levels + 1) for levels in self.config.levels_per_group) / self.config.hop_length
        if target < least:
            raise ValueError(
                f"target_bits_per_frame is {target}; expected at least {least:.3g}, which say that no level follows."
            )


__all__ = [
    "PoseTokenizerDecoderOutput",
    "PoseTokenizerEncoderOutput",
    "PoseTokenizerModel",
    "PoseTokenizerOutput",
    "PoseTokenizerPaddingCache",
    "PoseTokenizerPreTrainedModel",
]

PoseTokenizerModel.register_for_auto_class("AutoModel")
if __name__.startswith("modeling_pose_tokenizer."):  # installed: a checkpoint's own copy is found by its auto_map
    AutoConfig.register(PoseTokenizerConfig.model_type, PoseTokenizerConfig)
    AutoModel.register(PoseTokenizerConfig, PoseTokenizerModel)
    AutoFeatureExtractor.register(PoseTokenizerConfig, PoseFeatureExtractor)
