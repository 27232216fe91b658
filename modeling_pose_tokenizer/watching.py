"""What a training run watches, so that nothing goes wrong in silence: losses that are no numbers, codebooks that
collapse, memory, and what the run will cost.

Letters: B batch, Q codebooks, K codebook size, S code steps.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .checkpoints import Progress, whole
from .configuration_pose_tokenizer import PoseTokenizerConfig
from .formats import FilePath

# Steps in a row without a finite loss after which a run will not recover.
MAX_SKIPPED_IN_ROW = 10
# Sequences of a bad batch that are named: those with the largest coordinates first.
_NAMED = 8
# A codebook has collapsed below this share of the largest entropy, or above that share of codes never chosen ...
MIN_ENTROPY, MAX_DEAD = 0.3, 0.5
# ... among so many code steps for each of its codes: a code in even use is then missed with a chance of exp(-20) ...
STEPS_PER_CODE = 20
# ... or when it says something in less than this share of all code steps.
MIN_SPOKEN = 0.01


class TrainingError(RuntimeError):
    """A run that cannot go on; `str` is one sentence with the reason and what to change."""


class TrainingWatch:
    """Looks at every step: one whose loss or gradient is no number is skipped and counted in `progress`, on all ranks
    alike, and ten in a row end the run; codebooks that collapse are found, and each named once.

    Args:
        accelerator: Its ranks decide together.
        progress: Keeps the counts of skipped steps, so that they outlive the process.
        folder: Of the training sequences, for the sentence that names them.
        config: Of the model.
    """

    def __init__(
        self, accelerator: Accelerator, progress: Progress, folder: FilePath, config: PoseTokenizerConfig
    ) -> None:
        self.accelerator, self.progress, self.folder, self.config = accelerator, progress, folder, config
        shape = (config.num_codebooks, config.codebook_size)
        self.counts = torch.zeros(shape, dtype=torch.long, device=accelerator.device)
        self.named: set[int] = set()
        self.batches: list[Mapping[str, Any]] = []
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)

    def see(self, batch: Mapping[str, Any], loss: torch.Tensor, codes: torch.Tensor) -> None:
        """Notes one forward pass of the step: what went in, its loss, and the codes (B, Q, S) that it chose."""
        self.batches.append(batch)
        self.finite = self.finite & loss.detach().isfinite()
        chosen = codes.transpose(0, 1).flatten(1)  # padding says 0, as what is not seen
        self.counts.scatter_add_(1, chosen, torch.ones_like(chosen))

    def passes(self, grad_norm: torch.Tensor) -> bool:
        """Whether the optimizer may use the gradients of the passes since the last question; the same on every rank.

        Raises:
            TrainingError: It was the tenth time in a row that it may not.
        """
        finite = self.finite
        if self.accelerator.scaler is None:  # fp16's own scaler looks for gradients that overflow, which is routine
            finite = finite & whole(grad_norm).isfinite()
        passed = self.accelerator.reduce(finite.float(), "mean").item() == 1
        batches, self.batches, self.finite = self.batches, [], torch.ones_like(self.finite)
        if passed:
            self.progress.skipped_in_row = 0
            return True
        self.progress.skipped += 1
        self.progress.skipped_in_row += 1
        if self.progress.skipped_in_row == MAX_SKIPPED_IN_ROW:
            raise TrainingError(
                f"step {self.progress.step + 1}: the loss or its gradient is no finite number for the "
                f"{MAX_SKIPPED_IN_ROW}th step in a row; lower training.learning_rate, or look at the sequences of the "
                f"last batch in {self.folder} (largest coordinates first): {', '.join(self._names(batches))}."
            )
        return False

    def _names(self, batches: list[Mapping[str, Any]]) -> list[str]:
        sizes = [
            (float(size), name)
            for batch in batches
            for size, name in zip(batch["input_values"].abs().amax((1, 2, 3)), batch["id"], strict=True)
        ]
        # NaN sorts nowhere: it is larger than all.
        everywhere = sorted(gather_object(sizes), key=lambda entry: -math.inf if entry[0] != entry[0] else -entry[0])
        names = list(dict.fromkeys(name for _, name in everywhere))
        return names[:_NAMED] + ([f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else [])

    def find_collapsed(self) -> list[str]:
        """A sentence for each codebook that has collapsed and was not named before; all ranks ask together.

        Code 0 counts apart: of a group that is not seen, and of padding, it is the whole message.
        """
        sentences = []
        counts = self.accelerator.reduce(self.counts, "sum").tolist()
        for number, ((group, level), row) in enumerate(zip(self.config.codebook_index, counts, strict=True)):
            enough = STEPS_PER_CODE * self.config.codebook_size
            problem = None
            if sum(row[1:]) >= enough:
                problem = _find_collapse(row[1:])
                self.counts[number] = 0
            elif sum(row) >= enough / MIN_SPOKEN:
                problem = f"it said nothing in {row[0] / sum(row):.1%} of the code steps"
            if problem and number not in self.named:
                self.named.add(number)
                sentences.append(
                    f"Level {level} of {group} has collapsed: {problem}. Give {group} fewer levels "
                    "(model.num_quantizers) or all groups fewer codes (model.codebook_size); if this is its level 0, "
                    "look whether the data show it at all."
                )
        return sentences


def _find_collapse(counts: list[int]) -> str | None:
    """What is wrong with codes that were chosen so often."""
    total, largest = sum(counts), math.log2(len(counts))
    shares = [count / total for count in counts if count]
    entropy = -sum(share * math.log2(share) for share in shares)
    if entropy < MIN_ENTROPY * largest:
        return f"its codes carry {entropy:.1f} of {largest:.1f} bits"
    if len(shares) < (1 - MAX_DEAD) * len(counts):
        return f"{1 - len(shares) / len(counts):.0%} of its codes are never chosen"
    return None


def memory_in_use(device: torch.device) -> float:
    """GiB: the most that was allocated on a GPU, or what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def describe_cost(
    accelerator: Accelerator, model: torch.nn.Module, folder: Path, steps: int, seconds: float, checkpoints: int
) -> str:
    """What a full run will take, in words.

    Args:
        accelerator: Its device is asked for its memory.
        model: Trained with two moments per weight.
        folder: Where the run will write.
        steps: That are left.
        seconds: Of one of them.
        checkpoints: That are kept.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    # A checkpoint holds the weights, their average and two moments; best/ and last/ hold the weights; one checkpoint
    # more is there while the next is written.
    disk = weights * (4 * (checkpoints + 1) + 2)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if accelerator.device.type == "cuda":
        memory = torch.cuda.get_device_properties(accelerator.device).total_memory
    else:
        memory = psutil.virtual_memory().total
    hours = steps * seconds / 3600
    duration = f"{hours:.1f} hours" if hours >= 2 else f"{hours * 60:.0f} minutes"
    short = "" if free > disk else "; that is not enough: name another training.output_dir, or free some"
    return (
        f"A full run: {steps:,} steps of {seconds:.2f} s, about {duration} and the validations; "
        f"{memory_in_use(accelerator.device):.1f} of {memory / 2**30:.0f} GiB memory per process; "
        f"{disk / 2**30:.2f} GiB on a disk that has {free / 2**30:.0f} free{short}."
    )
