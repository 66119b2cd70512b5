"""Sparse training in the hands of others: transformers' Trainer, and torch.distributed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mpass
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_python
from tests.helpers.two_ranks_training import LENGTH, OPTIONS, one_step

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")


class LoRA(nn.Module):
    """A frozen projection and a product of two thin matrices that is trained."""

    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inner.in_features) / math.sqrt(rank))
        self.up = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down.mT @ self.up.mT


def tiny_llama() -> nn.Module:
    """Two layers of grouped heads; low-rank parts of queries and values are trained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "vocab_size": 64, "head_dim": 64}
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))
    return model


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (4, LENGTH), generator=generator)
    return [{"input_ids": one, "labels": one} for one in ids]


def trained(folder: str, checkpointing: bool, options: dict | None) -> dict[str, Tensor]:
    """The trained parameters after two steps of two batches each."""
    torch._dynamo.reset()
    model = tiny_llama()
    if options is not None:
        model.compile(backend="minference", options=options)
    settings = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    transformers.Trainer(model=model, args=settings, train_dataset=texts()).train()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_trainer_of_low_rank_parts_learns_as_densely_over_every_key(checkpointing, tmp_path):
    expected = trained(str(tmp_path), checkpointing, None)
    found = trained(str(tmp_path), checkpointing, OPTIONS)
    sites = mpass.last_report().sites
    assert [site.training for site in sites] == [True, True], mpass.last_report()
    assert found.keys() == expected.keys()
    assert any(name.endswith("up") and p.any() for name, p in found.items())
    for name, parameter in found.items():
        assert torch.allclose(parameter, expected[name], atol=1e-4), name


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_step_of_two_processes_equals_one_process(kind, tmp_path):
    """Over gloo, by DistributedDataParallel or fully_shard: each has a half of the batch."""
    module = "tests.helpers.two_ranks_training"
    run_python("-m", module, str(tmp_path), kind, PYTHONPATH=str(ROOT))
    expected = one_step(None)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found.pop("sparse sites") == 1
        for name, parameter in expected.items():
            if name != "sparse sites":
                assert torch.allclose(found[name], parameter, atol=1e-6), name
