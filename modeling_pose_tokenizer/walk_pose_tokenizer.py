"""The walk of the quantizers over code steps and levels: its order, what it finds, and where a stream stands.

Letters: B batch, S code steps, G token groups, d dimensions of a latent, L levels, Q codebooks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]
# Codebooks that follow one another, each at a code step of its own: what is decoded at once.
Turn = list[tuple[int, int]]
# Turn, its codebooks, predictions (g, B, d), their scales (g, B) -> codes (g, B) and their vectors (g, B, d).
Say = Callable[[Turn, slice, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class QuantizerState:
    """Where a stream stands.

    Attributes:
        step (`int`): Code steps so far; a tensor in the export of a single step.
        latents (`torch.Tensor` of shape `(L + 1, G, B, d)`): The last step's, entry l decoded up to level l - 1.
    """

    step: int | torch.Tensor
    latents: torch.Tensor


@dataclass
class Walk:
    """What quantizing a batch of sequences found, step by step.

    Attributes:
        codes (`torch.LongTensor` of shape `(Q, S, B)`): Codes.
        residuals (`torch.Tensor` of shape `(Q, S, B, d)`): Latents less their prediction.
        scales (`torch.Tensor` of shape `(Q, S, B)`): What residuals were divided by to be looked up.
        latents (`torch.Tensor` of shape `(S, L + 1, G, B, d)`): Decoded latents, entry l up to level l - 1.
    """

    codes: torch.Tensor
    residuals: torch.Tensor
    scales: torch.Tensor
    latents: torch.Tensor

    def looked_up(self, books: slice) -> torch.Tensor:
        """Residuals `(q, S, B, d)` as these codebooks know them."""
        return self.residuals[books] / self.scales[books][..., None]


def split_steps(sequence: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`(S, g, B, ...)` to `count` sequences of `length` steps, filled up with zeros: `(length, g, count B, ...)`."""
    missing = sequence.new_zeros(count * length - len(sequence), *sequence.shape[1:])
    return torch.cat([sequence, missing]).unflatten(0, (count, length)).movedim(0, 2).flatten(2, 3)


class Rows:
    """A sequence `(S, g, B, ...)` of which single rows are taken, as views: no tensor of numbers, which a loop in an
    exported graph cannot hold."""

    def __init__(self, sequence: torch.Tensor):
        self.width, self.rows = sequence.shape[1], list(sequence.flatten(0, 1).unbind(0))

    def take(self, places: Turn) -> torch.Tensor:
        """`(n, B, ...)` of n places: the number among the g, and the step."""
        return torch.stack([self.rows[step * self.width + number] for number, step in places])

    def put(self, places: Turn, values: torch.Tensor) -> None:
        """Other values `(n, B, ...)` in their places."""
        for (number, step), value in zip(places, values.unbind(0), strict=True):
            self.rows[step * self.width + number] = value


def side_by_side(rows: list[torch.Tensor], number: int) -> torch.Tensor:
    """As many rows `(B, d)` of each of `number` codebooks: `(number, B, n d)`."""
    return torch.cat(rows, -1).unflatten(-1, (number, -1)).transpose(0, 1)


def in_order(found: Sequence[torch.Tensor], turns: Sequence[Turn]) -> torch.Tensor:
    """What was found in each turn `(g, B, ...)`, step by step and codebook by codebook: `(S, Q, B, ...)`."""
    rows, places = torch.cat(list(found)), [(step, book) for turn in turns for book, step in turn]
    order = sorted(range(len(places)), key=places.__getitem__)
    if (steps := 1 + places[-1][0]) > 1:  # those of a single step lie in order
        rows = rows.index_select(0, torch.tensor(order, device=rows.device))
    return rows.unflatten(0, (steps, -1))


def turns_of(owners: Sequence[tuple[int, int]], steps: int) -> list[Turn]:
    """What a walk decodes at once, in turn, of codebooks whose group and level are given, level-major.

    A codebook hangs on lower levels of its step, on the first group's same level, and on the step before. So while the
    first group decodes its level l at step s, the others can decode theirs at step s - 1, and level l + 1 follows one
    step behind: S + L turns of all codebooks instead of 2 S L of a few (Lamport, "The parallel execution of DO loops",
    Communications of the ACM 17(2), 1974).
    """
    delays = [level + (group > 0) for group, level in owners]
    return [
        [(book, turn - delay) for book, delay in enumerate(delays) if 0 <= turn - delay < steps]
        for turn in range(steps + delays[-1])
    ]
