"""Cards of what goes to the Hub: of a model from its figures and what its owner says, of tokens from their manifest.

A card invents nothing: what it needs and cannot find is asked for in one sentence.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from .configuration_pose_tokenizer import PoseTokenizerConfig
from .formats import FilePath
from .presets import RunConfig, RunConfigError, load_run_config
from .saving_pose_tokenizer import TAGS, usage

METRICS, RUN, DESCRIPTION = "metrics.json", "config.yaml", "data.yaml"
# A card with this line was filled and is filled anew; one without it is somebody's own.
FILLED = (
    "<!-- Filled by scripts/push_to_hub.py, and filled anew by it. Take this line out to keep the text as it is. -->"
)
# What the description may say; a key of `True` must be there.
_DESCRIPTION = {
    "license": True,
    "training_data": True,
    "evaluation": True,
    "limits": True,
    "name": False,
    "training": False,
}
_TRAINING_DATA = {
    "name": True,
    "description": True,
    "license": True,
    "url": False,
    "sequences": False,
    "frames": False,
}
_EVALUATION = {"name": True, "description": False, "split": False, "metrics": False}
_FIGURES = ("mpjpe", "pck@0.05", "pck@0.1", "velocity_error")
_RATES = ("bits_per_frame", "bitrate", "token_rate", "compression_ratio")
_COUNTS = ("sequences", "frames")
# What of a run's configuration decides about the weights; the rest is paths and habits.
_RUN_KEYS = {
    "data": ("sequence_length",),
    "training": (
        "max_steps",
        "num_epochs",
        "batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "optimizer_type",
        "weight_decay",
        "scheduler_type",
        "scheduler_options",
        "warmup_steps",
        "max_grad_norm",
        "mixed_precision",
        "use_amp",
        "weights_ema_decay",
        "init_batches",
        "seed",
    ),
}
_COLUMNS = {
    "id": "name of the sequence, unique within its split",
    "codes": "Q lists of S codes: a row for each codebook, a column for each code step",
    "text": "the same codes as text for a language model, step by step",
    "num_frames": "frames of the recording",
    "fps": "its frame rate",
    "center": "where its origin lay, in its own coordinates",
    "scale": "its unit of length, the distance of the shoulders where they were seen",
}


class CardError(ValueError):
    """A card that cannot be filled; `str` is one sentence with the file or key that is missing and how to make it."""


# ---- of a model -----------------------------------------------------------------------------------------------------


def make_model_card(
    folder: FilePath,
    repo_id: str,
    template: FilePath,
    citation: FilePath,
    *,
    description: FilePath | None = None,
    revision: str | None = None,
) -> str:
    """The model card of a checkpoint folder, filled from its configuration, its metrics and a description of the data.

    Args:
        folder: The folder, which loads. `metrics.json` of `evaluate.py` and `config.yaml` of the training run lie in
            it or beside it, unless the description names them.
        repo_id: Where the model will be.
        template: Jinja template of the card, `model_card.md`.
        citation: `CITATION.cff`.
        description: YAML with the keys `license`, `training_data` (of each set: `name`, `description`, `license`, and
            maybe `url`, `sequences`, `frames`), `evaluation` (of each set: `name`, and maybe `description`, `split`,
            `metrics`), `limits`, and maybe `name`, `training`; paths are relative to the file. None means `data.yaml`
            in the folder or beside it.
        revision: Branch of the repository that the card is for.

    Raises:
        CardError: Something that the card needs is missing, unknown, or of another model.
    """
    folder = Path(folder)
    config = PoseTokenizerConfig.from_pretrained(folder)
    path = Path(description) if description is not None else _find(folder, DESCRIPTION)
    about = _read_description(path)
    run = _read_run(_named(path, about.get("training")) or _find(folder, RUN), config)
    results = [
        _read_metrics(entry, _named(path, entry.get("metrics")) or _find(folder, METRICS), config)
        for entry in about["evaluation"]
    ]
    name = about.get("name") or repo_id.rpartition("/")[2]
    data = ModelCardData(
        license=about["license"],
        library_name="transformers",
        tags=TAGS,
        model_name=name,
        eval_results=[entry for result in results for entry in _model_index(result)],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        filled=FILLED,
        name=name,
        repo_id=repo_id,
        revision=revision,
        usage=usage(repo_id, revision),
        config=config,
        levels=list(zip(config.group_names, config.levels_per_group, strict=True)),
        about=about,
        results=results,
        run=yaml.safe_dump(run, sort_keys=False).rstrip(),
        **_read_citation(Path(citation)),
    )
    return str(card)


def is_filled(card: FilePath) -> bool:
    """Whether a card was filled from the template; None there, or somebody's own, is no."""
    path = Path(card)
    return path.is_file() and FILLED in path.read_text("utf-8", errors="replace")


def _find(folder: Path, name: str) -> Path:
    """The file in the folder or beside it, as in a training run; the path in the folder where there is none."""
    places = (folder / name, folder.absolute().parent / name)
    return next((place for place in places if place.is_file()), places[0])


def _named(path: Path, name: str | None) -> Path | None:
    return None if name is None else path.parent / name


def _read(path: Path, load: Any, make: str) -> dict[str, Any]:
    try:
        content = load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CardError(f"{path}: is missing; {make}.") from None
    except OSError as error:
        raise CardError(f"{path}: cannot be read ({error.strerror or error}); {make}.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise CardError(f"{path}: is damaged ({' '.join(str(error).split())[:200]}); {make}.") from None
    if not isinstance(content, dict):
        raise CardError(f"{path}: holds a {type(content).__name__}, expected keys with values; {make}.")
    return content


def _check_keys(path: Path, place: str, values: Any, keys: dict[str, bool]) -> None:
    if not isinstance(values, dict):
        raise CardError(f"{path}: {place or 'the file'} is {values!r}; expected the keys {', '.join(keys)}.")
    where = f"{place}." if place else ""
    for key in values:
        if key not in keys:
            raise CardError(f"{path}: unknown key {where}{key}; expected {', '.join(keys)}.")
    for key, required in keys.items():
        if required and values.get(key) in (None, "", []):
            raise CardError(
                f"{path}: {where}{key} is missing, and nobody but you knows it; see push_to_hub.py --help."
            )


def _read_description(path: Path) -> dict[str, Any]:
    about = _read(
        path, yaml.safe_load, "write it, push_to_hub.py --help shows one, or name yours with --data-card FILE"
    )
    _check_keys(path, "", about, _DESCRIPTION)
    for key, keys in (("training_data", _TRAINING_DATA), ("evaluation", _EVALUATION)):
        if not isinstance(about[key], list):
            raise CardError(f"{path}: {key} is {about[key]!r}; expected a list of sets with {', '.join(keys)}.")
        for number, entry in enumerate(about[key]):
            _check_keys(path, f"{key}[{number}]", entry, keys)
    return about


def _read_run(path: Path, config: PoseTokenizerConfig) -> dict[str, dict[str, Any]]:
    """What of the training run decides about the weights."""
    make = f"training/train.py writes it beside best/: copy it to the model, or name it as `training` in {DESCRIPTION}"
    _read(path, yaml.safe_load, make)
    try:
        run: RunConfig = load_run_config(["--config", str(path)])
        trained = run.model_config()
    except RunConfigError as error:
        raise CardError(str(error)) from None
    for key in run.model:
        found, own = getattr(trained, key), getattr(config, key)
        if found != own:
            raise CardError(f"{path}: is of another model, whose {key} is {found}, not {own}; {make}.")
    sections = run.to_dict()
    chosen = {name: {key: sections[name][key] for key in keys} for name, keys in _RUN_KEYS.items()}
    if chosen["training"]["max_steps"] is not None:
        del chosen["training"]["num_epochs"]
    chosen["augmentation"] = sections["augmentation"]
    return {
        name: {key: value for key, value in section.items() if value is not None} for name, section in chosen.items()
    }


def _read_metrics(entry: dict[str, Any], path: Path, config: PoseTokenizerConfig) -> dict[str, Any]:
    """The figures of an evaluation set: rows of the table, rates, counts."""
    make = "make it with scripts/evaluate.py --model MODEL --data DIR --split SPLIT --output DIR"
    metrics = _read(path, json.loads, make)
    rows = {"all": metrics.get("overall"), **(metrics.get("parts") or {})}
    for place, keys, values in (
        *((f"parts.{name}", _FIGURES, row) for name, row in rows.items()),
        ("tokens", _RATES, metrics.get("tokens")),
        ("data", _COUNTS, metrics.get("data")),
    ):
        place = "overall" if place == "parts.all" else place
        for key in keys:
            if not isinstance(values, dict) or key not in values:
                raise CardError(f"{path}: has no {place}.{key}; {make}.")
            # A part that the recordings never show has no figures.
            if values[key] is None and not place.startswith("parts."):
                raise CardError(f"{path}: {place}.{key} is null, nothing was measured; {make}.")
    missing = set(config.layout.group_keypoints) - set(rows)
    if missing:
        raise CardError(f"{path}: has no parts.{min(missing)}; {make}.")
    found = metrics["tokens"]["bits_per_frame"]
    if abs(found - config.bits_per_frame) > 1e-6:
        raise CardError(
            f"{path}: is of another model, of {found:g} bits per frame, not {config.bits_per_frame:g}; {make}."
        )
    searched = metrics["tokens"].get("beam_size", 1)
    if searched != config.beam_size:
        raise CardError(f"{path}: was measured with beam_size {searched}, the model has {config.beam_size}; {make}.")
    return {"about": entry, "rows": rows, "tokens": metrics["tokens"], "data": metrics["data"]}


def _model_index(result: dict[str, Any]) -> Iterator[EvalResult]:
    """The figures as the Hub shows them beside the card: mean distances in percent of the shoulder width."""
    about = result["about"]
    for name, row in result["rows"].items():
        if row["mpjpe"] is not None:
            yield EvalResult(
                task_type="pose-reconstruction",
                task_name="Pose reconstruction",
                dataset_type=re.sub(r"\W+", "-", about["name"].lower()).strip("-"),
                dataset_name=about["name"],
                dataset_split=about.get("split"),
                metric_type="mpjpe",
                metric_name=f"Mean distance, {name.replace('_', ' ')} (% of shoulder width)",
                metric_value=round(100 * row["mpjpe"], 2),
            )


def _read_citation(path: Path) -> dict[str, str]:
    """BibTeX of a CITATION.cff, and the licence of the code."""
    content = _read(path, yaml.safe_load, "it belongs to the project")
    authors = " and ".join(
        f"{{{author['name']}}}" if "name" in author else f"{author['family-names']}, {author['given-names']}"
        for author in content["authors"]
    )
    fields = {"title": f"{{{content['title']}}}", "author": authors, "version": content["version"]}
    fields |= {key: content[key] for key in ("url", "doi") if key in content}
    lines = [f"  {key} = {{{value}}}" for key, value in fields.items()]
    bibtex = "@software{pose_tokenizer,\n" + ",\n".join(lines) + "\n}"
    return {"citation": bibtex, "code_license": content["license"]}


# ---- of tokens ------------------------------------------------------------------------------------------------------


def make_card(
    manifest: dict[str, Any],
    repo_id: str,
    template: FilePath,
    license: str | None = None,
    model: str | None = None,
) -> str:
    """The dataset card of a token folder: metadata that `load_dataset` reads, and text.

    Args:
        manifest: Of the folder, see `read_manifest`.
        repo_id: Where the dataset will be.
        template: Jinja template of the card.
        license: Its licence, as the Hub names it.
        model: Where others find the model; None means what the manifest says.
    """
    splits = {re.sub(r"\W", "_", split): entry for split, entry in manifest["splits"].items()}
    # A question mark for each digit: the files of `train-clean` are none of `train`.
    files = [
        {"split": name, "path": re.sub(r"\d+-of-\d+\.parquet$", _as_pattern, entry["shards"][0])}
        for name, entry in splits.items()
    ]
    data = DatasetCardData(
        license=license,
        pretty_name=repo_id.rpartition("/")[2],
        size_categories=_size_category(sum(entry["sequences"] for entry in splits.values())),
        tags=TAGS,
        configs=[{"config_name": "default", "data_files": files}],
    )
    hours = {
        name: entry["frames_encoded"] / manifest["codes"]["sampling_rate"] / 3600 for name, entry in splits.items()
    }
    card = DatasetCard.from_template(
        data,
        template_path=str(template),
        repo_id=repo_id,
        splits=splits,
        hours=hours,
        model=model or manifest.get("model"),
        revision=manifest.get("model_revision") if model is None else None,
        made_by=manifest["made_by"],
        versions=manifest.get("versions", {}),
        codes=manifest["codes"],
        columns=_COLUMNS,
        license=license,
    )
    return str(card)


def _as_pattern(match: re.Match[str]) -> str:
    return re.sub(r"\d", "?", match[0])


def _size_category(count: int) -> str:
    """The Hub's name for so many rows."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    for power, (low, high) in enumerate(zip(("", *names), names, strict=False), 3):
        if count < 10**power:
            return f"{low}<n<{high}" if low else f"n<{high}"
    return f"n>{names[-1]}"


__all__ = ["CardError", "is_filled", "make_card", "make_model_card"]
