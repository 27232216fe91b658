"""What a training run is made of: each function makes one thing from the run's configuration.

What cannot be made is refused in one sentence, before anything is written.
"""

import math
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils.data import DataLoader
from transformers import get_scheduler

from .augmentation import PoseAugmentation
from .batching import LengthBatchSampler
from .dataset import PoseDataset, collate
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .formats import PoseDataError
from .presets import RunConfig, RunConfigError, load_run_config
from .shards import PoseStream, download_split, is_on_hub
from .tracking import LogFile, check_tracker

TrainSet = PoseDataset | PoseStream

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.99)}),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.99)}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


def check_output(run: RunConfig) -> Path:
    """The output folder: one that can be written, and holds no other run. Nothing is written yet."""
    options = run.training
    if options.output_dir is None:
        raise RunConfigError("training.output_dir is not given; say where to write, --training.output_dir DIR.")
    folder = Path(options.output_dir)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunConfigError(f"training.output_dir is {folder}, but {existing} is no folder that can be written.")
    if not options.resume and any(folder.glob("checkpoints/step-*")):
        raise RunConfigError(f"{folder} holds a run and training.resume is false; name another training.output_dir.")
    if (folder / "config.yaml").exists():
        earlier = load_run_config(["--config", str(folder / "config.yaml")]).model_config().to_dict()
        for key, value in run.model_config().to_dict().items():
            if value != earlier[key]:
                raise RunConfigError(
                    f"{folder} holds a run whose model.{key} is {earlier[key]}, and now it is {value}; "
                    "name another training.output_dir."
                )
    return folder


def prepare_output(run: RunConfig, accelerator: Accelerator, folder: Path, train_set: TrainSet) -> None:
    """Makes the output folder: the first thing that is written."""
    try:
        if accelerator.is_main_process:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(run.to_yaml(), "utf-8")
            train_set.write_rejected(folder)
    except OSError as error:
        raise RunConfigError(f"training.output_dir is {folder}, which cannot be written ({error}).") from error
    accelerator.wait_for_everyone()


def check_hub(run: RunConfig) -> None:
    """Refuses at once what would fail after the last step: no repository, or nobody who may write there."""
    options = run.hub
    if not options.push:
        return
    try:
        validate_repo_id(options.repo_id or "")
    except HFValidationError as error:
        raise RunConfigError(f"hub.repo_id is {options.repo_id}; expected USER/NAME, as hub.push is true.") from error
    if get_token() is None:
        raise RunConfigError("hub.push is true, but there is no token; set HF_TOKEN, or say `hf auth login`.")


def make_accelerator(run: RunConfig, folder: Path) -> Accelerator:
    """Device, ranks, precision, accumulation, trackers; what the configuration leaves open is the launcher's."""
    check_tracker(run)
    check_hub(run)
    options = run.training
    # DDP on an argument of ours that has no substitute yet, and on the gradients of depthwise convolutions.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated|Grad strides do not match")
    if options.num_threads is not None:
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(options.num_threads or max(1, share))
    tracker = [] if run.tracking.tracker == "none" else [run.tracking.tracker]
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    if kind != "FULL_STATE_DICT":
        raise RunConfigError(f"fsdp_state_dict_type is {kind}, which only unpickling reads; expected FULL_STATE_DICT.")
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # said, or ranks that torchrun starts would not find each other
            mixed_precision=choose_precision(run),
            # Of a training step with dynamic shapes torch 2.13's inductor makes no code for a CPU.
            dynamo_plugin=TorchDynamoPlugin(backend="inductor", dynamic=False) if options.compile else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                options.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=options.seed, non_blocking=run.data.pin_memory
            ),
            step_scheduler_with_optimizer=False,  # a step is a step, whatever the number of ranks
            log_with=[LogFile(folder), *tracker],
            project_dir=str(folder),
            kwargs_handlers=[
                # The quantizer sums its statistics over ranks itself.
                DistributedDataParallelKwargs(broadcast_buffers=False),
                # Preparing a large corpus takes its time.
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            ],
        )
    except ValueError as error:  # such as fp16 without a GPU
        raise RunConfigError(f"training: {error}") from error
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and accelerator.distributed_type != DistributedType.FSDP and accelerator.is_main_process:
        warnings.warn(
            f"The launcher asks for FSDP, but accelerate does not shard on {accelerator.device.type} with "
            f"{accelerator.num_processes} processes: every rank holds the whole model.",
            stacklevel=2,
        )
    return accelerator


def choose_precision(run: RunConfig) -> str | None:
    """What to compute in; None: what the launcher says."""
    precision: str | None = run.training.mixed_precision
    if precision is None and run.training.use_amp:
        precision = "fp16" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else "bf16"
    return precision


def load_data(run: RunConfig, accelerator: Accelerator) -> tuple[PoseFeatureExtractor, TrainSet, PoseDataset]:
    """The feature extractor with the statistics of the training data, the training and the validation set."""
    if run.data.path is None:
        raise RunConfigError("data.path is not given; say where train/ and val/ are, --data.path DIR.")
    if run.data.streaming and (run.training.max_steps is None or run.data.sequence_length is None):
        key = "training.max_steps" if run.training.max_steps is None else "data.sequence_length"
        raise RunConfigError(
            f"{key} is null, but data.streaming is true; a stream's length is unknown, give a number."
        )
    if is_on_hub(run.data.path) and not run.data.streaming:
        raise RunConfigError(f"data.path is {run.data.path}, on the Hub; say --data.streaming true, or download it.")
    config = run.model_config()
    feature_extractor = PoseFeatureExtractor.from_config(config)
    shared: dict[str, Any] = {
        "feature_extractor": feature_extractor,
        "sequence_length": run.data.sequence_length,
        "strict": run.data.strict,
        "max_rejected": run.data.max_rejected,
        "seed": run.training.seed,
    }
    kind: type[TrainSet] = PoseDataset
    cached: dict[str, Any] = {"cache_dir": run.data.cache_dir, "num_proc": run.data.num_proc}
    windows: dict[str, Any] = {
        "random_windows": True,
        "augmentation": PoseAugmentation(config.layout, **vars(run.augmentation)),
    }
    own = cached
    if run.data.streaming:
        kind = PoseStream
        own = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        own |= {"shuffle_buffer": run.data.shuffle_buffer}
    try:
        train_set = kind(run.data.path, run.data.train_split, fit=True, **windows, **shared, **own)
    except PoseDataError:
        raise
    except ValueError as error:
        # Nothing to measure: either no file can be used, which is said here, or the layout's reference is never seen.
        train_set = kind(run.data.path, run.data.train_split, **windows, **shared, **own)
        warnings.warn(f"The feature extractor has no statistics: {error}", stacklevel=2)
    root = download_split(run.data.path, run.data.val_split) if is_on_hub(run.data.path) else run.data.path
    val_set = PoseDataset(root, run.data.val_split, random_windows=False, **shared, **cached)
    return feature_extractor, train_set, val_set


def make_loader(run: RunConfig, train_set: TrainSet, num_ranks: int) -> DataLoader:
    """Shuffled windows, or whole sequences of like length; their order depends on the seed and the epoch alone.

    A stream is one rank's already.
    """
    batch_size = run.training.batch_size
    if isinstance(train_set, PoseStream):
        batches: dict[str, Any] = {"batch_size": batch_size}
    elif run.data.sequence_length is None:
        # As many frames as a batch of windows of the mean length would have.
        max_frames = math.ceil(batch_size * train_set.lengths.mean())
        batches = {"batch_sampler": LengthBatchSampler(train_set, max_frames)}
    else:
        drop_last = len(train_set) >= batch_size * num_ranks
        batches = {"batch_size": batch_size, "shuffle": True, "drop_last": drop_last}
    return DataLoader(
        train_set,
        **batches,
        collate_fn=collate,
        # Its own generator: starting an epoch must not draw from the one that a checkpoint restores.
        generator=torch.Generator().manual_seed(run.training.seed),
        num_workers=run.data.num_workers,
        persistent_workers=run.data.num_workers > 0,
        pin_memory=run.data.pin_memory and torch.cuda.is_available(),
    )


def make_optimizer(run: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Decays matrices only: not biases, norms, edge importances or the pose that stands for a missing one."""
    decayed: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        (decayed if name.endswith("weight") and parameter.ndim > 1 else others).append(parameter)
    kind, arguments = OPTIMIZERS[run.training.optimizer_type]
    groups = [{"params": decayed, "weight_decay": run.training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # All weights of a group in one pass, not one per term of the update. Under fp16 it would pass over a step by
    # itself, and nobody would know that the schedule must wait.
    fused = (choose_precision(run) or os.environ.get("ACCELERATE_MIXED_PRECISION")) != "fp16"
    return kind(groups, lr=run.training.learning_rate, fused=fused, **arguments)


def make_scheduler(
    run: RunConfig, optimizer: torch.optim.Optimizer, max_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over `max_steps` steps of the optimizer, whatever the number of ranks."""
    options = run.training
    warmup = options.warmup_steps if options.warmup_steps >= 1 else options.warmup_steps * max_steps
    name = "cosine" if options.scheduler_type == "warmup_cosine" else options.scheduler_type
    try:
        return get_scheduler(name, optimizer, round(warmup), max_steps, options.scheduler_options)
    except (TypeError, ValueError) as error:
        raise RunConfigError(f"training.scheduler_options do not suit {name}: {error}.") from error
