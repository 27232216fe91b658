"""Models and tokens to the Hub, each in one commit: there whole, with a card, or not at all."""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import filter_repo_objects

from .cards import make_card
from .extraction import MANIFEST, METADATA_KEY, SHARD_NAME, TokenFolderError, read_manifest
from .formats import FilePath
from .hub import ModelFolderError, load_pretrained
from .presets import HubOptions
from .saving_pose_tokenizer import CARD, plain_card
from .tracking import Meter

# Of a checkpoint folder, what is nobody else's business: hidden files, compiled code, and what only unpickling reads.
_PRIVATE = (".*", "*/.*", "__pycache__/*", "*/__pycache__/*", "*.pyc", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Weights of earlier uploads, which a smaller number of files or a safe format has replaced.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
# What the Hub's answers mean to whoever wants to write there.
_ADVICE = {
    401: "the token was refused; give one that may write in HF_TOKEN, or by `hf auth login`",
    403: "the token may not write there; check the name and the rights of the token",
    404: "there is no such repository or branch, or this token may not see it",
    409: "somebody else wrote there at the same time; run the same command again",
}


class PublishError(ValueError):
    """What the Hub refuses; `str` is one sentence with the repository."""


def push_model(
    folder: FilePath, repo_id: str, *, card: str | None = None, private: bool = False, revision: str | None = None
) -> str:
    """Uploads a checkpoint folder in one commit: weights, configurations, feature extractor, code and card.

    Args:
        folder: The folder, such as the `best` of a training run.
        repo_id: `USER/NAME`; made if it does not exist.
        card: Text of the card. Without it the folder's `README.md` goes along; without that the card of the repository
            stays, and a repository without one gets what follows from the configuration.
        private: Nobody else can see the repository.
        revision: Branch to upload to; made if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        ModelFolderError: The folder does not load, or its code is missing.
        PublishError: The Hub cannot be reached or refuses, or `private` is asked for and the repository is public.
    """
    folder = Path(folder)
    model, _ = load_pretrained(folder.absolute())  # nobody shall download what does not load
    _check_code(folder)
    with _repository(repo_id, "model", private, revision) as api:
        if card is None and not (folder / CARD).exists() and not api.file_exists(repo_id, CARD, revision=revision):
            card = plain_card(model.config, repo_id)
        names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        contents: dict[str, Any] = {
            name: names[name] for name in filter_repo_objects(names, ignore_patterns=list(_PRIVATE))
        }
        contents |= {} if card is None else {CARD: card.encode()}
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        present = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in filter_repo_objects(present, allow_patterns=list(_WEIGHTS)) if name not in contents]
        operations += [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(repo_id, operations, revision=revision, commit_message="Upload pose tokenizer")
    return str(commit.commit_url)


def _check_code(folder: Path) -> None:
    """Refuses a folder without the code that its configurations name."""
    for name in ("config.json", "preprocessor_config.json"):
        auto_map = json.loads((folder / name).read_text("utf-8")).get("auto_map") or {}
        missing = [entry for entry in auto_map.values() if not (folder / f"{entry.split('.')[0]}.py").is_file()]
        if missing or not auto_map:
            what = f"{missing[0].split('.')[0]}.py" if missing else "auto_map"
            raise ModelFolderError(
                f"{folder}: {name} has no {what} beside it, so that nobody could load it without this package; "
                "write the folder with save_pretrained."
            )


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


def _check_complete(folder: Path, manifest: dict[str, Any]) -> Sequence[str]:
    """The shards of all splits, which are there and whole."""
    if not manifest["splits"]:
        raise TokenFolderError(f"{folder}: holds no split; expected what extract_tokens.py writes.")
    for split, entry in manifest["splits"].items():
        strange = [name for name in entry["shards"] if not re.fullmatch(re.escape(split) + SHARD_NAME, str(name))]
        if strange or "/" in split:
            raise TokenFolderError(
                f"{folder}: {MANIFEST} names {(strange or [split])[0]!r} as a shard of {split}; "
                f"expected names such as {split}-00000-of-00001.parquet, which lie in the folder."
            )
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
    except (HTTPError, HFValidationError, OSError, RuntimeError) as wrapped:
        # The upload of a large file says what went wrong by a RuntimeError with the cause behind it.
        error = wrapped.__cause__ if isinstance(wrapped, RuntimeError) and wrapped.__cause__ else wrapped
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, HfHubHTTPError):
            advice = _ADVICE.get(error.response.status_code, "try again later")
        elif isinstance(error, HTTPError):
            advice = "the connection failed; run the same command again"
        else:
            advice = "expected USER/NAME" if isinstance(error, HFValidationError) else "see the reason"
        raise PublishError(f"{repo_id}: nothing was published, {advice} ({reason[:300]}).") from wrapped


class RunPublisher:
    """Publishes the best checkpoint of a training run at its end and, if asked, every so many steps.

    A push that fails costs the run nothing: it is said, and at the end once more with the command that repeats it.

    Args:
        options: Where to, and how often.
        best: Folder of the best checkpoint, which may not be there yet.
        meter: Of the run; its main process publishes, and the time that takes does not count as training.
    """

    def __init__(self, options: HubOptions, best: Path, meter: Meter) -> None:
        self.options, self.best, self.meter = options, best, meter
        self.active = options.push and meter.accelerator.is_main_process
        self.pushed: int | None = None

    def follow(self, step: int) -> None:
        """Publishes after this step, if its turn has come and there is something new."""
        if self.active and self.options.every and step % self.options.every == 0:
            with self.meter.paused():
                self._push()

    def finish(self) -> bool:
        """Publishes at the end of the run, and says whether that went well."""
        if not self.active or self._push():
            return True
        words = ["python", "scripts/push_to_hub.py", "--model", str(self.best), "--repo-id", str(self.options.repo_id)]
        words += ["--plain-card", *(["--private"] if self.options.private else [])]
        self.meter.say(
            f"The run is complete, but its best model is not published; repeat that with: {shlex.join(words)}"
        )
        return False

    def _push(self) -> bool:
        try:
            written = (self.best / "config.json").stat().st_mtime_ns
            if written != self.pushed:
                url = push_model(self.best, str(self.options.repo_id), private=self.options.private)
                self.pushed = written
                self.meter.say(f"published: {url}")
        except FileNotFoundError:
            self.meter.say(f"{self.best}: no model to publish yet; the first validation writes it.")
            return False
        except (ModelFolderError, PublishError) as error:
            self.meter.say(str(error))
            return False
        return True


__all__ = ["PublishError", "RunPublisher", "push_model", "push_tokens"]
