"""Run configuration: what a training run reads from YAML presets and the command line, checked key by key.

Layers, later over earlier: the defaults below, `configuration/default.yaml`, every `--config FILE` in order, dotted
options such as `--model.hidden_size 64`. A preset therefore says only what differs from the default.
"""

import argparse
import dataclasses
import difflib
import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from .configuration_pose_tokenizer import PoseTokenizerConfig
from .skeleton_files import SKELETON_KEYS, is_skeleton_file, read_skeleton
from .yaml_files import load_yaml

DEFAULT_PRESET = Path(__file__).parents[1] / "configuration" / "default.yaml"

# Keys documented by the original project, and other names of the model's keys -> where they live here. They are
# accepted at top level and in any section.
ALIASES = {alias: f"model.{name}" for alias, name in PoseTokenizerConfig.attribute_map.items()} | {
    "num_keypoints": "model.num_keypoints",
    "keypoint_dim": "model.keypoint_dim",
    "hidden_dim": "model.hidden_size",
    "num_quantizers": "model.num_quantizers",
    "codebook_size": "model.codebook_size",
    "reconstruction_weight": "model.reconstruction_weight",
    "quantization_weight": "model.quantization_weight",
    "perceptual_weight": "model.perceptual_weight",
    "temporal_weight": "model.temporal_weight",
    "sequence_length": "data.sequence_length",
    "num_workers": "data.num_workers",
    "pin_memory": "data.pin_memory",
    "batch_size": "training.batch_size",
    "num_epochs": "training.num_epochs",
    "learning_rate": "training.learning_rate",
    "optimizer_type": "training.optimizer_type",
    "scheduler_type": "training.scheduler_type",
    "use_amp": "training.use_amp",
}

OPTIMIZERS = Literal["adamw", "adam", "sgd"]
SCHEDULERS = Literal[
    "warmup_cosine",
    "cosine",
    "cosine_with_restarts",
    "linear",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
]


class RunConfigError(ValueError):
    """A configuration that cannot be run; `str` is one sentence with the key, what was found and what is expected."""


def option(default: Any, help: str, least: float | None = None, most: float | None = None) -> Any:
    """A field of a section with its help text and the closed range of its values."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass
class DataOptions:
    """Where the poses come from and how they are cut; the folder holds train/ and val/ (see `PoseDataset`)."""

    path: str | None = option(None, "folder with train/ and val/ of npz files or packed shards")
    train_split: str = option("train", "folder of the training sequences")
    val_split: str = option("val", "folder of the validation sequences")
    sequence_length: int | None = option(64, "frames of a training window; null: whole sequences", least=1)
    val_windows: int | None = option(None, "validate on so many windows only, spread evenly", least=1)
    streaming: bool = option(False, "read the training shards as a stream, from path or hf://datasets/USER/NAME")
    shuffle_buffer: int = option(10_000, "streaming: windows that are held to shuffle them", least=0)
    cache_dir: str | None = option(None, "where prepared sequences are kept; null: the cache of `datasets`")
    num_proc: int | None = option(None, "processes that prepare the sequences", least=1)
    strict: bool = option(False, "stop at the first file that cannot be used")
    max_rejected: float = option(0.01, "stop beyond this share of files that cannot be used", least=0, most=1)
    num_workers: int = option(0, "data loading processes of a rank", least=0)
    pin_memory: bool = option(False, "load batches into page-locked memory (GPU)")


@dataclass
class AugmentationOptions:
    """What `PoseAugmentation` does to a training window; 0 turns a term off."""

    flip: float = option(0.5, "probability of mirroring left and right", least=0, most=1)
    rotation: float = option(5.0, "largest turn in the image plane, degrees", least=0)
    scale: float = option(0.1, "largest relative change of size", least=0)
    translation: float = option(0.05, "largest shift, shoulder widths", least=0)
    noise: float = option(0.0, "standard deviation of added noise, shoulder widths", least=0)
    missing: float = option(0.02, "probability, for each hand, to go missing for a while", least=0, most=1)
    speed: float = option(0.1, "largest relative change of speed", least=0)


@dataclass
class TrainingOptions:
    """How long, how fast and how often."""

    output_dir: str | None = option(None, "folder that receives best/, last/, checkpoints/ and the log")
    num_threads: int | None = option(None, "CPU threads of a rank; 0: share the cores; null: as launched", least=0)
    num_epochs: int = option(100, "passes over the training sequences, unless max_steps is given", least=1)
    max_steps: int | None = option(None, "optimizer steps of the whole run", least=1)
    batch_size: int = option(32, "windows per rank and forward pass", least=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", least=1)
    learning_rate: float = option(1e-3, "peak learning rate", least=0)
    optimizer_type: OPTIMIZERS = option("adamw", "optimizer")  # noqa: RUF009
    weight_decay: float = option(0.01, "decay of matrices, not of biases, norms and single vectors", least=0)
    scheduler_type: SCHEDULERS = option("warmup_cosine", "learning rate schedule")  # noqa: RUF009
    scheduler_options: dict[str, Any] | None = option(None, "more arguments of the schedule")  # noqa: RUF009
    warmup_steps: float = option(0.05, "steps of rising learning rate; below 1: share of the run", least=0)
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: do not", least=0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "null: what accelerate launch says")
    use_amp: bool = option(False, "mixed precision of the kind that the device has")
    compile: bool = option(False, "torch.compile the model")
    gradient_checkpointing: bool = option(False, "recompute blocks in the backward pass to save memory")
    weights_ema_decay: float = option(0.999, "decay of the averaged weights, which are saved", least=0, most=1)
    init_batches: int = option(128, "batches that fit the linear path, the prediction and the codebooks", least=1)
    seed: int = option(0, "seed of everything random", least=0)
    log_every: int = option(10, "steps between two lines of the log", least=1)
    eval_every: int = option(1000, "steps between two validations", least=1)
    save_every: int = option(1000, "steps between two checkpoints", least=1)
    max_checkpoints: int = option(2, "checkpoints that are kept", least=1)
    resume: bool = option(True, "go on from the newest whole checkpoint in output_dir, where there is one")


@dataclass
class TrackingOptions:
    """Where numbers and pictures go, beside log.jsonl in the output folder."""

    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "experiment tracker")
    project: str = option("pose-tokenizer", "project name in the tracker")
    run_name: str | None = option(None, "name of the run in the tracker")
    offline: bool = option(False, "wandb: keep the run on this machine, to be synchronised later")
    pictures: int = option(2, "reconstructed sequences drawn at each validation", least=0)


@dataclass
class HubOptions:
    """Publishing the best model on the Hub; who you are is known by HF_TOKEN or `hf auth login`."""

    push: bool = option(False, "publish best/ at the end of the run")
    repo_id: str | None = option(None, "the repository, USER/NAME; made if there is none")
    private: bool = option(False, "nobody else can see the repository")
    every: int | None = option(None, "publish best/ every so many steps too", least=1)


SECTIONS = {
    "data": DataOptions,
    "augmentation": AugmentationOptions,
    "training": TrainingOptions,
    "tracking": TrackingOptions,
    "hub": HubOptions,
}


@dataclass
class RunConfig:
    """One training run: `model` holds the given keys of [`PoseTokenizerConfig`], the rest is complete."""

    model: dict[str, Any] = field(default_factory=dict)
    data: DataOptions = field(default_factory=DataOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    dry_run: bool = False  # no key of a preset: a run is not rehearsed twice

    def model_config(self) -> PoseTokenizerConfig:
        """The model's configuration; an impossible one is a `RunConfigError`."""
        try:
            return PoseTokenizerConfig(**self.model)
        except Exception as error:  # `@strict` wraps what the validator raised
            reason = error.__cause__ or error
            raise RunConfigError(f"model: {' '.join(str(reason).split())}") from error

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{section: {key: plain value}}."""
        sections = {name: value for name, value in dataclasses.asdict(self).items() if name != "dry_run"}
        return json.loads(json.dumps(sections))

    def to_yaml(self) -> str:
        """The whole run as a preset: `--config` of this text repeats it."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_run_config(args: Sequence[str]) -> RunConfig:
    """Reads a run from command-line arguments.

    Args:
        args: `--config FILE` (repeatable), `--dry-run` and dotted options, as in `sys.argv[1:]`.

    Returns:
        The run. `--help` prints the manual and ends the program.

    Raises:
        RunConfigError: An unknown, doubled or mistyped key, a value out of range or an unreadable file.
    """
    files_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files_parser.add_argument("--config", action="append", default=[])
    files_parser.add_argument("--dry-run", action="store_true")
    files, options = files_parser.parse_known_args(args)
    presets = [*([DEFAULT_PRESET] if DEFAULT_PRESET.is_file() else []), *map(Path, files.config)]
    texts: dict[str, str] = {}
    origins: dict[str, str] = {}
    for path in presets:
        for key, text in read_preset(path).items():
            texts[key], origins[key] = text, str(path)
    options = [_rename_option(token) for token in options]
    origins |= {token[2:].split("=")[0]: "command line" for token in options if token.startswith("--")}
    # Files and command line take the same way through the parser, so that they mean and refuse the same.
    values = _parse([f"--{key}={text}" for key, text in texts.items()] + options, origins)
    run = RunConfig(
        model=_open_skeleton({key: values[f"model.{key}"] for key in model_types() if f"model.{key}" in origins}),
        **{
            name: section(**{entry.name: values[f"{name}.{entry.name}"] for entry in dataclasses.fields(section)})
            for name, section in SECTIONS.items()
        },
        dry_run=files.dry_run,
    )
    _check_ranges(run, origins)
    return run


def _open_skeleton(model: dict[str, Any]) -> dict[str, Any]:
    """The model's keys with a skeleton file's content in place of its name, so that a run's record is whole."""
    path = model.get("skeleton")
    if not is_skeleton_file(path):
        return model
    twice = [key for key in SKELETON_KEYS if model.get(key) is not None]
    if twice:
        raise RunConfigError(f"model.skeleton is {path} and model.{twice[0]} is given too; give one of them.")
    try:
        return model | {"skeleton": None} | read_skeleton(str(path))
    except ValueError as error:
        raise RunConfigError(f"model.skeleton: {error}") from error


def read_preset(path: str | Path) -> dict[str, str]:
    """Reads one YAML file.

    Args:
        path: A file of sections `model`, `data`, `augmentation`, `training`, `tracking`, `hub`; keys of `ALIASES` may
            stand at top level or in any section.

    Returns:
        {"section.key": value as text on a command line}.

    Raises:
        RunConfigError: See `load_run_config`.
    """
    try:
        content = load_yaml(path)
    except ValueError as error:
        raise RunConfigError(str(error)) from error
    if not isinstance(content, dict | None):
        raise RunConfigError(f"{path}: holds a {type(content).__name__}; expected sections with keys under them.")
    texts: dict[str, str] = {}
    for name, value in _flatten(content or {}, path):
        key = resolve_key(name, str(path))
        if key in texts:
            raise RunConfigError(f"{path}: {key} is given twice (once as {name}); keep one.")
        texts[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return texts


def resolve_key(name: str, origin: str = "command line") -> str:
    """The full key of a name, which may be one of `ALIASES`; unknown names are refused with the nearest valid one."""
    known = known_keys()
    section, _, leaf = name.rpartition(".")
    if name in known:
        return name
    if leaf in ALIASES and section in ("", "model", *SECTIONS):
        return ALIASES[leaf]
    leaves = ALIASES | {key.rpartition(".")[2]: key for key in known}
    leaves |= {key.rpartition(".")[2]: key for key in known if key.startswith(f"{section}.")}  # its own section wins
    own = [key.rpartition(".")[2] for key in known if key.startswith(f"{section}.")]
    close = difflib.get_close_matches(leaf, own, n=1, cutoff=0.75)  # a slip of one letter
    close = close or difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5)
    advice = f"the nearest valid one is {leaves[close[0]]}" if close else "--help lists all"
    raise RunConfigError(f"{origin}: unknown key {name}; {advice}.")


def model_types() -> dict[str, Any]:
    """Name and type of the keys that [`PoseTokenizerConfig`] adds to its parent."""
    return inspect.get_annotations(PoseTokenizerConfig, eval_str=True)


def known_keys() -> list[str]:
    """Every full key, `section.key`."""
    sections = [f"{name}.{entry.name}" for name, section in SECTIONS.items() for entry in dataclasses.fields(section)]
    return [f"model.{name}" for name in model_types()] + sections


def _parse(args: list[str], origins: dict[str, str]) -> dict[str, Any]:
    """{"section.key": typed value}; an error names the key, the value, its type and where it was given."""
    parser, types = _build_parser()
    try:
        return vars(parser.parse_args(args).as_flat())
    except ArgumentError as error:
        text = " ".join(str(error).split())
        key = next((word.strip("\"':") for word in text.split() if word.strip("\"':") in types), None)
        if key is None:
            raise RunConfigError(f"command line: {text}; see --help.") from error
        given = [arg.split("=", 1)[1] for arg in args if arg.startswith(f"--{key}=")]
        given += [value for arg, value in itertools.pairwise(args) if arg == f"--{key}"]
        raise RunConfigError(
            f"{origins.get(key, 'command line')}: {key} is {given[-1]}; expected {_describe(types[key])}."
        ) from error


def _build_parser() -> tuple[ArgumentParser, dict[str, Any]]:
    """The parser of every key, and {"section.key": type}."""
    parser = ArgumentParser(
        prog="training/train.py",
        usage="training/train.py --config FILE --data.path DIR --training.output_dir DIR [--section.key VALUE ...]",
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML preset over default.yaml; repeated: later ones win")
    parser.add_argument("--dry-run", action="store_true", help="try a few steps, write nothing, say what a run costs")
    types = {f"model.{name}": hint for name, hint in model_types().items()}
    defaults = {entry.name: entry.default for entry in dataclasses.fields(PoseTokenizerConfig)}
    group = parser.add_argument_group("model: the keys of PoseTokenizerConfig, which explains them")
    for name, hint in model_types().items():
        group.add_argument(f"--model.{name}", type=hint, default=defaults[name])
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(f"{name}: {(section.__doc__ or '').rstrip('.')}")
        hints = get_type_hints(section)
        for entry in dataclasses.fields(section):
            types[key := f"{name}.{entry.name}"] = hints[entry.name]
            group.add_argument(f"--{key}", type=types[key], default=entry.default, help=entry.metadata["help"])
    return parser, types


def _describe(hint: Any) -> str:
    """A type in words: `one of adamw, adam, sgd`, `int`, `str | None`."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return " | ".join(map(_describe, get_args(hint))) if get_origin(hint) in (Union, UnionType) else str(hint)


def _check_ranges(run: RunConfig, origins: dict[str, str]) -> None:
    for name in SECTIONS:
        section = getattr(run, name)
        for entry in dataclasses.fields(section):
            key, value = f"{name}.{entry.name}", getattr(section, entry.name)
            least, most = entry.metadata["least"], entry.metadata["most"]
            if value is None or least is None:
                continue
            if not value >= least or (most is not None and value > most):
                expected = f"at least {least}" if most is None else f"{least} to {most}"
                raise RunConfigError(f"{origins.get(key, 'default')}: {key} is {value}; expected {expected}.")


def _rename_option(token: str) -> str:
    """`--hidden_dim=64` -> `--model.hidden_size=64`; values and --help pass."""
    if not token.startswith("--") or token == "--help":
        return token
    name, equals, value = token[2:].partition("=")
    return f"--{resolve_key(name)}{equals}{value}"


def _flatten(content: dict[str, Any], path: str | Path) -> Iterator[tuple[str, Any]]:
    """(name, value): sections are opened, values that are mappings themselves stay whole."""
    for name, value in content.items():
        if name not in ("model", *SECTIONS):
            yield str(name), value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        elif value is not None:
            raise RunConfigError(f"{path}: section {name} is {value!r}; expected keys under it.")
