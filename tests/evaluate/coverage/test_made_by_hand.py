"""Tiny models made by hand: encoders, and transformers of diffusers with their scheduler."""

from __future__ import annotations

import sys

import pytest
import torch

import mpass
from mpass.errors import MissingPackageError
from mpass.evaluate.classes import cover_classes
from mpass.models.classes import BY_HAND, KINDS, MAPPINGS, model_classes
from mpass.models.diffusion import models


def test_models_made_by_hand_are_listed_if_asked_for():
    assert set(KINDS) == {*MAPPINGS, "diffusion", "perception"}
    for kind, least in (("diffusion", 20), ("perception", 25)):
        entries = model_classes((kind,))
        assert [entry.model_type for entry in entries] == list(BY_HAND[kind](1))
        assert len({entry.architecture for entry in entries}) == len(entries) >= least


def test_without_diffusers_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    entry = model_classes(("diffusion",))[0]
    with pytest.raises(
        MissingPackageError, match=r"diffusers is not installed.*mpass\[diffusion\]"
    ):
        list(cover_classes([entry]))


@pytest.mark.parametrize("name", ["vit", "wavlm"])
def test_an_encoder_of_pictures_or_sound_is_equal_to_eager(name):
    pytest.importorskip("transformers", reason="transformers is not installed")
    entry = next(e for e in model_classes(("perception",)) if e.model_type == name)
    (record,) = cover_classes([entry])
    assert record.equal and record.difference < 1e-5, record
    # WavLM asks for its weights.
    assert (record.sparse, record.sites) == ((2, 2) if name == "vit" else (0, 2)), record


def test_long_inputs_stay_dense_by_default_for_a_measured_reason():
    pytest.importorskip("transformers", reason="transformers is not installed")
    entry = next(e for e in model_classes(("perception",)) if e.model_type == "videomae")
    (record,) = cover_classes([entry], ["long"])
    assert record.equal and record.difference < 1e-5 and record.scenario == "long", record
    ((reason, count),) = record.dense.items()
    assert reason.startswith("not causal: dense by default, since such attention is diffuse")
    assert count == record.sites == record.attentions == 2


@pytest.mark.parametrize("name", ["dit", "flux", "wan", "hunyuanvideo"])
def test_a_step_is_sparse_and_equal_to_eager(name):
    pytest.importorskip("diffusers", reason="diffusers is not installed: make diffusion")
    entry = next(e for e in model_classes(("diffusion",)) if e.model_type == name)
    (record,) = cover_classes([entry])
    assert record.equal and record.difference < 1e-5, record
    assert record.sparse >= record.attentions > 0
    assert record.sparse == record.sites or name == "hunyuanvideo"  # and a short one over text


@pytest.mark.parametrize("calls", [1, 2], ids=["one call", "two calls"])
def test_a_scheduler_of_diffusers_tells_the_steps(calls):
    """Under guidance as one call of twice the batch, and as two calls."""
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers is not installed: make diffusion"
    )
    plain, model = models()["dit"].build(), models()["dit"].build()
    options = {"min_seq_len": 64, "dense_above": 2.0, "inner_backend": "eager"}
    mpass.compile(model, pattern="a_shape(0, 32)", denoising=True, **options)
    scheduler = diffusers.DDIMScheduler()

    @torch.no_grad()
    def sample(transformer, parts):
        x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
        kinds = torch.tensor([1, 2, 9, 9])
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            given = torch.cat([x, x]).chunk(parts), kinds.chunk(parts)
            made = [
                transformer(own, timestep=t.expand(len(own)), class_labels=kind).sample
                for own, kind in zip(*given, strict=True)
            ]
            wanted, other = torch.cat(made)[:, :4].chunk(2)
            x = scheduler.step(other + 2 * (wanted - other), t, x).prev_sample
        return x

    dense = sample(plain, 1)
    errors = []
    for keep in ("residual", "nothing"):
        with mpass.denoising(6, full=2, every=4, keep=keep, scheduler=scheduler):
            errors.append(float((sample(model, calls) - dense).norm() / dense.norm()))
    assert 0 < errors[0] < errors[1] / 2
