"""Residual quantization, batched over token groups: the walk over code steps and levels that RVQ and FSQ share.

Letters: B batch, S code steps, G token groups, M vectors, d dimensions of a latent, L levels, Q codebooks, K codes
per codebook. Codebooks lie level-major, so those of one level are neighbours: level 0 of every group, then level 1 of
every group that has one, ...
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.scan import scan

from .beam_pose_tokenizer import search_codes
from .codebook_pose_tokenizer import carry, repeat_what_counts, robust_sum
from .configuration_pose_tokenizer import PoseTokenizerConfig
from .gain_pose_tokenizer import PoseTokenizerGain
from .prediction_pose_tokenizer import PoseTokenizerPredictor, take_rows
from .walk_pose_tokenizer import (
    QuantizerState,
    Rows,
    Say,
    Tensors,
    Turn,
    Walk,
    in_order,
    side_by_side,
    split_steps,
    turns_of,
)

# Rounds of fitting a level's prediction and codes to each other.
FIT_ROUNDS = 6


@dataclass
class QuantizerOutput:
    """What a quantizer says of a batch.

    Attributes:
        quantized (`torch.Tensor` of shape `(B, S, G, d)`): Latents as the decoder gets them (straight-through).
        codes (`torch.LongTensor` of shape `(B, Q, S)`): Codes; 0 at steps that are not valid.
        commitment_loss (`torch.Tensor`): Mean distance of latents to what is decoded of them at each level, for the
            encoder, and to what was predicted of them, for the predictor; over valid entries, robust.
        quantization_error (`torch.Tensor`): Mean squared distance between latents and quantized over valid steps, 0
            where there was nothing to say.
    """

    quantized: torch.Tensor
    codes: torch.Tensor
    commitment_loss: torch.Tensor
    quantization_error: torch.Tensor


class ResidualQuantizer(nn.Module, ABC):
    """What RVQ and FSQ share: the walk over code steps and levels, each on what prediction and the levels before it
    left over.

    A subclass says how one level looks up, reads back and learns: `lookup`, `read`, `learn`, `initialize_level`.
    """

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__()
        self.num_groups = len(config.group_names)
        self.num_codes = config.codebook_size
        self.dim = config.codebook_dim
        self.dropout = config.quantizer_dropout
        self.key_interval = config.key_interval
        self.num_levels = config.num_levels
        levels = config.levels_per_group
        owners = [(g, level) for level in range(self.num_levels) for g in range(self.num_groups) if levels[g] > level]
        self.num_codebooks = len(owners)
        # A stage is what is looked up at once: at each level the first group, which predicts the others, and then
        # those. (level, groups, where their codebooks lie among the Q)
        self.stages: list[tuple[int, list[int], slice]] = []
        for level in range(self.num_levels):
            for first in (True, False):
                books = [q for q, (g, own) in enumerate(owners) if own == level and (g == 0) == first]
                if books:
                    groups = [owners[q][0] for q in books]
                    self.stages.append((level, groups, slice(books[0], books[-1] + 1)))
        self.owners = owners
        self.predictor = PoseTokenizerPredictor(owners, self.dim)
        self.gain = PoseTokenizerGain(owners, self.num_codes, self.dim)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def tables(self) -> torch.Tensor | None:
        """What lookups need again and again, for one walk."""
        return None

    @abstractmethod
    def lookup(self, residual: torch.Tensor, books: slice, tables: torch.Tensor | None = None) -> torch.Tensor:
        """Codes `(g, M)` of residuals `(g, M, d)` in the level's codebooks."""

    @abstractmethod
    def read(self, codes: torch.Tensor, books: slice) -> torch.Tensor:
        """Vectors `(g, M, d)` of codes `(g, M)`: the inverse of `lookup`."""

    def read_all(self) -> torch.Tensor:
        """Vectors `(Q, K, d)` of all codes."""
        codes = torch.arange(self.num_codes, device=self.gain.factor.device).expand(self.num_codebooks, -1)
        return self.read(codes, slice(0, self.num_codebooks))

    @abstractmethod
    def learn(self, residuals: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor) -> None:
        """Update codebooks from what a training batch looked up, all at once.

        Args:
            residuals (`torch.Tensor` of shape `(q, M, d)`): What was looked up in the first q codebooks.
            codes (`torch.LongTensor` of shape `(q, M)`): What was found.
            weights (`torch.BoolTensor` of shape `(q, M)`): What counts.
        """

    @abstractmethod
    def initialize_level(self, residual: torch.Tensor, books: slice, again: bool) -> None:
        """Fit the level's codebooks to residuals `(g, M, d)`, or again to somewhat other ones."""

    @abstractmethod
    def codebook_usage(self) -> torch.Tensor:
        """Running counts `(Q, K)` of how often each code was chosen in training."""

    def check_levels(self, num_quantizers: int | None) -> int:
        """The number of levels asked for, all of them when `None`.

        Raises:
            ValueError: outside 1..L.
        """
        if num_quantizers is None:
            return self.num_levels
        if not 1 <= num_quantizers <= self.num_levels:
            raise ValueError(f"num_quantizers is {num_quantizers}; this model has 1 to {self.num_levels} levels.")
        return num_quantizers

    def count_codebooks(self, num_quantizers: int | None) -> int:
        """Codebooks of the first levels, all of them when `None`."""
        return self.stages_of(self.check_levels(num_quantizers))[-1][2].stop

    def stages_of(self, num_levels: int) -> list[tuple[int, list[int], slice]]:
        return [stage for stage in self.stages if stage[0] < num_levels]

    def _is_key(self, step: Any) -> Any:
        """Whether a code step, a number or a tensor, is a key step."""
        return step % self.key_interval == 0 if self.key_interval else step == 0

    def new_state(self, batch: int, device: torch.device) -> QuantizerState:
        """Where a stream begins."""
        return QuantizerState(0, torch.zeros(self.num_levels + 1, self.num_groups, batch, self.dim, device=device))

    @torch.no_grad()
    def walk(
        self,
        latents: torch.Tensor,
        seen: torch.Tensor,
        num_levels: int,
        state: QuantizerState | None = None,
        price: torch.Tensor | None = None,
        beam_size: int = 1,
    ) -> Walk:
        """Quantize sequences in a closed loop: each step is predicted from what the decoder will have of the last one.

        Args:
            latents (`torch.Tensor` of shape `(S, G, B, d)`): What the encoder says.
            seen (`torch.BoolTensor` of shape `(S, G, B)`): Where there is something to say; elsewhere the prediction
                stands, which a code of 0 says in a codebook that has a zero vector.
            num_levels (`int`): Levels to use.
            state (`QuantizerState`, *optional*): That of a stream; it is moved on.
            price (`torch.Tensor` of shape `(G, B)`, *optional*): By how much a code has to lower the squared distance
                to be said; the levels behind one that is not said are silent too.
            beam_size (`int`): Paths of codes that each step goes on with from level to level; with 1, every level
                takes its nearest code.
        """
        state = self.new_state(latents.shape[2], latents.device) if state is None else state
        tables = self.tables() if beam_size == 1 else None

        def look_up(
            before: torch.Tensor, first: Any, goals: torch.Tensor, there: torch.Tensor, *cost: Any, given: Any = None
        ) -> Tensors:
            turns: list[Turn] = []
            found: list[Tensors] = []
            wanted, heard, prices = Rows(goals), Rows(there), [(Rows(each), Rows(there)) for each in cost]

            def say(
                turn: Turn, books: slice, expected: torch.Tensor, scale: torch.Tensor
            ) -> tuple[torch.Tensor, torch.Tensor]:
                places = [(self.owners[book][0], step) for book, step in turn]
                residual = torch.where(heard.take(places)[..., None], wanted.take(places) - expected, 0.0)
                codes = self.lookup(residual / scale[..., None], books, tables) if given is None else given[books]
                for price, speaks in prices:
                    left = residual - scale[..., None] * self.read(codes, books)
                    gained = residual.square().sum(-1) - left.square().sum(-1)
                    speaking = speaks.take(places) & (gained > price.take(places))
                    speaks.put(places, speaking)
                    codes = torch.where(speaking, codes, 0)
                turns.append(turn)
                found.append((codes, residual, scale))
                return codes, self.read(codes, books)

            decoded = self._advance(before, first, len(goals), num_levels, say)
            return decoded, *(in_order(each, turns) for each in zip(*found, strict=True))

        def search(before: torch.Tensor, first: Any, *sequences: torch.Tensor) -> Tensors:
            found, vectors = [], self.read_all()
            norms = vectors.square().sum(-1)
            for step, (goals, there) in enumerate(zip(*sequences, strict=True), first):
                key = self._is_key(step)
                codes = search_codes(self, before, key, goals, there, num_levels, beam_size, vectors, norms)
                found.append(look_up(before, step, goals[None], there[None], given=codes))
                before = found[-1][0][-1]
            return tuple(torch.cat(each) for each in zip(*found, strict=True))

        costs = [] if price is None else [price.expand(len(latents), -1, -1)]
        decoded, *found = self._in_pieces(search if beam_size > 1 else look_up, state, latents, seen, *costs)
        codes, residuals, scales = (each.transpose(0, 1) for each in found)
        return Walk(codes=codes, residuals=residuals, scales=scales, latents=decoded)

    def _advance(self, before: torch.Tensor, first: Any, steps: int, num_levels: int, say: Say) -> torch.Tensor:
        """Latents `(S, L + 1, G, B, d)` of code steps from those of the step before: what is predicted, and what `say`
        adds to it at the expected scale. `first` is the number of the first step, a tensor in an export of one."""
        predictor, nothing, num_books = self.predictor, before[0, 0], self.count_codebooks(num_levels)
        # [l][g][s]: decoded up to level l - 1 at step s - 1. A group without a level has there what is below it.
        reached = [[[nothing] * (steps + 1)] * self.num_groups]
        for level, latents in enumerate(before[1:].unbind(0)):
            row = enumerate(zip(latents.unbind(0), reached[level], strict=True))
            used = self.owners[:num_books]
            reached.append([[latent] if (group, level) in used else below for group, (latent, below) in row])
        follow: dict[tuple[int, int], torch.Tensor] = {}  # scale (B,) of the next level, by group and step
        for turn in turns_of(self.owners[:num_books], steps):
            books = slice(turn[0][0], turn[-1][0] + 1)
            owners = self.owners[books]
            key = self._is_key_turn(turn, first, before.device)
            present, past, starts, scales = [], [], [], []
            for (group, level), (_, step) in zip(owners, turn, strict=True):
                below, above = reached[level], reached[level + 1]
                present.append(below[group][step + 1])
                past += [above[group][step], below[group][step]]
                if self.num_groups > 1:  # the first group has none to hang on
                    present += [above[0][step + 1], below[0][step + 1]] if group else [nothing] * 2
                    past += [above[0][step], below[0][step]] if group else [nothing] * 2
                if level == 0:
                    starts.append(above[group][step])
                else:
                    scales.append(follow[group, step])
            mixed = key[..., None] if isinstance(key, torch.Tensor) else None
            expected = predictor.from_present(side_by_side(present, len(turn)), books, key if mixed is None else mixed)
            if key is not True:
                usual = predictor.from_past(side_by_side(past, len(turn)), books)
                expected = expected + (usual if mixed is None else torch.where(mixed, 0.0, usual))
            if starts:
                own_key = key[: len(starts)] if isinstance(key, torch.Tensor) else key
                scales = [*self.gain.start(torch.stack(starts), own_key, books.start).unbind(0), *scales]
            scale = torch.stack(scales)
            codes, vectors = say(turn, books, expected, scale)
            latents, factors = expected + scale[..., None] * vectors, self.gain.follow(codes, books)
            rows = zip(owners, turn, latents.unbind(0), (scale * factors).unbind(0), strict=True)
            for (group, level), (_, step), latent, next_scale in rows:
                reached[level + 1][group].append(latent)
                follow[group, step] = next_scale
        decoded = [row[step + 1] for step in range(steps) for entry in reached for row in entry]
        return torch.stack(decoded).unflatten(0, (steps, self.num_levels + 1, self.num_groups))

    def _is_key_turn(self, turn: Turn, first: Any, device: torch.device) -> bool | torch.Tensor:
        """Whether the codebooks of a turn are at a key step: one answer for all, or answers `(g, 1)`."""
        if isinstance(first, torch.Tensor):
            key: torch.Tensor = self._is_key(first).reshape(1, 1)
            return key
        keys = [self._is_key(first + step) for _, step in turn]
        return keys[0] if len(set(keys)) == 1 else torch.tensor(keys, device=device)[:, None]

    def _in_pieces(
        self, some_steps: Callable[..., Tensors], state: QuantizerState, *sequences: torch.Tensor
    ) -> Tensors:
        """What `some_steps(before, first, *sequences)` gives, `first` being the number of the first step.

        Of `sequences` `(S, groups or codebooks, B, ...)` and of results, the first `(S, L + 1, G, B, d)`, whose last
        step is the next `before`, others `(S, codebooks, B, ...)`.

        No step is predicted across a key step: what lies between two of them is one sequence of many, so that none is
        longer than `key_interval`, however long the input. In an export the loop over steps is an operator of the
        graph, so that it runs as often as the input is long; a step that is exported alone needs none.
        """
        interval, (steps, _, batch) = self.key_interval, sequences[0].shape[:3]
        in_graph = torch.compiler.is_exporting() and not isinstance(state.step, torch.Tensor)
        if interval == 1 or (not in_graph and 0 < interval < steps and self._is_key(state.step)):
            count = -(-steps // interval)
            apart = self.new_state(count * batch, state.latents.device).latents
            pieces = some_steps(apart, 0, *(split_steps(each, count, interval) for each in sequences))
            results = tuple(
                each.unflatten(place, (count, batch)).movedim(place, 0).flatten(0, 1)[:steps]
                for each, place in zip(pieces, (3, 2, 2, 2), strict=False)
            )
        elif in_graph:
            assert isinstance(state.step, int)

            def combine(carry: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
                before, number = carry
                latents, *others = (each[0] for each in some_steps(before, number, *(each[None] for each in now)))
                return (latents, number + 1), (latents.clone(), *others)

            start = torch.full((), state.step, device=state.latents.device)
            return tuple(scan(combine, (state.latents, start), sequences)[1])
        else:
            results = some_steps(state.latents, state.step, *sequences)
        state.latents, state.step = results[0][-1], state.step + steps
        return results

    def forward(
        self,
        latents: torch.Tensor,
        valid: torch.Tensor,
        seen: torch.Tensor | None = None,
        num_quantizers: int | None = None,
        beam_size: int = 1,
    ) -> QuantizerOutput:
        """Quantize, and in training mode learn.

        Args:
            latents (`torch.Tensor` of shape `(B, S, G, d)`): What the encoder says.
            valid (`torch.BoolTensor` of shape `(B, S)`): Steps that are not padding.
            seen (`torch.BoolTensor` of shape `(B, S, G)`, *optional*):
                Where at least one keypoint of the group was observed: only there is something to say and to learn.
            num_quantizers (`int`, *optional*): Levels to use; all by default, a random prefix in training.
            beam_size (`int`): As in `walk`; not in training, where any prefix must be good.
        """
        num_levels = self.check_levels(num_quantizers)
        # Codes are fp32 whatever the model computes in: a rounded distance is another code.
        with torch.autocast(latents.device.type, enabled=False):
            inputs, there = self._arrange(latents, valid, seen)
            found = self.walk(inputs.detach(), there, num_levels, beam_size=1 if self.training else beam_size)
            kept = self._kept_levels(len(valid), num_levels, num_quantizers, latents.device)  # (B,)
            quantized = self._up_to(found.latents, kept)
            error = torch.where(there[..., None], (inputs.detach() - quantized).square(), 0.0).sum()
            commitment = latents.new_zeros(())
            if self.training:
                counts = self._counts(there, kept, num_levels)
                commitment, learned = self._losses(inputs, found, counts, kept, num_levels)
                quantized = quantized + learned
                # Latents that are no numbers make the loss none, for all to see; codebooks must outlive such a step.
                sound = found.residuals.sum(-1).isfinite()  # (q, S, B)
                self.learn(
                    found.looked_up(slice(None)).flatten(1, 2), found.codes.flatten(1), (counts & sound).flatten(1)
                )
            # Straight-through: the decoder sees the codes, the encoder gets the decoder's gradient as if it had not.
            passed = quantized + (inputs - inputs.detach())
        return QuantizerOutput(
            quantized=passed.permute(2, 0, 1, 3).to(latents.dtype),
            codes=torch.where(valid[:, None], found.codes.permute(2, 0, 1), 0),  # (B, Q, S)
            commitment_loss=commitment,
            quantization_error=error / (valid.sum() * self.num_groups * self.dim).clamp(min=1),
        )

    def _up_to(self, latents: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Of latents `(S, L + 1, G, B, d)` those `(S, G, B, d)` of the levels that each sequence kept `(B,)`."""
        by_sequence = latents.permute(3, 1, 0, 2, 4).flatten(0, 1)  # (B (L + 1), S, G, d)
        first = torch.arange(len(kept), device=kept.device) * (self.num_levels + 1)
        return by_sequence.index_select(0, first + kept).permute(1, 2, 0, 3)

    def _arrange(
        self, latents: torch.Tensor, valid: torch.Tensor, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Time first: latents `(S, G, B, d)` in fp32, zeros in padding, and where there is something to say."""
        there = valid[..., None].expand(latents.shape[:3])
        inputs = torch.where(there[..., None], latents.float(), 0.0).permute(1, 2, 0, 3)
        there = there if seen is None else there & seen
        return inputs, there.permute(1, 2, 0)

    def _counts(self, there: torch.Tensor, kept: torch.Tensor, num_levels: int) -> torch.Tensor:
        """Which entries of each codebook `(q, S, B)` count: something was to say, and the sequence kept the level."""
        return torch.cat(
            [there[:, groups].transpose(0, 1) & (kept > level) for level, groups, _ in self.stages_of(num_levels)]
        )

    def _losses(
        self, inputs: torch.Tensor, found: Walk, counts: torch.Tensor, kept: torch.Tensor, num_levels: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Commitment and prediction loss, and zeros `(S, G, B, d)` that carry a codebook's own gradient.

        The walk knows no gradients. Those of the losses are simple enough to be written down, from what it found.
        """
        # Residuals are what the prediction missed.
        total, slope = robust_sum(found.residuals, counts)
        predicted = self.predictor.carry(found.latents, slope, self.stages_of(num_levels), *self._kinds(inputs))
        goals, decoded = inputs.detach().transpose(0, 1), found.latents.permute(1, 2, 0, 3, 4)  # (L + 1, G, S, B, d)
        pull, learned = torch.zeros_like(goals), torch.zeros_like(inputs)
        for level, groups, own in self.stages_of(num_levels):
            # Latents stay near what is decoded of them (arXiv 1711.00937).
            missed = take_rows(goals, groups) - take_rows(decoded[level + 1], groups)
            value, slope = robust_sum(missed, counts[own])
            total = total + value
            if inputs.requires_grad:
                for group, row in zip(groups, slope, strict=True):
                    pull[group] += row
            vectors = self.read_learned(found.looked_up(own).flatten(1, 2), own)
            if vectors is not None:
                said = (vectors - vectors.detach()).unflatten(1, (len(inputs), -1)) * found.scales[own][..., None]
                said = said * (kept > level)[:, None]
                learned = learned.index_add(1, torch.tensor(groups, device=inputs.device), said.transpose(0, 1))
        total = total - predicted + carry(pull.transpose(0, 1), inputs)
        return total / counts.sum().clamp(min=1), learned

    def _kinds(self, latents: torch.Tensor) -> tuple[list[int], list[int]]:
        """Usual and key steps of latents `(S, ...)`."""
        steps = range(len(latents))
        return [step for step in steps if not self._is_key(step)], [step for step in steps if self._is_key(step)]

    def read_learned(self, residual: torch.Tensor, books: slice) -> torch.Tensor | None:
        """Vectors `(g, M, d)` for residuals with the gradient that the codebook learns from, where it has one."""
        return None

    def _key_rows(self, latents: torch.Tensor) -> torch.Tensor:
        """Which of the S B rows of latents `(S, G, B, d)` are key steps."""
        key = [self._is_key(step) for step in range(len(latents))]
        return torch.tensor(key, device=latents.device).repeat_interleave(latents.shape[2])

    def _inputs(
        self, known: torch.Tensor, level: int, groups: list[int], books: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictor's inputs `(g, S B, ...)` of this step and the one before: `(S, L + 1, G, B, d)` of all."""
        now, before = (x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in (known, known.roll(1, 0)))
        present = self.predictor.present_inputs(list(now), groups, level)
        return present, self.predictor.past_inputs(before, books)

    def _expected(self, present: torch.Tensor, past: torch.Tensor, books: slice, key: torch.Tensor) -> torch.Tensor:
        """Predictions `(g, S B, d)` of all steps at once."""
        usual = self.predictor.from_present(present, books, False) + self.predictor.from_past(past, books)
        return torch.where(key[:, None], self.predictor.from_present(present, books, True), usual)

    def _kept_levels(
        self, batch: int, num_levels: int, num_quantizers: int | None, device: torch.device
    ) -> torch.Tensor:
        """Levels each sequence `(B,)` keeps: in training a random prefix for some of them: prefixes must decode."""
        kept = torch.full((batch,), num_levels, device=device)
        if self.training and num_quantizers is None and self.dropout > 0:
            shortened = torch.randint(1, num_levels + 1, (batch,), device=device)
            kept = torch.where(torch.rand(batch, device=device) < self.dropout, shortened, kept)
        return kept

    @torch.no_grad()
    def encode(
        self,
        latents: torch.Tensor,
        valid: torch.Tensor,
        seen: torch.Tensor | None = None,
        num_quantizers: int | None = None,
        state: QuantizerState | None = None,
        price: torch.Tensor | None = None,
        beam_size: int = 1,
    ) -> torch.Tensor:
        """Latents `(B, S, G, d)` to codes `(B, Q, S)`: `forward` without gradients, losses and learning."""
        with torch.autocast(latents.device.type, enabled=False):
            inputs, there = self._arrange(latents, valid, seen)
            codes = self.walk(inputs, there, self.check_levels(num_quantizers), state, price, beam_size).codes
        return torch.where(valid[:, None], codes.permute(2, 0, 1), 0)

    def decode(self, codes: torch.Tensor, state: QuantizerState | None = None) -> torch.Tensor:
        """Codes `(B, Q, S)` of all levels or a prefix of them to latents `(B, S, G, d)`: the inverse of `encode`.

        `state` is that of a stream; it is moved on.

        Raises:
            ValueError: a number of codebooks that is no prefix of levels.
        """
        batch, num_books, steps = codes.shape
        prefixes = [self.count_codebooks(levels) for levels in range(1, self.num_levels + 1)]
        if num_books not in prefixes:
            raise ValueError(
                f"pose_codes has {num_books} codebooks; this model's levels need {' or '.join(map(str, prefixes))}."
            )
        num_levels = prefixes.index(num_books) + 1
        codes = codes.permute(1, 2, 0)  # (Q, S, B)
        vectors = self.read(codes.flatten(1), slice(0, num_books)).unflatten(1, (steps, batch))

        def some_steps(before: torch.Tensor, first: Any, *said: torch.Tensor) -> Tensors:
            codes, vectors = (Rows(each) for each in said)
            say: Say = lambda turn, *_: (codes.take(turn), vectors.take(turn))  # noqa: E731
            return (self._advance(before, first, len(said[0]), num_levels, say),)

        state = self.new_state(batch, codes.device) if state is None else state
        (decoded,) = self._in_pieces(some_steps, state, codes.transpose(0, 1), vectors.transpose(0, 1))
        return decoded[:, -1].permute(2, 0, 1, 3)

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor, valid: torch.Tensor, seen: torch.Tensor | None = None) -> None:
        """Fit prediction, scales and codebooks to sequences of latents `(B, S, G, d)`, level by level.

        What a level predicts from depends on its own codes. The loop stays open while it is fitted: each round
        predicts from what the round before decoded, which converges to the closed loop without its way of running
        off (asymptotic closed-loop design, Khalil, Rose and Regunathan, IEEE Transactions on Speech and Audio
        Processing 9(3), 2001).
        """
        targets, there = self._arrange(latents, valid, seen)
        key = self._key_rows(targets)
        goals = targets.transpose(0, 1).flatten(1, 2)  # (G, S B, d)
        weights = there.transpose(0, 1).flatten(1)  # (G, S B)
        self.predictor.reset_parameters()
        self.gain.reset_parameters()
        known = self.new_state(len(valid), targets.device).latents.expand(len(targets), -1, -1, -1, -1)
        found = None
        for level, groups, own in self.stages:
            known = known.clone()
            known[:, level + 1, groups] = targets[:, groups]
            weight = weights[groups]
            for round_ in range(FIT_ROUNDS):
                present, past = self._inputs(known, level, groups, own)
                self.predictor.fit(own, goals[groups], present, past, weight, key)
                expected = self._expected(present, past, own, key)
                residual = torch.where(weight[..., None], goals[groups] - expected, 0.0)
                scale = self._fit_gain(residual, weight, key, known, found, level, groups)[..., None]
                self.initialize_level(repeat_what_counts(residual / scale, weight), own, again=round_ > 0)
                decoded = expected + scale * self.read(self.lookup(residual / scale, own), own)  # (g, S B, d)
                known[:, level + 1, groups] = decoded.unflatten(1, (len(known), -1)).transpose(0, 1)
            found = self.walk(targets, there, level + 1)
            known = found.latents
        self.initialized.fill_(True)

    def _fit_gain(
        self,
        residual: torch.Tensor,
        weight: torch.Tensor,
        key: torch.Tensor,
        known: torch.Tensor,
        found: Walk | None,
        level: int,
        groups: list[int],
    ) -> torch.Tensor:
        """Fit the scales of residuals `(g, S B, d)` and give them `(g, S B)`, from latents `(S, L + 1, G, B, d)` or,
        behind the first level, from the walk up to here."""
        if level == 0:
            before = known.roll(1, 0).permute(1, 2, 0, 3, 4).flatten(2, 3)  # (L + 1, G, S B, d)
            for row, group in enumerate(groups):
                self.gain.fit_start(group, residual[row], before[1, group], weight[row], key)
            return self.gain.start(before[1], key)[groups]
        assert found is not None
        scales = []
        for row, group in enumerate(groups):
            book = self.owners.index((group, level - 1))
            scale, codes = found.scales[book].flatten(), found.codes[book].flatten()
            self.gain.fit_factor(book, residual[row] / scale[:, None], codes, weight[row])
            scales.append(scale * self.gain.factor[book][codes])
        return torch.stack(scales)
