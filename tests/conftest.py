"""What every test shares: a sealed environment and the hypothesis profile.

The environment is set here, before anything imports torch or a Hugging Face library, and is inherited by
pytest-xdist workers and by the commands that tests start.
"""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

# One thread per worker: the tests run in parallel, and tiny matrices gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# No test reaches the network or the user's caches. A test with a Hub of its own sets these for its child process.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="pose-tokenizer-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# A shell has its background jobs ignore Ctrl-C, and commands inherit that: those that tests start must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "house",
    max_examples=20,
    deadline=None,  # the first call of a torch operation is slow
    derandomize=bool(os.environ.get("CI")),  # CI repeats itself, a developer's machine explores
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("house")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model and feature extractor: initialised from data and perturbed, so that no code or bias is zero."""
    import torch

    from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerConfig, PoseTokenizerModel

    torch.manual_seed(0)
    config = PoseTokenizerConfig(
        skeleton="coco_17", hidden_size=16, joint_hidden_size=8, num_part_layers=1, num_quantizers=3, codebook_size=16
    )
    model = PoseTokenizerModel(config)
    poses = torch.randn(8, 32, config.num_keypoints, config.keypoint_dim)
    poses[..., -1] = torch.rand(poses.shape[:-1])
    model.initialize_from_data([{"input_values": poses, "padding_mask": torch.ones(8, 32, dtype=torch.long)}])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.eval().save_pretrained(folder)
    PoseFeatureExtractor.from_config(config).save_pretrained(folder)
    return folder


# What starts commands and waits for them takes minutes; xdist, left to itself, begins with the files of most tests.
LONGEST = ["test_readme.py", "test_training.py", "test_hub.py", "test_examples.py", "test_runtime.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker ends on one alone."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
