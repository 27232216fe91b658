"""What a person sees of a training run: the log file, the experiment tracker, the progress bar, the pictures."""

import importlib.util
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process
from tqdm.auto import tqdm

from .checkpoints import whole
from .dataset import PoseDataset
from .metrics import ReconstructionMetrics
from .presets import RunConfig, RunConfigError
from .shards import PoseStream
from .watching import memory_in_use

# Steps after which the length of a run can be foretold: the first ones allocate and compile.
_STEPS_BEFORE_ESTIMATE = 20


class LogFile(GeneralTracker):
    """One JSON object per line in `log.jsonl`, and pictures as PNG: what every run leaves, with or without a tracker.

    Args:
        folder: The run's output folder; nothing is written there before the first value.
    """

    name = "log_file"
    requires_logging_directory = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "log.jsonl"
        self.pictures = folder / "pictures"

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def rewind(self, step: int) -> None:
        """Forgets what a killed run logged after the checkpoint that it goes on from."""
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # the last one may have been cut
        self.path.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step), "utf-8")

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    @on_main_process
    def log_images(self, values: dict[str, np.ndarray], step: int | None = None, **_: Any) -> None:
        from PIL import Image

        self.pictures.mkdir(exist_ok=True)
        for name, images in values.items():
            Image.fromarray(images[0]).save(self.pictures / f"{name.replace('/', '-')}-{step:08d}.png")


def check_tracker(run: RunConfig) -> None:
    """Refuses a tracker whose package is not installed."""
    name = run.tracking.tracker
    if name != "none" and name not in map(str, get_available_trackers()):
        raise RunConfigError(f"tracking.tracker is {name}, which is not installed; `pip install {name}`, or say none.")


def start_trackers(accelerator: Accelerator, run: RunConfig, step: int) -> None:
    """Starts what `Accelerator(log_with=...)` named; `step` is where the run goes on."""
    options = run.tracking
    wandb = {"name": options.run_name, "dir": run.training.output_dir}
    settings = {
        "wandb": wandb | ({"mode": "offline"} if options.offline else {}),
        "trackio": {"name": options.run_name},
    }
    flat = {f"{name}.{key}": value for name, section in run.to_dict().items() for key, value in section.items()}
    plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat.items()}
    accelerator.init_trackers(options.project, config=plain, init_kwargs=settings)
    for tracker in accelerator.trackers:
        if isinstance(tracker, LogFile):
            tracker.rewind(step)


def log_pictures(
    accelerator: Accelerator,
    poses: Sequence[tuple[str, np.ndarray, np.ndarray]],
    metrics: ReconstructionMetrics,
    step: int,
) -> None:
    """Draws a validation and sends the pictures to every tracker: reconstructions, where on the body the error lies,
    and how the codes are used. Does nothing without poses, or where matplotlib is not installed.

    Args:
        accelerator: Its trackers take the pictures.
        poses: (name, reference (T, N, D), reconstruction (T, N, D)).
        metrics: Of the validation, over all ranks.
        step: Of the run.
    """
    drawable = poses and accelerator.is_main_process
    if not drawable or not all(importlib.util.find_spec(name) for name in ("matplotlib", "PIL")):
        return
    from .figures import body_map_figure, codebook_figure
    from .pose_pairs import PosePair
    from .visualization import figure_to_array, reconstruction_figure

    skeleton, figures = metrics.skeleton, metrics.compute()
    drawn = {
        f"reconstruction/{number}": reconstruction_figure(reference, reconstruction, skeleton, name)
        for number, (name, reference, reconstruction) in enumerate(poses)
    }
    pairs = [PosePair(*pair) for pair in poses]
    drawn["val/body_map"] = body_map_figure(pairs, skeleton, figures)
    drawn["val/codebooks"] = codebook_figure(metrics.code_counts.numpy(), figures["tokens"]["codebooks"])
    pictures = {name: figure_to_array(figure) for name, figure in drawn.items()}
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(picture) for name, picture in pictures.items()}, step=step)
        else:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: picture[None] for name, picture in pictures.items()}, step=step, **layout)


def describe_codes(usage: torch.Tensor) -> dict[str, torch.Tensor]:
    """How varied the codes are, means over codebooks: the bits that a token carries, the entropy of its codes, and
    the share of codes that, all used alike, would be as varied: perplexity / K.

    Args:
        usage: (Q, K) running counts.
    """
    share = usage / usage.sum(-1, keepdim=True).clamp(min=1e-9)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return {
        "train/token_entropy": entropy.mean() / math.log(2),
        "train/codebook_use": entropy.exp().mean() / usage.shape[-1],
    }


def describe(
    accelerator: Accelerator,
    run: RunConfig,
    train_set: PoseDataset | PoseStream,
    val_set: PoseDataset,
    first: int,
    max_steps: int,
) -> None:
    """Says what will be trained, on what and for how long."""
    for name, split in (("train", train_set), ("val", val_set)):
        if isinstance(split, PoseStream):
            what = f"a stream of {len(split.files):,} shards"
        else:
            what = f"{len(split.ids):,} sequences, {split.lengths.sum():,} frames"
        left_out = f", {len(split.rejected)} files left out" if split.rejected else ""
        accelerator.print(f"{name}: {what}{left_out}")
    config = run.model_config()
    accelerator.print(f"codec: {config.bits_per_frame:g} bits per frame, {config.token_rate:g} tokens per second")
    ranks, steps = accelerator.num_processes, max_steps - first
    windows = run.training.batch_size * run.training.gradient_accumulation_steps * ranks
    if run.data.sequence_length is None and isinstance(train_set, PoseDataset):
        frames = round(windows * train_set.lengths.mean())
        what = f"about {frames:,} frames in whole sequences"
    else:
        frames = windows * (run.data.sequence_length or 0)
        what = f"{windows:,} windows of {run.data.sequence_length} frames"
    accelerator.print(
        f"run: steps {first:,} to {max_steps:,} on {ranks} x {accelerator.device.type}, each of {what}: "
        f"{steps * frames:,} frames"
    )


class Meter:
    """The progress bar, and a step's numbers as means over ranks.

    Args:
        accelerator: Its main process shows the bar.
        step: Steps done before.
        max_steps: Steps of the whole run.
    """

    def __init__(self, accelerator: Accelerator, step: int, max_steps: int) -> None:
        self.accelerator = accelerator
        hidden = not accelerator.is_main_process
        self.bar = tqdm(total=max_steps, initial=step, desc="train", unit="step", disable=hidden, dynamic_ncols=True)
        self.first, self.max_steps = step, max_steps
        self.frames: torch.Tensor | int = 0
        self.start = self.since = time.perf_counter()
        self.waited = 0.0
        self.estimated = False

    def count(self, frames: torch.Tensor) -> None:
        """Counts frames of this rank towards the speed."""
        self.frames = self.frames + frames

    def log(self, values: Mapping[str, torch.Tensor], step: int) -> None:
        """Sends the means of the values over ranks, the frames/s of all ranks, the share of the time in which they
        waited for data, and their memory to the trackers, and the essence to the bar."""
        memory = memory_in_use(self.accelerator.device)
        numbers = [self.frames, self.waited, memory, *map(whole, values.values())]
        packed = torch.stack([torch.as_tensor(number, device=self.accelerator.device).float() for number in numbers])
        frames, waited, memory, *means = self.accelerator.reduce(packed.detach(), "mean").tolist()
        now = time.perf_counter()
        result = dict(zip(values, means, strict=True))
        result["train/frames_per_second"] = frames * self.accelerator.num_processes / (now - self.since)
        result["train/data_wait"] = waited / (now - self.since)
        result["train/memory_gib"] = memory
        self.frames, self.since, self.waited = 0, now, 0.0
        self.accelerator.log(result, step=step)
        self.bar.set_postfix_str(
            f"loss {result['train/loss']:.4f}, {result['train/frames_per_second']:,.0f} frames/s, "
            f"codebook use {result['train/codebook_use']:.0%}, waiting for data {result['train/data_wait']:.0%}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        if step - self.first >= _STEPS_BEFORE_ESTIMATE and not self.estimated:
            self.estimated = True
            minutes = (now - self.start) / (step - self.first) * (self.max_steps - self.first) / 60
            self.say(f"This will take about {minutes:.0f} minutes." if minutes >= 2 else "This will take a minute.")

    def log_validation(self, metrics: Mapping[str, Any], step: int) -> None:
        """Sends what `ReconstructionMetrics.compute` returned to the trackers, and its essence to the terminal."""
        values = {f"val/{name}": value for name, value in metrics["overall"].items()}
        for part, figures in metrics["parts"].items():
            values |= {f"val/{part}/{name}": value for name, value in figures.items()}
        tokens = metrics["tokens"]
        values["val/quantization_error"] = tokens["quantization_error"]
        for name in ("codebook_utilization", "perplexity"):
            known = [value for value in tokens[name] if value is not None]
            values[f"val/{name}"] = sum(known) / max(len(known), 1)
            per_codebook = zip(tokens["codebooks"], tokens[name], strict=True)
            values |= {f"val/{codebook}/{name}": value for codebook, value in per_codebook}
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
        shown = {name: figures["mpjpe"] for name, figures in {"all": metrics["overall"], **metrics["parts"]}.items()}
        essence = ", ".join(f"{name} {value:.2%}" for name, value in shown.items() if value is not None)
        self.say(f"step {step}: error in shoulder widths: {essence}")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside is spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes time inside does not count towards the speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Ends the bar and says how the run ended, unless an error does."""
        step = self.bar.n if self.accelerator.is_main_process else 0
        self.bar.close()
        if step < self.max_steps and kind is None:
            self.say(f"Stopped after step {step:,} of {self.max_steps:,}; the same command goes on from there.")
