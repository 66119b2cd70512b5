"""Pictures of patterns, and the commands that draw, explain and profile."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from typer.testing import CliRunner

import mpass
from mpass.cli.app import app
from mpass.inspection.draw import as_svg, as_text, draw_pattern, made_up_prompt
from mpass.patterns.base import registered_patterns
from tests.helpers.processes import run_python
from tests.helpers.toys import tiny_llama

SVG = "{http://www.w3.org/2000/svg}"


def test_picture_has_the_density_and_recall_of_the_pattern():
    pattern = mpass.AShape(8, 100)
    picture = draw_pattern(pattern, num_tokens=512)
    query, key = made_up_prompt(512, seed=0)
    selected = mpass.computed_mask(query, key, pattern=pattern)[0, 0]
    causal = torch.ones(512, 512).tril().bool()
    weights = (query @ key.mT * 64**-0.5).double()[0, 0]
    weights = weights.masked_fill(~causal, -torch.inf).softmax(-1)
    assert picture.density == pytest.approx(selected.sum().item() / causal.sum().item())
    assert picture.recall == pytest.approx((weights * selected).sum(-1).mean().item(), abs=1e-4)
    assert 0.3 < picture.recall < 0.999
    assert str(pattern) in as_text(picture)


def test_made_up_prompt_tells_patterns_apart():
    few = draw_pattern(mpass.AShape(4, 100), num_tokens=2048)
    found = draw_pattern(mpass.VerticalSlash(100, 100), num_tokens=2048)
    assert found.recall > few.recall + 0.05


def test_svg_draws_every_cell():
    picture = draw_pattern(mpass.AShape(8, 100), num_tokens=512)
    root = ElementTree.fromstring(as_svg([picture, picture]))
    maps = [drawn_cells(group) for group in root.iter(f"{SVG}g")]
    assert [list(cells) for cells in maps] == [
        (levels > 0).nonzero().tolist() for levels in (picture.computed, picture.exact) * 2
    ]


def drawn_cells(group):
    """Rows and columns of the cells that the paths of one map draw, ascending."""
    cells = []
    for path in group.iter(f"{SVG}path"):
        assert 0 < float(path.get("stroke-opacity")) <= 1
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)", path.get("d")):
            cells += [[int(y), int(x) + n] for n in range(int(width))]
    return sorted(cells)


@pytest.mark.parametrize("name", sorted(registered_patterns()))
def test_every_pattern_file_draws_itself(name, capsys, monkeypatch):
    cls = registered_patterns()[name]
    monkeypatch.setattr(sys, "argv", [cls.__module__])
    cls.main()
    assert capsys.readouterr().out.startswith(name)


def test_a_pattern_file_runs_as_a_script(tmp_path):
    target = tmp_path / "picture.svg"
    run_python("-m", "mpass.patterns.a_shape", str(target))
    ElementTree.fromstring(target.read_text())


def test_draw_command_writes_an_svg(tmp_path):
    target = tmp_path / "picture.svg"
    arguments = ["draw", "a_shape(8, 100)", "vertical_slash", "--tokens", "512", "-o", str(target)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    texts = [item.text for item in ElementTree.fromstring(target.read_text()).iter(f"{SVG}text")]
    assert [text.split(" at ")[0] for text in texts if " at " in text] == [
        "a_shape(8, 100)",
        "vertical_slash(1000, 1024)",
    ]


def test_draw_command_refuses_before_it_runs(tmp_path):
    for arguments in (
        ["draw", "no_such_pattern"],
        ["draw", "a_shape", "-o", str(tmp_path / "no" / "folder.svg")],
        ["draw", "a_shape", "--tokens", "0"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, mpass.MpassError), arguments


@pytest.mark.parametrize("command", ["explain", "profile"])
def test_explain_and_profile_commands_refuse_an_output_in_no_folder(command, tmp_path):
    arguments = [command, "smollm2", "-o", str(tmp_path / "no" / "page.html")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, mpass.MpassError)


@pytest.mark.parametrize("command", ["explain", "profile"])
def test_commands_save_a_page_of_a_local_model(command, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path / "model"
    tiny_llama(vocab_size=300).save_pretrained(folder)
    save_byte_tokenizer(transformers, folder)
    target = tmp_path / "page.html"
    arguments = [command, str(folder), "--length", "256", "--min-seq-len", "128", "-o", str(target)]
    torch._dynamo.reset()
    result = CliRunner().invoke(app, [*arguments, "--pattern", "a_shape(8, 64)", "--dtype", "fp32"])
    torch._dynamo.reset()
    assert result.exit_code == 0, (result.output, result.exception)
    assert "a_shape(sink_size=8, window_size=64)" in " ".join(result.output.split())
    assert "layers.1.self_attn" in target.read_text()


def save_byte_tokenizer(transformers, folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
