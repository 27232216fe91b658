"""The common model tests of transformers, taken from the source distribution of the installed version.

The distribution is downloaded once by pip into `.cache/` and its `tests/` folder becomes the package
`transformers_tests`. Nothing of it enters this repository.
"""

import importlib
import importlib.util
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import transformers
from filelock import FileLock

CACHE = Path(__file__).parents[1] / ".cache" / "upstream"
PACKAGE = "transformers_tests"
# The distribution leaves out the sub-folders of tests/, yet the common tests import three names from them.
CONFIG_KWARGS = {  # every field of PreTrainedConfig that a caller may set, away from its default
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": True,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
LEFT_OUT = {
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_KWARGS},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},  # test_export.py does this
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},  # a codec has no text
}


def download_tests() -> Path:
    """Download and unpack the tests of the installed transformers, once.

    Returns:
        The `tests` folder of the source distribution.

    Raises:
        RuntimeError: If pip cannot fetch the source distribution.
    """
    requirement = f"transformers=={transformers.__version__}"
    folder = CACHE / requirement.replace("==", "-") / "tests"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):  # pytest-xdist workers collect at the same time
        if not folder.is_dir():
            options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(CACHE)]
            command = [sys.executable, "-m", "pip", "download", *options, requirement]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"The common tests need the source of {requirement}, but pip says: {result.stderr}")
            unpack(next(CACHE.glob(f"transformers-{transformers.__version__}.tar.gz")), folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the top-level tests of a source distribution, whole or not at all."""
    partial = CACHE / "partial"
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.split("/")[1:2] == ["tests"]]
        tar.extractall(partial, members, filter="data")
    (next(partial.glob("*/tests")) / "__init__.py").touch()
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    next(partial.iterdir()).rename(folder.parent)
    archive.unlink()


def load_tests() -> tuple[type, type, type]:
    """Import the common tests.

    Returns:
        `ModelTesterMixin`, `ConfigTester` and `FeatureExtractionSavingTestMixin` of the installed transformers.
    """
    folder = download_tests()
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        for name, attributes in LEFT_OUT.items():
            for module_name in (name.split(".")[0], name):
                sys.modules[f"{PACKAGE}.{module_name}"] = types.ModuleType(f"{PACKAGE}.{module_name}")
            vars(sys.modules[f"{PACKAGE}.{name}"]).update(attributes)
    found = {
        "test_modeling_common": "ModelTesterMixin",
        "test_configuration_common": "ConfigTester",
        "test_feature_extraction_common": "FeatureExtractionSavingTestMixin",
    }
    return tuple(getattr(importlib.import_module(f"{PACKAGE}.{module}"), name) for module, name in found.items())
