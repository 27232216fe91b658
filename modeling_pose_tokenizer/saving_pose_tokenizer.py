"""Saving and publishing whole: weights, configurations, feature extractor and code are one folder and one commit."""

import shutil
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCardData
from transformers.utils import FEATURE_EXTRACTOR_NAME, logging

from .configuration_pose_tokenizer import PoseTokenizerConfig
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor

CARD = "README.md"
TAGS = ["pose", "sign-language", "motion", "pose-tokenizer"]
# What `save_pretrained(push_to_hub=True)` takes for the Hub, beside `repo_id`.
_HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")

logger = logging.get_logger(__name__)


class PoseTokenizerSavingMixin:
    """`save_pretrained` and `push_to_hub` of a model that needs its feature extractor and its code to be of use."""

    config: PoseTokenizerConfig

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """`PreTrainedModel.save_pretrained`, with feature extractor and every travelling module beside the weights.

        A feature extractor that lies in the folder already stays. Otherwise it is that of the checkpoint which the
        model was loaded from, or, for a model that never was, one without statistics: save your own after the model.
        """
        options = {key: kwargs.pop(key) for key in ("repo_id", *_HUB_OPTIONS) if push_to_hub and key in kwargs}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        if not is_main_process:
            return
        for module in sorted(Path(__file__).parent.glob("*_pose_tokenizer.py")):
            target = Path(save_directory) / module.name
            if not (target.exists() and target.samefile(module)):
                shutil.copyfile(module, target)
        if not Path(save_directory, FEATURE_EXTRACTOR_NAME).exists():
            self._find_feature_extractor().save_pretrained(save_directory)
        if push_to_hub:  # from a folder of its own: there may be more in this one than the model
            with TemporaryDirectory() as folder:
                shutil.copy(Path(save_directory, FEATURE_EXTRACTOR_NAME), folder)
                self.save_pretrained(folder, True, *args, **kwargs)
                publish_folder(folder, self.config, options.pop("repo_id", Path(save_directory).name), **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        feature_extractor: PoseFeatureExtractor | None = None,
        max_shard_size: int | str = "50GB",
        **options: Any,
    ) -> CommitInfo:
        """Publishes weights, configurations, feature extractor, code and card in one commit.

        A card that the repository has already stays; without one it says what the configuration says. For a card with
        figures and training data see scripts/push_to_hub.py.

        Args:
            repo_id: `USER/NAME`; made if it does not exist.
            feature_extractor: The fitted one; without it see `save_pretrained`.
            max_shard_size: Largest file of weights.
            options: `commit_message`, `commit_description`, `private`, `token`, `revision` (a branch, made if it does
                not exist), `create_pr`, `tags`, as for every model of transformers.

        Raises:
            TypeError: Another option.
            huggingface_hub.errors.HfHubHTTPError: The Hub refuses; nothing is visible there then.
        """
        unknown = sorted(set(options) - set(_HUB_OPTIONS))
        if unknown:
            raise TypeError(f"push_to_hub does not know {unknown[0]}; expected {', '.join(_HUB_OPTIONS)}.")
        with TemporaryDirectory() as folder:
            if feature_extractor is not None:
                feature_extractor.save_pretrained(folder)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return publish_folder(folder, self.config, repo_id, **options)

    def _find_feature_extractor(self) -> PoseFeatureExtractor:
        origin, commit = self.config._name_or_path, getattr(self.config, "_commit_hash", None)
        if origin:
            try:
                return PoseFeatureExtractor.from_pretrained(origin, revision=commit, local_files_only=True)
            except (OSError, ValueError):
                logger.warning(f"{origin}: its feature extractor is not at hand; one without statistics is saved.")
        return PoseFeatureExtractor.from_config(self.config)


def publish_folder(
    folder: str | PathLike[str],
    config: PoseTokenizerConfig,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    commit_message: str | None = None,
    **commit: Any,
) -> CommitInfo:
    """Uploads all of a folder in one commit, with a card if neither the folder nor the repository has one."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if not (Path(folder, CARD).exists() or api.file_exists(repo_id, CARD, revision=revision)):
        Path(folder, CARD).write_text(plain_card(config, repo_id, tags), encoding="utf-8")
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload pose tokenizer",
        **commit,
    )


def usage(repo_id: str, revision: str | None = None) -> str:
    """Five lines of Python that encode poses and decode them."""
    pinned = f'revision="{revision}", ' if revision else ""
    return f"""\
from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained("{repo_id}", {pinned}trust_remote_code=True)
feature_extractor = AutoFeatureExtractor.from_pretrained("{repo_id}", {pinned}trust_remote_code=True)
inputs = feature_extractor(poses, fps=fps, return_tensors="pt")  # poses (frames, keypoints, values), confidence last
codes = model.encode(inputs["input_values"], inputs["padding_mask"]).pose_codes  # (1, codebooks, steps)
values = model.decode(codes, inputs["padding_mask"]).pose_values
reconstruction = feature_extractor.postprocess(values, inputs)[0]  # as `poses` are: length, rate and coordinates"""


def plain_card(config: PoseTokenizerConfig, repo_id: str, tags: list[str] | None = None) -> str:
    """A card that says what follows from the configuration, and that its owner said no more."""
    data = ModelCardData(library_name="transformers", tags=[*TAGS, *(tags or [])])
    what = (
        f"A pose tokenizer: {config.num_keypoints} keypoints ({config.skeleton or 'a layout of its own'}) at "
        f"{config.sampling_rate:g} frames per second to {config.num_codebooks} codes for every "
        f"{config.hop_length} frames, {config.bits_per_frame:g} bits per frame, {config.token_rate:g} tokens a second."
    )
    parts = (
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        what,
        f"```python\n{usage(repo_id)}\n```",
        "Its owner has stated no evaluation, training data or licence yet.\n",
    )
    return "\n\n".join(parts)


__all__ = ["PoseTokenizerSavingMixin", "plain_card", "publish_folder", "usage"]
