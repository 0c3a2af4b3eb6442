"""Liger's place in the loop, with a stand-in of plain torch for its kernel; the kernel itself needs a GPU."""

import sys
import types

import pytest
import torch
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from deepen.errors import TrainingError
from deepen.training.liger import liger_loss
from deepen.training.loss import summed_loss

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


class Kernel:
    """What the kernel is documented to compute."""

    wrong = 0.0

    def __init__(self, ignore_index, reduction):
        assert reduction == "sum"
        self.ignored = ignore_index

    def __call__(self, weight, states, targets, bias=None):
        logits = functional.linear(states, weight, bias).float()
        loss = functional.cross_entropy(logits, targets, ignore_index=self.ignored, reduction="sum")
        return loss * (1 + self.wrong)


@pytest.fixture
def kernel(monkeypatch):
    module = types.ModuleType("fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyLoss = type("Stand-in", (Kernel,), {})
    name = "liger_kernel.transformers.fused_linear_cross_entropy"
    for parent in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    return module.LigerFusedLinearCrossEntropyLoss


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def test_equal_losses_are_taken(kernel):
    model = llama()
    tokens = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(1))
    found = liger_loss(model)(model, tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(found, summed_loss(model, tokens[:, :-1], tokens[:, 1:]))


def test_another_loss_is_refused(kernel):
    kernel.wrong = 1e-3
    with pytest.raises(TrainingError, match=r"its loss is apart from ours by 1\.0e-03"):
        liger_loss(llama())


def test_capped_logits_are_refused(kernel):
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.1, layer_types=["full_attention"] * 2)
    with pytest.raises(TrainingError, match="apart from ours"):
        liger_loss(Gemma2ForCausalLM(config))


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(TrainingError, match="liger-kernel is not installed"):
        liger_loss(llama())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
def test_the_kernel_itself():
    pytest.importorskip("liger_kernel")
    liger_loss(llama().cuda())
    liger_loss(llama().cuda(), torch.bfloat16)
