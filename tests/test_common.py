"""transformers' own common tests, run on the pose tokenizer (see upstream.py for where they come from)."""

import unittest

import pytest
import torch
from upstream import load_tests

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerConfig, PoseTokenizerModel

ModelTests, ConfigTests, FeatureExtractorTests = load_tests()


class PoseModelTester:
    """What the common tests ask of a model's tester: a small configuration and a batch."""

    batch_size = 4  # even: the tests split batches
    num_frames = 10  # not a multiple of the hop
    num_hidden_layers = 1
    hidden_size = 16
    is_training = True

    def get_config(self) -> PoseTokenizerConfig:
        return PoseTokenizerConfig(
            skeleton="coco_17",
            hidden_size=self.hidden_size,
            joint_hidden_size=8,
            num_joint_layers=1,
            num_part_layers=self.num_hidden_layers,
            num_quantizers=2,
            codebook_size=16,
            codebook_dim=8,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PoseTokenizerConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        poses = torch.randn(self.batch_size, self.num_frames, config.num_keypoints, config.keypoint_dim)
        poses[..., -1] = torch.rand(poses.shape[:-1])  # confidence; below the threshold a keypoint is missing
        padding_mask = torch.ones(self.batch_size, self.num_frames, dtype=torch.long)
        return config, {"input_values": poses, "padding_mask": padding_mask}


class PoseTokenizerCommonTest(ModelTests, unittest.TestCase):
    all_model_classes = (PoseTokenizerModel,)
    has_attentions = False  # graph and temporal convolutions only
    test_resize_embeddings = False  # poses are numbers: there is no vocabulary to resize

    def setUp(self) -> None:
        self.model_tester = PoseModelTester()
        self.config_tester = ConfigTests(
            self,
            config_class=PoseTokenizerConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_hidden_layers", "num_quantizers", "codebook_size"],
            hidden_size=37,
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self) -> None:
        """The input is poses, not token ids: as in EncodecModel and MimiModel there is no embedding matrix."""
        model = PoseTokenizerModel(self.model_tester.get_config())
        with pytest.raises(NotImplementedError):
            model.get_input_embeddings()


class PoseFeatureExtractorCommonTest(FeatureExtractorTests, unittest.TestCase):
    feature_extraction_class = PoseFeatureExtractor
    feat_extract_dict = {
        "skeleton": "coco_17",
        "sampling_rate": 30.0,
        "mean": [[0.5, 1.0]] * 17,
        "std": [[1.0, 1.0]] * 17,
    }
