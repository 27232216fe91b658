"""Checkpoint folders: one folder holds model, feature extractor and code, and `from_pretrained` loads it as it is."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .configuration_pose_tokenizer import PoseTokenizerConfig
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .modeling_pose_tokenizer import PoseTokenizerModel

CONFIG, FEATURES = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # whole, or in several files


class ModelFolderError(ValueError):
    """A model that cannot be loaded; `str` is one sentence with the folder, what is wrong and what is expected."""


def save_checkpoint(
    model: PreTrainedModel,
    feature_extractor: PoseFeatureExtractor,
    directory: str | Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a checkpoint folder that is either the old one or the new one, never half of it.

    Args:
        model: The model, unwrapped.
        feature_extractor: Its feature extractor, statistics included.
        directory: The folder; an older one of that name is replaced.
        state_dict: The weights to write where `model` does not hold them whole, as under FSDP.
    """
    directory = Path(directory)
    fresh, stale = directory.with_name(f".{directory.name}.new"), directory.with_name(f".{directory.name}.old")
    for leftover in (fresh, stale):  # of a run that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    feature_extractor.save_pretrained(fresh)  # first: a model that finds none would save one without statistics
    model.save_pretrained(fresh, state_dict=state_dict)
    if directory.exists():
        directory.rename(stale)
    fresh.rename(directory)
    shutil.rmtree(stale, ignore_errors=True)


def load_pretrained(
    model_dir_or_id: str | Path, revision: str | None = None
) -> tuple[PoseTokenizerModel, PoseFeatureExtractor]:
    """Loads what `save_checkpoint` wrote.

    Args:
        model_dir_or_id: A checkpoint folder or the name of a repository on the Hub.
        revision: Branch, tag or commit of the repository.

    Returns:
        The model in eval mode and its feature extractor.

    Raises:
        ModelFolderError: The folder or repository does not hold a pose tokenizer.
    """
    name = str(model_dir_or_id)
    if Path(name).exists():
        _check_folder(Path(name))
    elif name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ModelFolderError(f"{name}: no such folder; expected a checkpoint such as the best/ of a training run.")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a small model is there at once
    try:
        model, report = PoseTokenizerModel.from_pretrained(
            name, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
        )
        feature_extractor = PoseFeatureExtractor.from_pretrained(name, revision=revision)
    except (
        OSError,
        HFValidationError,
        SafetensorError,
        RuntimeError,
        ValueError,
        StrictDataclassError,
        MemoryError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ModelFolderError(f"{name}: no pose tokenizer can be loaded from it ({reason[:300]}).") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    # transformers would go on with random weights in their place.
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if wrong:
        raise ModelFolderError(f"{name}: the weights do not fit {CONFIG} ({len(wrong)} of them, such as {wrong[0]}).")
    return model.eval(), feature_extractor


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: is a file; expected the folder that holds it.")
    missing = [name for name in (CONFIG, FEATURES) if not (folder / name).is_file()]
    missing += [] if any((folder / name).is_file() for name in WEIGHTS) else [WEIGHTS[0]]
    if missing:
        nested = [name for name in ("best", "last") if (folder / name / CONFIG).is_file()]
        advice = (
            f"did you mean {folder / nested[0]}" if nested else "expected a checkpoint such as best/ of a training run"
        )
        raise ModelFolderError(f"{folder}: {', '.join(missing)} missing; {advice}.")
    try:
        model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelFolderError(f"{folder / CONFIG}: is not a JSON object ({error}).") from error
    if model_type != PoseTokenizerConfig.model_type:
        raise ModelFolderError(
            f"{folder}: holds a model of type {model_type}; expected {PoseTokenizerConfig.model_type}."
        )
