"""Models and tokens to the Hub: a checkpoint folder as it is, a token folder with a card made from its manifest."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    HfApi,
)
from huggingface_hub.errors import HFValidationError, HTTPError

from .extraction import MANIFEST, METADATA_KEY, SHARD_NAME, TokenFolderError, read_manifest
from .formats import FilePath
from .hub import load_pretrained

CARD = "README.md"
# Of a checkpoint folder, what is nobody else's business: hidden files, compiled code.
_PRIVATE = (".*", "*/.*", "__pycache__/*", "*/__pycache__/*", "*.pyc")
_COLUMNS = {
    "id": "name of the sequence, unique within its split",
    "codes": "Q lists of S codes: a row for each codebook, a column for each code step",
    "text": "the same codes as text for a language model, step by step",
    "num_frames": "frames of the recording",
    "fps": "its frame rate",
    "center": "where its origin lay, in its own coordinates",
    "scale": "its unit of length, the distance of the shoulders where they were seen",
}


class PublishError(ValueError):
    """What the Hub refuses; `str` is one sentence with the repository."""


def push_model(folder: FilePath, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a checkpoint folder: weights, configurations, code, and its `README.md` if there is one.

    Args:
        folder: The folder, such as the `best` of a training run.
        repo_id: `USER/NAME`; made if it does not exist.
        private: Nobody else can see the repository.
        revision: Branch to upload to; made if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        ModelFolderError: The folder does not load.
        PublishError: The Hub cannot be reached or refuses, or `private` is asked for and the repository is public.
    """
    load_pretrained(Path(folder).absolute())  # nobody shall download what does not load
    with _repository(repo_id, "model", private, revision) as api:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder),
            revision=revision,
            ignore_patterns=list(_PRIVATE),
            commit_message="Upload pose tokenizer",
        )
    return str(commit.commit_url)


def push_tokens(
    folder: FilePath,
    repo_id: str,
    template: FilePath,
    *,
    license: str | None = None,
    model: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Uploads a token folder as a dataset; shards of earlier uploads that it no longer has are deleted.

    Args:
        folder: The folder, all of whose splits are complete. A `README.md` in it goes along as it is; without one the
            card is made from the manifest.
        repo_id: `USER/NAME`; made if it does not exist.
        template: Jinja template of the card, `dataset_card.md`.
        license: Licence of the dataset, as the Hub names it (`cc-by-4.0`, `mit`, ...).
        model: Where others find the model that made the tokens; None means what the manifest says.
        private: Nobody else can see the repository.
        revision: Branch to upload to; made if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        TokenFolderError: A split is incomplete or damaged.
        PublishError: The Hub cannot be reached or refuses, or `private` is asked for and the repository is public.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    shards = _check_complete(folder, manifest)
    card: Path | bytes = folder / CARD
    if not (folder / CARD).exists():
        card = make_card(manifest, repo_id, template, license, model).encode()
    contents: dict[str, Path | bytes] = {CARD: card, MANIFEST: folder / MANIFEST}
    contents |= {shard: folder / shard for shard in shards}
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    with _repository(repo_id, "dataset", private, revision) as api:
        present = api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
        stale = [name for name in present if re.fullmatch(f".*{SHARD_NAME}", name) and name not in contents]
        operations += [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            repo_id, operations, repo_type="dataset", revision=revision, commit_message="Upload pose tokens"
        )
    return str(commit.commit_url)


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
        tags=["pose", "sign-language", "motion", "pose-tokenizer"],
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


def _check_complete(folder: Path, manifest: dict[str, Any]) -> Sequence[str]:
    """The shards of all splits, which are there and whole."""
    if not manifest["splits"]:
        raise TokenFolderError(f"{folder}: holds no split; expected what extract_tokens.py writes.")
    for split, entry in manifest["splits"].items():
        missing = sum(not (folder / name).exists() for name in entry["shards"])
        if missing or not entry["complete"]:
            raise TokenFolderError(
                f"{folder}: the split {split} is not complete ({missing} of {len(entry['shards'])} shards missing);"
                " start extract_tokens.py again, it goes on where it stopped."
            )
        rows = 0
        for name in entry["shards"]:
            try:
                footer = pq.read_metadata(folder / name)
                found = json.loads(footer.metadata[METADATA_KEY])["made_by"]
            except (OSError, pa.ArrowException, LookupError, TypeError, ValueError):
                found, footer = None, None
            if found != manifest["made_by"]:
                raise TokenFolderError(f"{folder / name}: is damaged, or not of the model that {MANIFEST} names.")
            rows += footer.num_rows
        if rows != entry["sequences"]:
            raise TokenFolderError(
                f"{folder}: the split {split} has {rows} rows; expected {entry['sequences']}, as {MANIFEST} says."
            )
    return [name for entry in manifest["splits"].values() for name in entry["shards"]]


@contextmanager
def _repository(repo_id: str, kind: str, private: bool, revision: str | None) -> Iterator[HfApi]:
    """The Hub, with the repository and its branch; who asks is known by HF_TOKEN or `hf auth login`."""
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type=kind, private=True if private else None, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise PublishError(f"{repo_id}: exists and is public; make it private on the Hub first.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        yield api
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PublishError(f"{repo_id}: cannot be published ({reason[:300]}).") from error


__all__ = ["PublishError", "make_card", "push_model", "push_tokens"]
