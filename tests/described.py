"""What a model card is filled from, made by the real parts: figures, the run's configuration, a description."""

import json
from pathlib import Path
from typing import Any

import yaml

from corpora import extract, make_corpus
from modeling_pose_tokenizer.evaluation import evaluate_folder
from modeling_pose_tokenizer.hub import load_pretrained
from modeling_pose_tokenizer.presets import load_run_config, model_types

DESCRIPTION: dict[str, Any] = {
    "license": "cc-by-4.0",
    "training_data": [
        {"name": "home videos", "description": "one signer", "license": "CC BY 4.0", "frames": 12345},
        {"name": "others", "description": "two signers", "license": "MIT", "url": "https://example.org/others"},
    ],
    "evaluation": [{"name": "held out", "split": "val", "description": "of the same signers"}],
    "limits": "Three signers of one sign language.",
}


def write_description(folder: Path, **changes: Any) -> Path:
    """`data.yaml` in a folder; a key changed to None is left out."""
    content = {key: value for key, value in (DESCRIPTION | changes).items() if value is not None}
    (folder / "data.yaml").write_text(yaml.safe_dump(content), "utf-8")
    return folder / "data.yaml"


def describe(place: Path, data: Path) -> None:
    """Lays metrics.json, config.yaml and data.yaml beside the model `place/model`."""
    evaluate_folder(str(place / "model"), str(data), str(place), split="val")
    model, _ = load_pretrained(place / "model")
    keys = {key: getattr(model.config, key) for key in model_types()}
    words = [f"--model.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
    run = load_run_config([*words, "--training.max_steps=7", f"--data.path={data}"])
    (place / "config.yaml").write_text(run.to_yaml(), "utf-8")
    write_description(place)


def make_described_corpus(place: Path) -> Path:
    """A folder with a model, what its card is filled from, and in `tokens` those of two splits."""
    make_corpus(place)
    describe(place, place / "data")
    for split in ("train", "val"):
        extract(place, place / "tokens", split=split)
    return place
