"""What a training run needs to be stopped or killed and to go on: its state on disk, whole or not at all."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import load as load_plain
from torch.distributed.tensor import DTensor, distribute_tensor

from .presets import RunConfigError

MANIFEST = "manifest.json"


@dataclass
class Progress:
    """Where the run stands: optimizer steps done, place in the data (its own on each rank, as streams end apart), the
    best validation so far, and how many steps were skipped because their loss was no number."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = math.inf
    skipped: int = 0
    skipped_in_row: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All ranks ask together."""
        return dataclasses.asdict(self) | {"places": gather_object([(self.epoch, self.batch)])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        places = state.pop("places")
        self.__dict__.update(state)
        self.epoch, self.batch = places[PartialState().process_index % len(places)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded over ranks (all of which must ask), in one piece."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WeightAverage:
    """Exponential moving average of the weights: smoother than the last step's, and what is validated and saved.

    The codebooks are running means themselves and stay as they are.

    Args:
        parameters: The model's, sharded or not.
        decay: Share of the average that a step keeps; a young average keeps less, so that it does not cling to the
            initial weights.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float) -> None:
        self.parameters: list[torch.Tensor] = list(parameters)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Follows the parameters by one step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside, its own again outside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            own = parameter.clone()
            parameter.copy_(average)
            average.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": [whole(entry) for entry in self.average]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for entry, saved in zip(self.average, state["average"], strict=True):
            if isinstance(entry, DTensor):
                saved = distribute_tensor(saved.to(entry.device), entry.device_mesh, entry.placements)
            entry.copy_(saved)


def save_state(accelerator: Accelerator, folder: Path, step: int, keep: int, states: Mapping[str, Any]) -> None:
    """Writes `folder/step-N`: under another name first, then a manifest, then the rename; old ones go last.

    Args:
        accelerator: Holds everything that was prepared.
        folder: Of all checkpoints.
        step: N.
        keep: Number of checkpoints that stay.
        states: What else goes along, by name: objects whose `state_dict` holds tensors and plain values.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}"
    if accelerator.is_main_process:
        for leftover in folder.glob(".step-*"):  # of a run that was killed here
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    # Not registered with accelerate, which unpickles what is.
    for name, state in states.items():
        values = state.state_dict()  # all ranks: it may be sharded
        if accelerator.is_main_process:
            torch.save(values, partial / f"{name}.bin")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {path.relative_to(partial).as_posix(): _fingerprint(path) for path in files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        for path in [*files, partial / MANIFEST, partial]:
            _sync_to_disk(path)
        if target.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(target)
        partial.rename(target)
        _sync_to_disk(folder)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))
    accelerator.wait_for_everyone()


def newest_state(accelerator: Accelerator, folder: Path) -> Path | None:
    """The newest whole checkpoint, the same on every rank; damaged ones are named and passed over."""
    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        for candidate in sorted(folder.glob("step-*"), reverse=True):
            problem = _find_damage(candidate)
            if problem is None:
                found = [candidate]
                break
            accelerator.print(f"{candidate} is passed over: {problem}.")
    return broadcast_object_list(found)[0]


def load_state(accelerator: Accelerator, checkpoint: Path, states: Mapping[str, Any]) -> None:
    """Loads what `save_state` wrote; a checkpoint that could run a program is refused before anything of it is loaded.

    Raises:
        RunConfigError: A file holds more than tensors and plain values, or one is missing.
    """
    advice = "remove the folder to go on from an earlier one, or name another training.output_dir"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if path.name.startswith("custom_checkpoint_") or path.name == ".metadata":
            raise RunConfigError(f"{path}: only unpickling could read it, which may run any program; {advice}.")
        if path.suffix in (".bin", ".pkl"):
            try:
                load_plain(path, map_location="meta")  # checks types, reads no tensors
            except Exception as error:  # whatever cannot be read
                reason = " ".join(str(error).split())[:120]
                raise RunConfigError(
                    f"{path}: holds more than tensors and plain values, or is damaged ({reason}); {advice}."
                ) from error
    for name in states:
        if not (checkpoint / f"{name}.bin").is_file():
            raise RunConfigError(f"{checkpoint}: has no {name}.bin; {advice}.")
    accelerator.load_state(str(checkpoint))
    for name, state in states.items():
        state.load_state_dict(torch.load(checkpoint / f"{name}.bin", map_location="cpu", weights_only=True))


def _find_damage(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
        for name, expected in manifest.items():
            if _fingerprint(checkpoint / name) != expected:
                return f"{name} is not what {MANIFEST} says"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except ValueError:
        return f"{MANIFEST} is damaged"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class StopSignal:
    """While entered, SIGTERM and Ctrl-C ask for a stop after the step instead of ending the process.

    Launchers pass on a signal that the terminal has already sent, so a second one means nothing more.

    Args:
        accelerator: Its ranks stop together.
        check_every: Steps between two questions to the other ranks, which take time.
    """

    def __init__(self, accelerator: Accelerator, check_every: int) -> None:
        self.accelerator = accelerator
        self.check_every = check_every
        self.received = False

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; the same on every rank."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step % self.check_every:
            return False
        if self.received:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
