"""Train a pose tokenizer.

    accelerate launch training/train.py --config configuration/small.yaml --data.path DIR --training.output_dir DIR
    torchrun --nproc_per_node=2 training/train.py --config configuration/default.yaml ...
    python training/train.py ...                     # one process

DIR of the data holds train/ and val/ with npz files (`poses` (T, N, D), optional `mask` (T,) and `fps`) or packed
shards of them; `--data.streaming true` reads training shards without a cache, `hf://datasets/USER/NAME` too. A
configuration says only what differs from configuration/default.yaml; every key can be given on the
command line (`--model.hidden_size 64`), and --help lists them. training/accelerate/README.md says
which launch to take: CPU, one GPU, several, FSDP, several machines, SLURM.

The output folder receives

    best/ last/     models that `from_pretrained` loads as they are: weights, feature extractor, code
    checkpoints/    what the same command goes on from after the run was stopped or killed
    log.jsonl       the numbers that the tracker gets too, and pictures/ of reconstructions
    config.yaml     the whole configuration; `--config` of it repeats the run
    rejected.jsonl  files that could not be used, and why

`--dry-run` writes nothing: it checks configuration and data, tries a few steps and a validation, and says what the
whole run will cost. Nothing goes wrong in silence: a step whose loss or gradient is no finite number is skipped and
counted (`train/skipped_steps`), ten in a row end the run and name the sequences; a codebook that collapses is named.

SIGTERM and Ctrl-C finish the step, save and end the run; the same command goes on. A mistake in the configuration or
the data ends it before anything is written, with one sentence and exit code 1.

`--hub.push true --hub.repo_id USER/NAME` publishes best/ at the end, `--hub.every N` every N steps too; a push that
fails is said at the end, with the command that repeats it and exit code 1.
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import gc
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import send_to_device, set_seed
from torch.utils.data import DataLoader, Subset
from transformers.utils import logging as transformers_logging

from modeling_pose_tokenizer.checkpoints import (
    Progress,
    StopSignal,
    WeightAverage,
    load_state,
    newest_state,
    save_state,
)
from modeling_pose_tokenizer.dataset import PoseDataset, collate
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.hub import save_checkpoint
from modeling_pose_tokenizer.metrics import ReconstructionMetrics
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.preparation import (
    TrainSet,
    check_output,
    load_data,
    make_accelerator,
    make_loader,
    make_optimizer,
    make_scheduler,
    prepare_output,
)
from modeling_pose_tokenizer.presets import RunConfig, RunConfigError, load_run_config
from modeling_pose_tokenizer.publishing import RunPublisher
from modeling_pose_tokenizer.shards import PoseStream
from modeling_pose_tokenizer.tracking import Meter, describe, describe_codes, log_pictures, start_trackers
from modeling_pose_tokenizer.watching import TrainingError, TrainingWatch, describe_cost


@dataclass
class Parts:
    """What a run is made of, as accelerate wrapped it."""

    accelerator: Accelerator
    output_dir: Path
    feature_extractor: PoseFeatureExtractor
    train_set: TrainSet
    val_set: PoseDataset
    loader: DataLoader
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    max_steps: int
    checkpoint: Path | None

    @property
    def core(self) -> PoseTokenizerModel:
        """The model itself."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def train(run: RunConfig) -> bool:
    """One run, from reading the data to the last checkpoint; False if that could not be published."""
    options, parts = run.training, prepare(run)
    accelerator, output_dir, max_steps = parts.accelerator, parts.output_dir, parts.max_steps
    average, progress = WeightAverage(parts.model.parameters(), options.weights_ema_decay), Progress()
    states = {"average": average, "progress": progress}
    set_seed(options.seed, device_specific=True)  # another on every rank: they drop and revive other codes

    # Resume
    if parts.checkpoint is not None:
        load_state(accelerator, parts.checkpoint, states)
    describe(accelerator, run, parts.train_set, parts.val_set, progress.step, max_steps)
    meter = Meter(accelerator, progress.step, max_steps)
    watch = TrainingWatch(accelerator, progress, parts.train_set.folder, run.model_config())
    batches = endless_batches(parts, progress)
    if run.dry_run:
        rehearse(run, parts, batches, meter, watch)
        return True
    start_trackers(accelerator, run, progress.step)
    publisher = RunPublisher(run.hub, output_dir / "best", meter)

    # Loop
    last = progress.step >= max_steps
    with meter, StopSignal(accelerator, options.log_every) as stop:
        while not last:
            values = train_step(run, parts, batches, meter, watch)
            average.update()
            progress.step += 1
            last = stop.asked(progress.step) or progress.step == max_steps
            if progress.step % options.log_every == 0 or last:
                meter.log(values | describe_codes(parts.core.quantizer.codebook_usage()), progress.step)
                for sentence in watch.find_collapsed():
                    meter.say(sentence)
            if progress.step % options.eval_every == 0 or progress.step == max_steps:
                with average.in_place(), meter.paused():
                    error = validate(run, parts, meter, progress.step)
                    if error < progress.best:
                        progress.best = error
                        save(parts, output_dir / "best")
            if progress.step % options.save_every == 0 or last:
                with average.in_place(), meter.paused():
                    save(parts, output_dir / "last")
                with meter.paused():
                    save_state(accelerator, output_dir / "checkpoints", progress.step, options.max_checkpoints, states)
            publisher.follow(progress.step)
    for tracker in accelerator.trackers:
        tracker.finish()
    return progress.step < max_steps or publisher.finish()


def prepare(run: RunConfig) -> Parts:
    """Reads the data and builds everything; a model that goes on from no checkpoint is fitted to the first batches."""
    options, output_dir = run.training, check_output(run)
    accelerator = make_accelerator(run, output_dir)
    set_seed(options.seed)  # the same on every rank: they build the same model
    feature_extractor, train_set, val_set = load_data(run, accelerator)
    model = PoseTokenizerModel(run.model_config()).to(accelerator.device)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = make_optimizer(run, model)
    loader = make_loader(run, train_set, accelerator.num_processes)
    if not run.data.streaming:  # a stream is dealt out already
        loader = accelerator.prepare(loader)
    max_steps = options.max_steps or -(-options.num_epochs * len(loader) // options.gradient_accumulation_steps)
    scheduler = make_scheduler(run, optimizer, max_steps)
    if not run.dry_run:
        prepare_output(run, accelerator, output_dir, train_set)
    checkpoint = newest_state(accelerator, output_dir / "checkpoints")
    if checkpoint is None:
        num_batches = min(options.init_batches, 8) if run.dry_run else options.init_batches
        model.initialize_from_data(islice(first_batches(run, train_set), num_batches))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    return Parts(
        accelerator, output_dir, feature_extractor, train_set, val_set,
        loader, model, optimizer, scheduler, max_steps, checkpoint,
    )  # fmt: skip


def first_batches(run: RunConfig, train_set: TrainSet) -> Iterator[dict[str, Any]]:
    """Batches that are the same however many ranks there are; each epoch augments anew."""
    if isinstance(train_set, PoseStream):
        train_set = train_set.of_rank(0, 1)
    loader = make_loader(run, train_set, num_ranks=1)
    for epoch in count():
        train_set.set_epoch(epoch)
        yield from loader


def endless_batches(parts: Parts, progress: Progress) -> Iterator[dict[str, Any]]:
    """Batches of this epoch from where `progress` stands, then of the next, and so on."""
    loader, skip = parts.loader, parts.accelerator.skip_first_batches
    while True:
        parts.train_set.set_epoch(progress.epoch)
        if hasattr(loader, "set_epoch"):  # accelerate's own kind
            loader.set_epoch(progress.epoch)
        for batch in skip(loader, progress.batch) if progress.batch else loader:
            progress.batch += 1
            yield send_to_device(batch, parts.accelerator.device)
        if progress.batch == 0:
            raise PoseDataError(f"{parts.train_set.folder} gives this rank no sequence; use fewer ranks.")
        progress.epoch, progress.batch = progress.epoch + 1, 0


def train_step(
    run: RunConfig, parts: Parts, batches: Iterator[dict[str, Any]], meter: Meter, watch: TrainingWatch
) -> dict[str, torch.Tensor]:
    """One step of the optimizer; returns what the log shows of it."""
    accelerator, model = parts.accelerator, parts.model
    values = {"train/learning_rate": torch.tensor(parts.scheduler.get_last_lr()[0])}
    for _ in range(run.training.gradient_accumulation_steps):
        with meter.waiting():
            batch = next(batches)
        with accelerator.accumulate(model):
            output = model(batch["input_values"], batch["padding_mask"])
            accelerator.backward(output.loss)
            watch.see(batch, output.loss, output.pose_codes)
            if accelerator.sync_gradients:
                limit = run.training.max_grad_norm or math.inf
                values["train/grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), limit)
                if (
                    watch.passes(values["train/grad_norm"]) or accelerator.scaler
                ):  # fp16's scaler passes over by itself
                    parts.optimizer.step()
                    if not accelerator.optimizer_step_was_skipped:
                        parts.scheduler.step()
            parts.optimizer.zero_grad()
        meter.count(batch["padding_mask"].sum())
    values["train/skipped_steps"] = torch.tensor(watch.progress.skipped)
    return values | {"train/loss": output.loss} | {f"train/{name}": term for name, term in output.losses.items()}


@torch.no_grad()
def validate(run: RunConfig, parts: Parts, meter: Meter, step: int) -> float:
    """Logs metrics and pictures of the validation set; returns the mean keypoint error in shoulder widths."""
    accelerator, val_set, core = parts.accelerator, parts.val_set, parts.core.eval()
    rank, ranks, size = accelerator.process_index, accelerator.num_processes, run.training.batch_size
    windows = torch.linspace(0, len(val_set) - 1, min(run.data.val_windows or len(val_set), len(val_set))).long()
    # Every rank runs as many windows, as sharded models need; those over the end are masked and count for nothing.
    mine = torch.arange(rank, len(windows) + -len(windows) % ranks, ranks)
    loader = DataLoader(Subset(val_set, windows[mine % len(windows)].tolist()), size, collate_fn=collate)
    metrics = ReconstructionMetrics(core.config.layout, core.config)
    drawn: list[tuple[str, np.ndarray, np.ndarray]] = []
    for batch, numbers in zip(loader, mine.split(size), strict=True):
        values = batch["input_values"].to(accelerator.device)
        mask = (batch["padding_mask"] * (numbers < len(windows))[:, None]).to(accelerator.device)
        output = core(values, mask)
        metrics.update(output.pose_values, values, mask, batch["scale"])
        metrics.update_codes(output.pose_codes, core.get_pose_codes_mask(mask), output.quantization_error)
        for row in range(min(len(values), run.tracking.pictures - len(drawn))):
            drawn.append((batch["id"][row], values[row].cpu().numpy(), output.pose_values[row].float().cpu().numpy()))
    core.train()
    total = metrics.reduce()
    figures = total.compute()
    meter.log_validation(figures, step)
    log_pictures(accelerator, drawn, total, step)
    error = figures["overall"]["mpjpe"]
    return math.inf if error is None else error


def save(parts: Parts, folder: Path) -> None:
    """A folder that `from_pretrained` loads as it is."""
    weights = parts.accelerator.get_state_dict(parts.core)  # gathers what is sharded
    if parts.accelerator.is_main_process:
        save_checkpoint(parts.core, parts.feature_extractor, folder, weights)
    parts.accelerator.wait_for_everyone()


def rehearse(
    run: RunConfig, parts: Parts, batches: Iterator[dict[str, Any]], meter: Meter, watch: TrainingWatch
) -> None:
    """A few steps and a validation, of which nothing is kept, and what the whole run will cost."""
    train_step(run, parts, batches, meter, watch)  # allocates, compiles
    start = time.perf_counter()
    for _ in range(3):
        train_step(run, parts, batches, meter, watch)
    seconds = (time.perf_counter() - start) / 3
    validate(run, parts, meter, meter.first)
    steps = parts.max_steps - meter.first
    meter.say(
        describe_cost(parts.accelerator, parts.core, parts.output_dir, steps, seconds, run.training.max_checkpoints)
    )
    meter.bar.close()


def main(args: list[str]) -> int:
    transformers_logging.disable_progress_bar()  # of every file that is saved
    try:
        published = train(load_run_config(args))
        # Not before the model is gone: if that held gloo last, it would wait for a thread that may wait for Python.
        gc.collect()
        PartialState().destroy_process_group()
        return 0 if published else 1
    except (RunConfigError, PoseDataError, TrainingError) as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    stopped = "the same command begins again, from the newest checkpoint if there is one."
    run_command(lambda: main(sys.argv[1:]), stopped)
