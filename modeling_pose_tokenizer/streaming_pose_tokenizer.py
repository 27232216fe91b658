"""Streaming: frames in, codes out, and codes in, frames out, with bounded state."""

import torch
from torch.nn import functional as F

from .modeling_pose_tokenizer import PoseTokenizerModel, PoseTokenizerPaddingCache


class PoseTokenizerStream:
    """Encodes a stream piece by piece into exactly the codes that encoding it whole would give, and decodes one piece
    by piece into the poses that decoding it whole would give.

    Memory and time per step are constant: kept are the frames of an unfinished code step, the last decoded latents and
    the last steps that each causal convolution saw. Many streams that keep step go in one object as the rows of a
    batch. The two directions do not touch each other: one object may encode a signer and decode another.

    Args:
        model (`PoseTokenizerModel`): A causal model (`use_causal_conv`), in eval mode.
        num_quantizers (`int`, *optional*): Residual levels to use; all of them by default.

    Raises:
        ValueError: a model that looks into the future, or one in training mode.

    Example:

    ```python
    >>> import torch
    >>> from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerModel, PoseTokenizerStream

    >>> stream = PoseTokenizerStream(PoseTokenizerModel(PoseTokenizerConfig(use_causal_conv=True)).eval())
    >>> frames = torch.rand(1, 6, 133, 3)
    >>> stream.push(frames[:, :3]) is None
    True
    >>> codes = stream.push(frames[:, 3:])
    >>> codes.shape, stream.decode(codes).shape, stream.flush().shape
    (torch.Size([1, 16, 1]), torch.Size([1, 4, 133, 3]), torch.Size([1, 16, 1]))
    ```"""

    def __init__(self, model: PoseTokenizerModel, num_quantizers: int | None = None):
        if not model.config.use_causal_conv:
            raise ValueError("A stream needs a causal model; train one with use_causal_conv: true.")
        if model.training:
            raise ValueError("A stream needs a model in eval mode; call model.eval() first.")
        self.model, self.num_quantizers = model, num_quantizers
        self.reset()

    @property
    def latency(self) -> int:
        """Frames from the first frame of a code step until its codes come out, and from them to its poses:
        `hop_length`."""
        return self.model.config.hop_length

    def reset(self) -> None:
        """Forget both directions; the next frame and the next code are the first of another stream."""
        self._cache: PoseTokenizerPaddingCache | None = None
        self._decoder_cache: PoseTokenizerPaddingCache | None = None
        self._frames: torch.Tensor | None = None

    @torch.inference_mode()
    def push(self, frames: torch.Tensor) -> torch.Tensor | None:
        """Take new frames.

        Args:
            frames (`torch.Tensor` of shape `(B, T, N, D)`): Normalised poses, any T; B as in the pushes before.

        Returns:
            `torch.LongTensor` of shape `(B, Q, S)` with the codes of the steps now complete, or `None`.
        """
        if self._frames is not None:
            frames = torch.cat([self._frames, frames], 1)
        whole = frames.shape[1] - frames.shape[1] % self.model.config.hop_length
        self._frames = frames[:, whole:]
        return self._encode(frames[:, :whole]) if whole else None

    @torch.inference_mode()
    def flush(self) -> torch.Tensor | None:
        """End the stream: the codes `(B, Q, 1)` of the unfinished step, or `None`. The next push starts afresh."""
        codes = None
        if self._frames is not None and self._frames.shape[1]:
            missing = self.model.config.hop_length - self._frames.shape[1]
            real = self._frames.new_ones(self._frames.shape[:2])
            codes = self._encode(F.pad(self._frames, (0, 0, 0, 0, 0, missing)), F.pad(real, (0, missing)))
        self._cache = self._frames = None
        return codes

    @torch.inference_mode()
    def decode(self, pose_codes: torch.Tensor) -> torch.Tensor:
        """Take new codes.

        Args:
            pose_codes (`torch.LongTensor` of shape `(B, Q, S)`): The next steps, any S; B and Q as before.

        Returns:
            `torch.Tensor` of shape `(B, S * hop_length, N, D)`: their poses.
        """
        output = self.model.decode(pose_codes, return_dict=True, padding_cache=self._decoder_cache, use_streaming=True)
        self._decoder_cache = output.padding_cache
        assert output.pose_values is not None
        return output.pose_values

    def _encode(self, frames: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor | None:
        output = self.model.encode(
            frames, padding_mask, self.num_quantizers, self._cache, use_streaming=True, return_dict=True
        )
        self._cache = output.padding_cache
        return output.pose_codes


__all__ = ["PoseTokenizerStream"]
