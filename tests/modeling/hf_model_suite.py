"""transformers' own `ModelTesterMixin`, pointed at stock GPT-2 and at `GPTModel` with one and the same tester.

Not collected by itself: `test_hf_model_suite.py` runs it and compares the two classes. The mixin ships in the source
distribution of transformers; TRANSFORMERS_SDIST names the folder that it is unpacked in.
"""

import os
import sys
import types
import unittest
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING

from modeling import GPTConfig, GPTModel
from modeling.gpt import GPTBackbone

# Some tests skip a class that the Auto mappings do not list; ours is listed for the suite alone.
MODEL_MAPPING.register(GPTConfig, GPTBackbone)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["GPTModel"] = "GPTModel"

# The mixin imports two siblings that the source distribution leaves out; they only add tests of generation and export.
_package = types.ModuleType("hf_tests")
_package.__path__ = [str(Path(os.environ["TRANSFORMERS_SDIST"]) / "tests")]
_export, _generation = types.ModuleType("hf_tests.exporters.test_export"), types.ModuleType("hf_tests.generation")
_export.ExportTesterMixin = type("ExportTesterMixin", (), {})
_generation.GenerationTesterMixin = type("GenerationTesterMixin", (), {})
sys.modules |= {
    "hf_tests": _package,
    "hf_tests.exporters": types.ModuleType("hf_tests.exporters"),
    "hf_tests.exporters.test_export": _export,
    "hf_tests.generation": types.ModuleType("hf_tests.generation"),
    "hf_tests.generation.test_utils": _generation,
}

from hf_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402


class Tester:
    """A small configuration and a batch for it, as the mixin expects them."""

    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            n_positions=64,
            bos_token_id=98,
            eos_token_id=98,
            pad_token_id=98,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        mask = random_attention_mask(shape)
        return self.get_config(), {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": mask}


class _Suite(ModelTesterMixin):
    def setUp(self):
        self.model_tester = Tester(self.config_class)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = dict(inputs_dict)
        if return_labels:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs


class StockTest(_Suite, unittest.TestCase):
    config_class, all_model_classes = GPT2Config, (GPT2LMHeadModel,)


class OursTest(_Suite, unittest.TestCase):
    config_class, all_model_classes = GPTConfig, (GPTModel,)
