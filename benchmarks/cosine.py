"""Transform coding that knows the body: cosines in time, principal axes within each band and token group; and the
same as a text of tokens.

Letters: T frames, N keypoints, C coordinates, S blocks of h frames, M training blocks, J keypoints of a group, F = h
frequencies, Q coefficients of a block.

A Karhunen-Loeve transform of 16 frames of the whole body has 18 million parameters to learn from a few thousand
blocks. Here time is transformed by cosines, which need none, and principal axes are those of one group in one band of
frequencies. Hands and face are coded as what does not follow, by linear regression in the same band, from the decoded
body of the same block: the wrist is said once. All blocks stand by themselves.
"""

import math
from collections.abc import Sequence

import numpy as np
import tokenizers
import torch
from linear import ScalarCoder, fill_missing, from_blocks, hand_scale, mean_points, mean_sizes, split_clip, to_blocks

from modeling_pose_tokenizer.skeleton_pose_tokenizer import Skeleton

RIDGE = 1e-3  # relative to the mean energy of what is predicted from
VOCABULARY = 2048  # tokens; half and twice as many make no shorter text
LARGEST = 40  # integer that is a letter of the text; larger ones take two tokens


def cosine_bands(length: int) -> tuple[torch.Tensor, list[list[int]]]:
    """The orthonormal cosine transform (DCT-II) (F, h), and its frequencies in bands: the slow ones alone, the faster
    ones, which say less, together."""
    frequency, frame = torch.arange(length)[:, None], torch.arange(length)
    waves = torch.cos(torch.pi * (frame + 0.5) * frequency / length) * (2 / length) ** 0.5
    waves[0] /= 2**0.5
    bands, first = [], 0
    while first < length:
        last = min(length, first + max(1, first // 3))
        bands.append(list(range(first, last)))
        first = last
    return waves, bands


class CosineCoder(ScalarCoder):
    """Cosines, principal axes, prediction from the body, and a scalar quantizer.

    Args:
        layout: The skeleton; its first token group is what the others are predicted from.
        block: Frames of a block.
        hand_weight: Weight of a hand's squared error against that of other keypoints.
    """

    def __init__(self, layout: Skeleton, block: int = 16, hand_weight: float = 1.0) -> None:
        self.hop_length = block
        self.waves, self.bands = cosine_bands(block)
        self.groups = [list(keypoints) for keypoints in layout.group_keypoints.values()]
        self.scale = hand_scale(layout, hand_weight)

    @property
    def num_parameters(self) -> int:
        return self.laplace.numel() + sum(tensor.numel() for tensors in self.models.values() for tensor in tensors)

    def fit(self, clips: Sequence[np.ndarray]) -> None:
        """Keeps training blocks; `set_rate` learns from them."""
        split = [split_clip(clip) for clip in clips]
        self.default = mean_points(split)
        found = [self._spectra(*parts) for parts in split]
        self.training = [torch.cat(rows) for rows in zip(*(spectra for spectra, _ in found), strict=True)]
        self.seen = torch.cat([seen for _, seen in found])

    def set_rate(self, step: float) -> None:
        """Fits everything for one step size: what the others are predicted from is what is decoded of the body."""
        self.step = step
        self.models: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        trunk: torch.Tensor | None = None
        laplace: list[torch.Tensor] = []
        self.integers: list[torch.Tensor] = []  # (M, q) of each group and band
        for group, spectrum in enumerate(self.training):  # (M, F, J C)
            said, decoded = self.seen[:, group], torch.zeros_like(spectrum)
            for number, band in enumerate(self.bands):
                rows, inputs = spectrum[:, band].flatten(1), self._inputs(trunk, band, len(spectrum))
                gram = inputs[said].double().T @ inputs[said].double()
                gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
                moment = inputs[said].double().T @ rows[said].double()
                predictor = torch.linalg.solve(gram, moment).float()
                left = rows - inputs @ predictor
                axes = torch.linalg.eigh((left[said].T @ left[said]).double())[1].flip(-1).float()
                coefficients = torch.where(said[:, None], left @ axes, 0.0)
                self.models[group, number] = predictor, axes
                laplace.append(mean_sizes(coefficients))
                self.integers.append(self.quantize(coefficients))
                restored = self.restore(self.integers[-1], laplace[-1])
                decoded[:, band] = (inputs @ predictor + restored @ axes.T).unflatten(1, (len(band), -1))
            trunk = decoded if trunk is None else trunk
        self.laplace = torch.cat(laplace)

    def encode_decode(self, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points (T, N, C) and integers (Q, S), one per coefficient and block; 0 where a block never shows a group."""
        spectra, seen = self._spectra(*split_clip(clip))
        codes: list[torch.Tensor] = []
        decoded: list[torch.Tensor] = []
        first = 0
        for group, spectrum in enumerate(spectra):
            decoded.append(torch.zeros_like(spectrum))
            for number, band in enumerate(self.bands):
                predictor, axes = self.models[group, number]
                expected = self._inputs(decoded[0] if group else None, band, len(spectrum)) @ predictor
                left = (spectrum[:, band].flatten(1) - expected) @ axes
                codes.append(self.quantize(torch.where(seen[:, [group]], left, 0.0)))
                restored = self.restore(codes[-1], self.laplace[first : first + left.shape[1]])
                decoded[-1][:, band] = (expected + restored @ axes.T).unflatten(1, (len(band), -1))
                first += left.shape[1]
        points = np.zeros_like(clip[..., :-1])
        for keypoints, spectrum in zip(self.groups, decoded, strict=True):
            rows = torch.einsum("fh,sfj->shj", self.waves, spectrum).flatten(1)
            points[:, keypoints] = from_blocks(rows, self.hop_length, points[:, keypoints])
        return points / self.scale, torch.cat(codes, 1).T.long().numpy()

    def _spectra(self, points: np.ndarray, seen: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Spectra (S, F, J C) of each group, and which groups (S, number of groups) a block shows."""
        filled = fill_missing(points, seen, self.default) * self.scale
        spectra, shown = [], []
        for keypoints in self.groups:
            blocks = to_blocks(filled[:, keypoints], self.hop_length).unflatten(1, (self.hop_length, -1))
            spectra.append(torch.einsum("fh,shj->sfj", self.waves, blocks.float()))
            shown.append(to_blocks(seen[:, keypoints].astype(np.float32), self.hop_length).any(1))
        return spectra, torch.stack(shown, 1)

    def _inputs(self, trunk: torch.Tensor | None, band: list[int], count: int) -> torch.Tensor:
        """What a band is predicted from (count, ...): 1, and the decoded body's band if there is one."""
        one = torch.ones(count, 1)
        return one if trunk is None else torch.cat([trunk[:, band].flatten(1), one], 1)


class PairCoder(CosineCoder):
    """The same integers as a text in one vocabulary, by byte-pair encoding, as FAST does with the actions of robots
    (arXiv 2501.09747): without an entropy coder, each token for log2 of the vocabulary's size.

    A group of a block is a word: its integers, those that are largest in training first, up to the last that is not 0,
    and a mark for the end.
    """

    def set_rate(self, step: float) -> None:
        super().set_rate(step)
        self.sizes = [spectrum[0].numel() for spectrum in self.training]
        self.order = [part.argsort(descending=True, stable=True).numpy() for part in self.laplace.split(self.sizes)]
        alphabet = [*map(self._letter, range(-LARGEST - 1, LARGEST + 1)), *map(self._end, range(len(self.sizes)))]
        self.pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
        self.pairs.train_from_iterator(self._words(torch.cat(self.integers, 1).T.long().numpy()), trainer)

    def token_bits_per_frame(self, codes: Sequence[np.ndarray]) -> float:
        """Bits of the tokens of some clips' integers (Q, S). Which large one a letter means, another token says."""
        words = [word for clip in codes for word in self._words(clip)]
        count = sum(len(encoding.ids) for encoding in self.pairs.encode_batch(words))
        count += sum(word.count(self._letter(LARGEST + 1)) for word in words)
        return count * math.log2(VOCABULARY) / sum(clip.shape[1] * self.hop_length for clip in codes)

    def _words(self, codes: np.ndarray) -> list[str]:
        """Integers (Q, S) as a word for each group and block."""
        words = []
        for group, rows in enumerate(np.split(codes, np.cumsum(self.sizes)[:-1])):
            for column in rows[self.order[group]].T:
                said = column[: np.flatnonzero(column).max(initial=-1) + 1]
                words.append("".join(map(self._letter, said)) + self._end(group))
        return words

    @staticmethod
    def _letter(value: int) -> str:
        """Far from spaces and marks, at which a text may be cut; one for all that are large."""
        return chr(0x8000 + int(value if abs(value) <= LARGEST else -LARGEST - 1))

    @staticmethod
    def _end(group: int) -> str:
        return chr(0x3400 + group)
