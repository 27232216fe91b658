"""transformers' own common tests, run on the pose tokenizer (see upstream.py for where they come from)."""

import unittest
from typing import Any
from unittest.mock import patch

import torch

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerConfig, PoseTokenizerModel
from upstream import load_tests

ModelTests, ConfigTests, FeatureExtractorTests = load_tests()


class PoseModelTester:
    """What the common tests ask of a model's tester: a small configuration and a batch."""

    batch_size = 4  # even: the tests split batches
    num_frames = 10  # not a multiple of the hop
    num_hidden_layers = 1
    hidden_size = 16
    is_training = True

    def __init__(self, **options: Any) -> None:
        self.options = options

    def get_config(self) -> PoseTokenizerConfig:
        return PoseTokenizerConfig(
            skeleton="coco_17",
            hidden_size=self.hidden_size,
            joint_hidden_size=8,
            num_joint_layers=1,
            num_part_layers=self.num_hidden_layers,
            num_quantizers=2,
            codebook_size=64,
            codebook_dim=8,
            **self.options,
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
    test_can_init_all_missing_weights_before_2023 = True  # runs the test whatever year the file names

    options: dict[str, Any] = {}

    def setUp(self) -> None:
        self.model_tester = PoseModelTester(**self.options)
        self.config_tester = ConfigTests(
            self,
            config_class=PoseTokenizerConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_hidden_layers", "num_quantizers", "codebook_size"],
            hidden_size=37,
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model_outputs_equivalence(self) -> None:
        """Upstream's test; what it asks for `output_hidden_states` is dropped (see the exclusions below)."""
        forward = PoseTokenizerModel.forward

        def forward_without(model: PoseTokenizerModel, *args: Any, output_hidden_states: bool = False, **kwargs: Any):
            return forward(model, *args, **kwargs)

        with patch.object(PoseTokenizerModel, "forward", forward_without):
            super().test_model_outputs_equivalence()

    def test_model_get_set_embeddings(self) -> None:
        """Poses are numbers, not token ids: there is nothing to get or set, and who asks (sharding) is told so."""
        model = PoseTokenizerModel(self.model_tester.get_config())
        assert model.get_input_embeddings() is None
        assert model.get_output_embeddings() is None

    # A codec returns codes and poses, as EncodecModel does. Its layers work on two graphs at two frame rates: there is
    # no list of hidden states of one shape to return.
    test_hidden_states_output = None
    test_retain_grad_hidden_states_attentions = None


class PoseTokenizerOtherFormCommonTest(PoseTokenizerCommonTest):
    """The same model in its other form: finite scalar quantization, one token group, causal."""

    options = {"quantizer": "fsq", "token_groups": "whole", "use_causal_conv": True}


class PoseFeatureExtractorCommonTest(FeatureExtractorTests, unittest.TestCase):
    feature_extraction_class = PoseFeatureExtractor
    feat_extract_dict = {
        "skeleton": "coco_17",
        "sampling_rate": 30.0,
        "mean": [[0.5, 1.0]] * 17,
        "std": [[1.0, 1.0]] * 17,
    }
