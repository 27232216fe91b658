"""Codecs that no gradient trained: transform coding, and block quantization in open and in closed loop.

Letters: T frames, N keypoints, D values per keypoint (confidence last), C = D - 1 coordinates, S code steps (blocks of
frames), Q codebooks, K codes per codebook, M rows.

All are fitted on clips (T, N, D) of normalised poses, best on the augmented windows that the networks train on
(`training_windows`): fitted on the recordings as they are, they err more on unseen signers. They code coordinates
alone, not which keypoints are missing. A missing keypoint is interpolated linearly in time and held at the ends; one
that a clip never shows lies at its training mean. The last block of a clip is filled up with its last frame. k-means
draws from torch's global generator: seed it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from protocol import CONFIDENCE_THRESHOLD, Benchmark, batches
from torch.nn.utils.rnn import pad_sequence

from modeling_pose_tokenizer.codebook_pose_tokenizer import kmeans, nearest_code
from modeling_pose_tokenizer.skeleton_pose_tokenizer import Skeleton

HAND_WEIGHT = 5.0  # of a hand's squared error, as in the loss of the networks
CODEBOOK_SIZE = 1024
# Share of the probability that the entropy coder leaves to values that its Laplace models do not foresee.
ESCAPE = 1e-4
ARM_KEYPOINTS = ("shoulder", "elbow", "wrist")
RIDGE = 1e-3  # relative to the mean variance of what is predicted from
# Bits per frame -> codebooks of each closed loop. Both hands use those of "hand"; "whole" is a layout without hands.
CLOSED_LOOP_SIZES: dict[float, dict[str, list[int]]] = {
    5: {"arms": [64], "rest": [8], "face": [8], "hand": [16], "whole": [1024] * 2},
    10: {"arms": [1024], "rest": [64], "face": [64], "hand": [512], "whole": [1024] * 4},
    20: {"arms": [1024] * 2, "rest": [1024], "face": [1024], "hand": [1024] * 2, "whole": [1024] * 8},
    22.5: {"arms": [1024] * 3, "rest": [1024], "face": [1024], "hand": [1024] * 2, "whole": [1024] * 9},
    40: {"arms": [1024] * 4, "rest": [1024] * 2, "face": [1024] * 2, "hand": [1024] * 4, "whole": [1024] * 16},
}


# ---- poses to blocks and back ---------------------------------------------------------------------------------------


def training_windows(benchmark: Benchmark, steps: int = 400, seed: int = 0) -> list[np.ndarray]:
    """The windows (T, N, D) of the first batches that a network with this seed trains on, without padding."""
    return [
        values[: int(mask.sum())]
        for batch in batches(benchmark, steps, seed)
        for values, mask in zip(batch["input_values"].numpy(), batch["padding_mask"].numpy(), strict=True)
    ]


def split_clip(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A clip (T, N, D) as points (T, N, C) and which of them are there (T, N)."""
    seen: np.ndarray = clip[..., -1] > CONFIDENCE_THRESHOLD
    return clip[..., :-1], seen


def mean_points(clips: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Mean place (N, C) of each keypoint over the frames that show it, 0 where none does."""
    total = np.sum([np.where(seen[..., None], points, 0).sum(0, dtype=np.float64) for points, seen in clips], axis=0)
    count = np.sum([seen.sum(0) for _, seen in clips], axis=0)
    return (total / np.maximum(count, 1)[:, None]).astype(np.float32)


def fill_missing(points: np.ndarray, seen: np.ndarray, default: np.ndarray) -> np.ndarray:
    """Points (T, N, C), linear in time where `seen` (T, N) is false; `default` (N, C) where it is never true."""
    length = len(points)
    times = np.arange(length)[:, None]
    before = np.maximum.accumulate(np.where(seen, times, -1), axis=0)  # (T, N)
    after = np.minimum.accumulate(np.where(seen, times, length)[::-1], axis=0)[::-1]
    first = np.where(before < 0, after, before) % length
    last = np.where(after == length, before, after) % length
    weight = ((times - first) / np.maximum(last - first, 1))[..., None].astype(points.dtype)
    start, end = (np.take_along_axis(points, frames[..., None], 0) for frames in (first, last))
    return np.where(np.logical_or.reduce(seen)[:, None], start + weight * (end - start), default)


def to_blocks(values: np.ndarray, block: int) -> torch.Tensor:
    """(T, ...) to (S, block * ...), filled up with the last frame."""
    padded = np.concatenate([values, np.repeat(values[-1:], -len(values) % block, axis=0)])
    return torch.from_numpy(padded.reshape(len(padded) // block, -1))


def from_blocks(rows: torch.Tensor, block: int, like: np.ndarray) -> np.ndarray:
    """(S, block * N * C) to the shape (T, N, C) of `like`."""
    return rows.numpy().reshape(len(rows) * block, *like.shape[1:])[: len(like)]


def principal_axes(rows: torch.Tensor, components: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C,) of rows (M, C) and their principal axes (C, components), strongest first."""
    mean = rows.mean(0)
    centred = rows - mean
    axes = torch.linalg.eigh(centred.T @ centred)[1].flip(-1)
    return mean, axes[:, :components].contiguous()


def hand_scale(layout: Skeleton, hand_weight: float) -> np.ndarray:
    """(N, 1): what coordinates are multiplied by, so that squared errors of hands weigh `hand_weight` times."""
    scale = np.ones((layout.num_keypoints, 1), np.float32)
    for group, keypoints in layout.group_keypoints.items():
        if group.endswith("_hand"):
            scale[list(keypoints)] = np.sqrt(hand_weight)
    return scale


class BlockCodec:
    """A codec of whole-body blocks along their principal axes: what transform coding and open-loop quantization share.

    Args:
        layout: The skeleton.
        block: Frames of a block.
        hand_weight: Weight of a hand's squared error against that of other keypoints.
        components: Principal axes that are kept; None keeps all.
    """

    def __init__(self, layout: Skeleton, block: int, hand_weight: float, components: int | None) -> None:
        self.hop_length = block
        self.components = components
        self.scale = hand_scale(layout, hand_weight)

    def fit_axes(self, clips: Sequence[np.ndarray]) -> torch.Tensor:
        """Finds the axes; returns the training coefficients (M, components)."""
        split = [split_clip(clip) for clip in clips]
        self.default = mean_points(split)
        rows = torch.cat([to_blocks(self._scaled(*parts), self.hop_length) for parts in split])
        self.mean, self.axes = principal_axes(rows, self.components)
        return (rows - self.mean) @ self.axes

    def _scaled(self, points: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return fill_missing(points, seen, self.default) * self.scale

    def analyse(self, clip: np.ndarray) -> torch.Tensor:
        """A clip (T, N, D) to coefficients (S, components)."""
        return (to_blocks(self._scaled(*split_clip(clip)), self.hop_length) - self.mean) @ self.axes

    def synthesise(self, coefficients: torch.Tensor, like: np.ndarray) -> np.ndarray:
        """Coefficients (S, components) to points (T, N, C), as many frames as `like` (T, N, D) has."""
        return from_blocks(coefficients @ self.axes.T + self.mean, self.hop_length, like[..., :-1]) / self.scale


# ---- transform coding -----------------------------------------------------------------------------------------------


def mean_sizes(coefficients: torch.Tensor) -> torch.Tensor:
    """Mean size (Q,) of training coefficients (M, Q): the Laplace models that make them most likely."""
    return coefficients.abs().mean(0).clamp(min=1e-6).double()


class ScalarCoder:
    """One uniform scalar quantizer for all coefficients, and an ideal entropy coder with a Laplace model for each.

    One step size for all is reverse water-filling at high rate (Cover & Thomas, Elements of Information Theory,
    section 10.3.3).

    Attributes:
        hop_length: Frames of a block.
        step: Step size in scaled shoulder widths.
        rounding: |c| / step is rounded down after this is added: 0.5 is the nearest value, less widens the zero.
        laplace: Mean size (Q,) of each training coefficient, see `mean_sizes`.
    """

    hop_length: int
    step: float
    rounding = 0.4
    laplace: torch.Tensor

    def set_rate(self, step: float) -> None:
        """Changes the step size, after `fit`."""
        self.step = step

    def quantize(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Coefficients to whole numbers of the same shape."""
        return (coefficients.abs() / self.step + self.rounding).floor() * coefficients.sign()

    def restore(self, steps: torch.Tensor, laplace: torch.Tensor) -> torch.Tensor:
        """Whole numbers (..., q) to what coefficients with mean sizes `laplace` (q,) are on average: the inverse.

        The mean of a Laplace density over a bin lies at the same distance from its inner edge in every bin.
        """
        ratio = self.step / laplace
        inside = (1 / ratio - 1 / ratio.expm1()).float()
        return (steps.abs() - self.rounding + inside) * self.step * steps.sign()

    def probability(self, codes: torch.Tensor) -> torch.Tensor:
        """What the entropy coder expects of integers (Q, M): Laplace densities integrated over the bins."""
        size, ratio = codes.abs().double(), (self.step / self.laplace)[:, None]
        zero = -torch.expm1((self.rounding - 1) * ratio)
        other = 0.5 * torch.exp((self.rounding - size) * ratio) * -torch.expm1(-ratio)
        # What is set aside goes to 0 by half, and to n and -n by 1 / (n + 1) (n + 2) together: it sums to 1.
        escape = 0.5 / ((size + 1) * (size + 2)) + 0.25 * (size == 0)
        return (1 - ESCAPE) * torch.where(size == 0, zero, other) + ESCAPE * escape

    def bits_per_frame(self, codes: Sequence[np.ndarray]) -> float:
        """Ideal code length of the integers (Q, S) of some clips."""
        probability = self.probability(torch.from_numpy(np.concatenate(codes, axis=1)))
        return float(-probability.log2().sum(0).mean()) / self.hop_length


class TransformCoder(BlockCodec, ScalarCoder):
    """Karhunen-Loeve transform of whole-body blocks, and a scalar quantizer.

    Args:
        layout, block, hand_weight: As for `BlockCodec`.
        step: See `ScalarCoder`; it may be changed after `fit`.
    """

    def __init__(self, layout: Skeleton, block: int = 8, step: float = 0.1, hand_weight: float = 1.0) -> None:
        super().__init__(layout, block, hand_weight, components=None)
        self.step = step

    @property
    def num_parameters(self) -> int:
        return self.mean.numel() + self.axes.numel() + self.laplace.numel()

    def fit(self, clips: Sequence[np.ndarray]) -> None:
        self.laplace = mean_sizes(self.fit_axes(clips))

    def encode_decode(self, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points (T, N, C) and integers (Q, S), one per coefficient and block."""
        steps = self.quantize(self.analyse(clip))
        return self.synthesise(self.restore(steps, self.laplace), clip), steps.T.long().numpy()


# ---- block quantization, open loop ----------------------------------------------------------------------------------


class ResidualMeans:
    """Codebooks of k-means, each fitted to what those before it left over."""

    def fit(self, vectors: torch.Tensor, sizes: Sequence[int]) -> None:
        """Learns codebooks of `sizes` from vectors (M, C)."""
        self.books: list[torch.Tensor] = []
        residual = vectors.clone()
        for size in sizes:
            book = kmeans(residual[None], size)[0]
            residual -= book[nearest_code(residual[None], book[None])[0]]
            self.books.append(book)

    def encode(self, vectors: torch.Tensor, levels: int | None = None) -> torch.Tensor:
        """Vectors (M, C) to codes (Q, M), Q the number of levels."""
        residual, codes = vectors.clone(), []
        for book in self.books[:levels]:
            codes.append(nearest_code(residual[None], book[None])[0])
            residual -= book[codes[-1]]
        return torch.stack(codes)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (Q, M) of all levels or the first ones to vectors (M, C)."""
        return torch.stack([book[code] for book, code in zip(self.books, codes, strict=False)]).sum(0)


class BlockVQ(BlockCodec):
    """Whole-body blocks along 64 principal axes, quantized by residual k-means; each level prefix is a codec.

    Args:
        layout, block, hand_weight, components: As for `BlockCodec`.
        levels: Codebooks; after `fit` fewer may be set.
    """

    def __init__(
        self, layout: Skeleton, levels: int = 8, hand_weight: float = 1.0, block: int = 4, components: int = 64
    ) -> None:
        super().__init__(layout, block, hand_weight, components)
        self.levels = levels
        self.quantizer = ResidualMeans()

    @property
    def codebook_sizes(self) -> list[int]:
        return [CODEBOOK_SIZE] * self.levels

    @property
    def num_parameters(self) -> int:
        books = self.quantizer.books[: self.levels]
        return self.mean.numel() + self.axes.numel() + sum(book.numel() for book in books)

    def fit(self, clips: Sequence[np.ndarray]) -> None:
        self.quantizer.fit(self.fit_axes(clips), self.codebook_sizes)

    def encode_decode(self, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points (T, N, C) and codes (Q, S)."""
        codes = self.quantizer.encode(self.analyse(clip), self.levels)
        return self.synthesise(self.quantizer.decode(codes), clip), codes.numpy()


# ---- block quantization, closed loop --------------------------------------------------------------------------------


@dataclass
class Stream:
    """A group of keypoints that is predicted from its own past.

    Attributes:
        model: Name of the predictor and codebooks; mirrored hands share one.
        keypoints: Its n keypoints.
        wrist: Keypoint that is the origin, or None for the origin of the poses.
        sign: -1 mirrors x.
    """

    model: str
    keypoints: list[int]
    wrist: int | None = None
    sign: float = 1.0

    def mirror(self, points: np.ndarray) -> np.ndarray:
        """Points (..., C) of this side as those of the right one, and back."""
        return np.concatenate([points[..., :1] * np.float32(self.sign), points[..., 1:]], axis=-1)

    def origin(self, points: np.ndarray) -> np.ndarray:
        """The origin (T, 1, C) in points (T, N, C)."""
        return np.zeros_like(points[:, :1]) if self.wrist is None else points[:, [self.wrist]]


def make_streams(layout: Skeleton) -> list[Stream]:
    """Arms, rest of the body, other groups, hands; a layout without hands is one stream."""
    groups, names = layout.group_keypoints, layout.keypoint_names
    if "left_hand" not in groups or "right_hand" not in groups:
        return [Stream("whole", list(range(layout.num_keypoints)))]
    arms = [keypoint for keypoint in groups["body"] if names[keypoint].endswith(ARM_KEYPOINTS)]
    streams = [Stream("arms", arms), Stream("rest", sorted(set(groups["body"]) - set(arms)))]
    streams += [Stream(group, list(groups[group])) for group in groups if group != "body" and "_hand" not in group]
    for side, sign in (("left", -1.0), ("right", 1.0)):
        streams.append(Stream("hand", list(groups[f"{side}_hand"]), names.index(f"{side}_wrist"), sign))
    return streams


class ClosedLoop:
    """Predicts each block linearly from the decoded one before it, and codes the difference along principal axes.

    The first block of a clip is predicted by the training mean.
    """

    def __init__(self, sizes: Sequence[int], components: int = 64) -> None:
        self.components = components
        self.sizes = list(sizes)
        self.quantizer = ResidualMeans()

    @property
    def num_parameters(self) -> int:
        tensors = [self.mean, self.predictor, self.offset, self.axes, *self.quantizer.books]
        return sum(tensor.numel() for tensor in tensors)

    def fit(self, targets: torch.Tensor, lengths: torch.Tensor, known: torch.Tensor, rounds: int = 3) -> torch.Tensor:
        """Learns predictor and codebooks in turn, since the decoded past depends on both.

        Args:
            targets: (M, S, C) blocks of clips, longest clip first.
            lengths: (M,) blocks of each clip.
            known: (M, S) blocks that teach.
            rounds: Times that both are learned; the first time from the original past.

        Returns:
            The targets as they are decoded (M, S, C).
        """
        self.mean = targets[known].mean(0)
        past = targets
        for _ in range(rounds):
            follows = known[:, 1:] & known[:, :-1]
            before, after = ((blocks[follows] - self.mean).double() for blocks in (past[:, :-1], targets[:, 1:]))
            gram = before.T @ before
            gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
            self.predictor = torch.linalg.solve(gram, before.T @ after).float()
            first = self.mean.expand_as(targets[:, :1])
            differences = (targets - torch.cat([first, self.predict(past[:, :-1])], dim=1))[known]
            self.offset, self.axes = principal_axes(differences, self.components)
            self.quantizer.fit((differences - self.offset) @ self.axes, self.sizes)
            past = self.encode(targets, lengths)[0]
        return past

    def predict(self, past: torch.Tensor | None) -> torch.Tensor:
        """The next block (..., C) from the decoded one before it, or from nothing."""
        return self.mean if past is None else self.mean + (past - self.mean) @ self.predictor

    def encode(self, targets: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets (M, S, C), longest clip first, to what is decoded (M, S, C) and codes (Q, M, S)."""
        decoded = torch.zeros_like(targets)
        codes = torch.zeros(len(self.sizes), *targets.shape[:2], dtype=torch.long)
        for step in range(targets.shape[1]):
            active = int((lengths > step).sum())
            predicted = self.predict(decoded[:active, step - 1] if step else None)
            differences = targets[:active, step] - predicted - self.offset
            codes[:, :active, step] = self.quantizer.encode(differences @ self.axes)
            decoded[:active, step] = predicted + self._difference(codes[:, :active, step])
        return decoded, codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (Q, S) of a clip to blocks (S, C)."""
        decoded: list[torch.Tensor] = []
        for step in range(codes.shape[1]):
            predicted = self.predict(decoded[-1] if decoded else None)
            decoded.append(predicted + self._difference(codes[:, step : step + 1])[0])
        return torch.stack(decoded)

    def _difference(self, codes: torch.Tensor) -> torch.Tensor:
        return self.quantizer.decode(codes) @ self.axes.T + self.offset


class PredictiveVQ:
    """A closed loop for each of arms, rest of the body, face and hands; hands lie about the decoded wrists.

    Args:
        layout: The skeleton.
        bits_per_frame: One of `CLOSED_LOOP_SIZES`.
        block: Frames of a block.
    """

    def __init__(self, layout: Skeleton, bits_per_frame: float = 20, block: int = 4) -> None:
        self.hop_length = block
        self.streams = make_streams(layout)
        sizes = CLOSED_LOOP_SIZES[bits_per_frame]
        self.loops = {stream.model: ClosedLoop(sizes[stream.model]) for stream in self.streams}
        self.defaults: dict[str, np.ndarray] = {}

    @property
    def codebook_sizes(self) -> list[int]:
        return [size for stream in self.streams for size in self.loops[stream.model].sizes]

    @property
    def num_parameters(self) -> int:
        return sum(loop.num_parameters for loop in self.loops.values())

    def fit(self, clips: Sequence[np.ndarray]) -> None:
        self.default = mean_points([split_clip(clip) for clip in clips])
        decoded = [np.zeros_like(clip[..., :-1]) for clip in clips]
        for model in self.loops:
            streams = [stream for stream in self.streams if stream.model == model]
            self._fit_loop(model, [(stream, *both) for stream in streams for both in zip(clips, decoded, strict=True)])

    def _fit_loop(self, model: str, items: list[tuple[Stream, np.ndarray, np.ndarray]]) -> None:
        """Fits one loop to (stream, clip, decoded points), and adds what it decodes to these."""
        local = [self._local(stream, clip) for stream, clip, _ in items]
        self.defaults[model] = mean_points(local)
        known = [to_blocks(np.logical_or.reduce(seen, axis=1), self.hop_length).any(1) for _, seen in local]
        order = sorted((row for row, blocks in enumerate(known) if blocks.any()), key=lambda row: -len(known[row]))
        targets = [self._target(*items[row]) for row in order]
        teaching = pad_sequence([known[row] for row in order], batch_first=True)
        lengths = torch.tensor([len(blocks) for blocks in targets])
        found = self.loops[model].fit(pad_sequence(targets, batch_first=True), lengths, teaching)
        for row, blocks, length in zip(order, found, lengths, strict=True):
            self._place(items[row][0], blocks[:length], items[row][2])

    def encode_decode(self, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points (T, N, C) and codes (Q, S)."""
        decoded, codes = np.zeros_like(clip[..., :-1]), []
        for stream in self.streams:
            target = self._target(stream, clip, decoded)[None]
            found, stream_codes = self.loops[stream.model].encode(target, torch.tensor([target.shape[1]]))
            self._place(stream, found[0], decoded)
            codes.append(stream_codes[:, 0])
        return decoded, torch.cat(codes).numpy()

    def decode(self, codes: np.ndarray, length: int) -> np.ndarray:
        """Codes (Q, S) to points (T, N, C), T = `length`."""
        decoded = np.zeros((length, *self.default.shape), np.float32)
        start = 0
        for stream in self.streams:
            loop = self.loops[stream.model]
            stop = start + len(loop.sizes)
            self._place(stream, loop.decode(torch.from_numpy(codes[start:stop])), decoded)
            start = stop
        return decoded

    def _local(self, stream: Stream, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stream's points (T, n, C) about the original wrist, mirrored, and which are there (T, n)."""
        points, seen = split_clip(clip)
        origin = stream.origin(fill_missing(points, seen, self.default))
        return stream.mirror(points[:, stream.keypoints] - origin), seen[:, stream.keypoints]

    def _target(self, stream: Stream, clip: np.ndarray, decoded: np.ndarray) -> torch.Tensor:
        """What is coded (S, block * n * C): the stream about the decoded wrist."""
        local = fill_missing(*self._local(stream, clip), self.defaults[stream.model])
        shift = stream.origin(fill_missing(*split_clip(clip), self.default)) - stream.origin(decoded)
        return to_blocks(local + stream.mirror(shift), self.hop_length)

    def _place(self, stream: Stream, blocks: torch.Tensor, decoded: np.ndarray) -> None:
        """Writes decoded blocks (S, block * n * C) into points (T, N, C)."""
        points = from_blocks(blocks, self.hop_length, decoded[:, stream.keypoints])
        decoded[:, stream.keypoints] = stream.mirror(points) + stream.origin(decoded)
