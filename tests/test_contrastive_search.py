"""Contrastive search: token for token what its definition gives, whatever the look-ahead; and its errors."""

import functools
import inspect
import json
import threading
from pathlib import Path

import decoding
import pytest
import torch
from decoding import DECODERS, OPTIONS, SEQ2SEQ, dense_search, make, prompts
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache

import fastcontrast
from fastcontrast import contrastive_search, ops
from fastcontrast.decoding.contrastive_search import choose_lookahead

LOOKAHEADS = ("tree", "repeat", "sequential")
RECORDED = json.loads((Path(__file__).parent / "golden" / "contrastive_search_4.55.4.json").read_text())


def search(model, ids, mask=None, **options):
    options = {"penalty_alpha": 0.6, "top_k": 4, **OPTIONS, **options}
    return model.generate(input_ids=ids, attention_mask=mask, custom_generate=contrastive_search, **options)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.mark.parametrize("name", DECODERS)
def test_it_equals_its_definition(name):
    """A batch with padding on the left; for models with a window, texts longer than it."""
    model = make(name)
    ids, mask = prompts()
    want = dense_search(model, ids, mask)
    assert (want[:, -20:] != want[:, -20:-19]).any()
    for lookahead in LOOKAHEADS:
        assert torch.equal(search(model, ids, mask, lookahead=lookahead), want), lookahead


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_eager_attention_takes_the_mask_too(name):
    model = make(name)
    ids, mask = prompts()
    want = dense_search(model, ids, mask, steps=8)
    model.set_attn_implementation("eager")
    assert torch.equal(search(model, ids, mask, lookahead="tree", max_new_tokens=8), want)


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("rows", [1, 3])
def test_an_encoder_decoder(name, rows):
    model = make(name)
    ids, _ = prompts(rows, padding=())
    want = dense_search(model, torch.zeros(rows, 1, dtype=torch.long), encoder_ids=ids)
    for lookahead in ("repeat", "sequential", None):
        assert torch.equal(search(model, ids, lookahead=lookahead), want), lookahead
    with ops.trace() as ran:
        search(model, ids, max_new_tokens=2)
    choice = next(x for x in ran if x.op == "contrastive_search")
    assert choice.implementation == "repeat" and "slots of the cache" in choice.refused["tree"]
    with pytest.raises(NotImplementedError, match="lookahead 'tree' cannot run: the model takes positions"):
        search(model, ids, lookahead="tree")


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_it_gives_the_tokens_of_the_last_version_that_had_it(case):
    """Recorded by `make oracle` with transformers 4.55.4 in an environment of its own."""
    model = make(case["model"])
    ids = torch.tensor(case["input_ids"])
    mask = torch.tensor(case["attention_mask"])
    options = {name: x for name, x in case["options"].items() if name != "low_memory"}
    lookaheads = ("sequential",) if "low_memory" in case["options"] else (None, "repeat")
    for lookahead in lookaheads:
        got = search(model, ids, mask, lookahead=lookahead, **options)
        assert got.tolist() == case["tokens"], lookahead


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_its_limits(llama, lookahead):
    ids, mask = prompts()
    greedy = llama.generate(ids, attention_mask=mask, do_sample=False, **OPTIONS)
    assert torch.equal(search(llama, ids, mask, penalty_alpha=0.0, lookahead=lookahead), greedy)
    assert torch.equal(search(llama, ids, mask, top_k=1, lookahead=lookahead), greedy)
    alone = search(llama, ids, mask, penalty_alpha=1.0, top_k=3, lookahead=lookahead, max_new_tokens=6)
    assert torch.equal(alone, dense_search(llama, ids, mask, steps=6, k=3, alpha=1.0))
    everything = search(llama, ids, mask, top_k=10 * decoding.VOCABULARY, lookahead=lookahead, max_new_tokens=3)
    assert torch.equal(everything, dense_search(llama, ids, mask, steps=3, k=decoding.VOCABULARY))


def test_rows_do_not_know_each_other(llama):
    ids, mask = prompts()
    together = search(llama, ids, mask)
    for row in range(3):
        kept = mask[row].bool()
        alone = search(llama, ids[row : row + 1, kept])
        assert torch.equal(alone[0, kept.sum() :], together[row, 10:])


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_processors_and_stopping(llama, lookahead):
    ids, mask = prompts(padding=())  # of padding the library has opinions of its own: not penalized
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    want = dense_search(llama, ids, mask, process=penalty)
    assert not torch.equal(want, dense_search(llama, ids, mask))
    assert torch.equal(search(llama, ids, mask, repetition_penalty=1.3, lookahead=lookahead), want)
    # A row that has ended gets padding, and the rest goes on.
    free = search(llama, ids, mask)
    end = int(free[0, 13])
    got = search(llama, ids, mask, eos_token_id=end, lookahead=lookahead)
    for row, text in zip(got.tolist(), free.tolist(), strict=True):
        stop = text.index(end, 10) + 1 if end in text[10:] else len(text)
        assert row[:stop] == text[:stop] and set(row[stop:]) <= {0}
    kept = search(llama, ids, mask, eos_token_id=end, min_new_tokens=8, lookahead=lookahead)
    assert end not in kept[:, 10:17].tolist()[0]


def test_a_candidate_of_probability_zero_is_not_chosen(llama):
    """A processor may leave fewer candidates than k."""
    ids, _ = prompts(1, padding=())

    def only_two(ids, scores):
        return scores.masked_fill(~torch.isin(torch.arange(scores.shape[1]), torch.tensor([5, 9])), -torch.inf)

    got = search(llama, ids, logits_processor=LogitsProcessorList([only_two]), penalty_alpha=0.9)
    assert set(got[0, 10:].tolist()) <= {5, 9}


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_the_dictionary(lookahead):
    model = make("llama")
    model.set_attn_implementation("eager")
    ids, mask = prompts()
    out = search(model, ids, mask, lookahead=lookahead, max_new_tokens=5, return_dict_in_generate=True,
                 output_scores=True, output_logits=True, output_hidden_states=True, output_attentions=True)  # fmt: skip
    plain = search(model, ids, mask, max_new_tokens=5)
    assert torch.equal(out.sequences, plain)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == len(out.attentions) == 5
    z, h = decoding.states(model, out.sequences[:, :-1], torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1))
    for step in range(5):
        torch.testing.assert_close(out.logits[step], z[:, 9 + step], rtol=1e-4, atol=1e-4)
        states = out.hidden_states[step][-1]
        assert states.shape == (3, 10 if step == 0 else 1, 48) and len(out.hidden_states[step]) == 3
        torch.testing.assert_close(states[:, -1], h[:, 9 + step], rtol=1e-4, atol=1e-4)
        weights = out.attentions[step][-1]
        assert weights.shape == (3, 4, 10 if step == 0 else 1, 10 + step)
        torch.testing.assert_close(weights.sum(-1)[2], torch.ones(4, weights.shape[2]))
    # The cache lacks the last token only, and the text can go on from it.
    cache = out.past_key_values
    assert cache.get_seq_length() == 14
    full = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    at = (full.cumsum(1) - 1)[:, -1:]
    with torch.no_grad():
        more = model(out.sequences[:, -1:], attention_mask=full, position_ids=at, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(more, decoding.states(model, out.sequences, full)[0][:, -1], rtol=1e-4, atol=1e-4)


def test_the_dictionary_of_an_encoder_decoder():
    model = make("t5")
    ids, _ = prompts(2, padding=())
    out = search(model, ids, max_new_tokens=4, return_dict_in_generate=True, output_hidden_states=True)
    assert len(out.decoder_hidden_states) == 4 and out.decoder_hidden_states[1][-1].shape == (2, 1, 48)
    assert out.encoder_hidden_states is not None
    assert out.past_key_values.get_seq_length() == 4
    assert out.past_key_values.self_attention_cache.layers[0].keys.shape[0] == 2
    assert torch.equal(out.sequences, search(model, ids, max_new_tokens=4))


def test_one_cache_holds_the_prefix_and_k_slots(llama, monkeypatch):
    """Allocated once, written in place: at most one cache of the whole text and k more slots, no copy a step."""
    from fastcontrast.decoding import _cache

    blocks, allocate = [], _cache.PrefixCache.allocate

    def counted(self, index, keys, values):
        places = allocate(self, index, keys, values)
        blocks.append(self.blocks[0].data_ptr())
        assert places == ((0, 2 * index), (0, 2 * index + 1))
        return places

    monkeypatch.setattr(_cache.PrefixCache, "allocate", counted)
    monkeypatch.setattr(_cache.PrefixCache, "grow", lambda *_: pytest.fail("the cache grew"))
    ids, mask = prompts()
    out = search(llama, ids, mask, lookahead="tree", return_dict_in_generate=True, top_k=5)
    assert len(blocks) == 2 and len(set(blocks)) == 1
    (block,) = out.past_key_values.blocks
    assert block.shape == (2, 2, 3, 2, 30 + 5, 12)  # layers, keys and values, B, H, T + k, D
    assert block.nbytes <= (1 + 2 * 5 / 30) * (2 * 2 * 3 * 2 * 30 * 12 * 4)


@pytest.mark.parametrize(("name", "changes"), [("bart", {}), ("t5", {"num_layers": 1, "num_decoder_layers": 3})])
def test_the_cache_of_an_encoder_decoder_has_the_decoders_layers(name, changes):
    ids, _ = prompts(2, padding=())
    out = search(make(name, **changes), ids, max_new_tokens=4, return_dict_in_generate=True)
    (block,) = out.past_key_values.self_attention_cache.blocks
    assert block.shape[0] == changes.get("num_decoder_layers", 2)


def test_a_cache_grows_when_a_text_outgrows_it():
    from fastcontrast.decoding._cache import PrefixCache

    cache, states = PrefixCache(2, 3), torch.randn(2, 1, 2, 9, 4)
    for step in range(9):
        for layer in range(2):
            keys, values = cache.update(
                states[layer, :, :, step : step + 1], -states[layer, :, :, step : step + 1], layer
            )
    assert torch.equal(cache.layers[1].keys, states[1]) and torch.equal(values, -states[1])
    assert torch.equal(keys, states[1]) and cache.capacity == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_half_precision(dtype, lookahead):
    model = make("llama").to(dtype)
    ids, mask = prompts()
    got = search(model, ids, mask, lookahead=lookahead, max_new_tokens=6)
    exact = dense_search(model, ids, mask, steps=1)  # later tokens may differ where rounding decides
    assert torch.equal(got[:, :11], exact) and got.shape == (3, 16)


def test_a_static_cache_is_replaced_by_the_preallocated_one(llama):
    ids, mask = prompts()
    with ops.trace() as ran:
        got = search(llama, ids, mask, cache_implementation="static")
    assert torch.equal(got, search(llama, ids, mask))
    assert next(x for x in ran if x.op == "contrastive_search").implementation == "tree"


def test_embeddings_instead_of_tokens(llama):
    ids, mask = prompts()
    embeds = llama.get_input_embeddings()(ids).detach()
    got = llama.generate(inputs_embeds=embeds, attention_mask=mask, custom_generate=contrastive_search,
                         penalty_alpha=0.6, top_k=4, **OPTIONS)  # fmt: skip
    assert torch.equal(got, search(llama, ids, mask)[:, 10:])


def test_a_head_that_cannot_be_tapped(llama, monkeypatch):
    """Then hidden states are asked for, and the logits of all candidates computed."""
    ids, mask = prompts()
    want = search(llama, ids, mask)
    monkeypatch.setattr(type(llama), "get_output_embeddings", lambda self: None)
    for lookahead in LOOKAHEADS:
        assert torch.equal(search(llama, ids, mask, lookahead=lookahead), want), lookahead


def test_two_threads_share_a_model(llama):
    ids, mask = prompts()
    wanted = [search(llama, ids, mask), search(llama, ids.flip(0), mask.flip(0), top_k=3)]
    got = [None, None]

    def run(i):
        for _ in range(3):
            got[i] = search(llama, ids, mask) if i == 0 else search(llama, ids.flip(0), mask.flip(0), top_k=3)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# ------------------------------------------------------------------------------------------------------------- the seam


def test_what_generate_may_pass():
    """The names `generate` looks for, and one of 4.56 that it passes whether named or not."""
    parameters = inspect.signature(contrastive_search).parameters
    assert list(parameters)[:5] == ["model", "input_ids", "logits_processor", "stopping_criteria", "generation_config"]
    assert {"penalty_alpha", "top_k", "lookahead", "stream_to", "streamer", "synced_gpus"} <= {*parameters}
    assert parameters["model_kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_settings_may_come_from_the_generation_config(llama):
    ids, mask = prompts()
    want = dense_search(llama, ids, mask, k=3, alpha=0.4)
    config = GenerationConfig(penalty_alpha=0.4, top_k=3, **OPTIONS)
    got = llama.generate(ids, attention_mask=mask, generation_config=config, custom_generate=contrastive_search)
    assert torch.equal(got, want)
    bound = functools.partial(contrastive_search, penalty_alpha=0.4, top_k=3)
    assert torch.equal(llama.generate(ids, attention_mask=mask, custom_generate=bound, **OPTIONS), want)
    # The library's own k = 50 is nobody's wish: k = 4.
    default = llama.generate(ids, attention_mask=mask, custom_generate=contrastive_search, **OPTIONS)
    assert torch.equal(default, dense_search(llama, ids, mask))


def test_streaming(llama):
    ids, _ = prompts(1, padding=())
    for stream in ({"stream_to": decoding.Streamer()}, {"streamer": decoding.Streamer()}):
        (streamer,) = stream.values()
        if "stream_to" in stream:
            got = search(llama, ids, max_new_tokens=5, **stream)
        else:
            got = fastcontrast.generate(
                llama, ids, penalty_alpha=0.6, top_k=4, **{**OPTIONS, "max_new_tokens": 5}, **stream
            )
        assert torch.equal(streamer.values[0], ids) and len(streamer.values) == 6 and streamer.ends == 1
        assert torch.equal(torch.cat(streamer.values[1:]), got[0, 10:])


def test_a_consumer_never_waits_for_ever(llama):
    """A streamer is ended when a step raises, when the prompt cannot be put, and when nothing was run at all."""
    ids, _ = prompts(1, padding=())

    class Wrong(RuntimeError):
        pass

    def fail(ids, scores):
        if ids.shape[1] > 12:
            raise Wrong
        return scores

    streamer = decoding.Streamer()
    with pytest.raises(Wrong):
        search(llama, ids, stream_to=streamer, logits_processor=LogitsProcessorList([fail]))
    assert streamer.ends == 1 and len(streamer.values) == 4
    streamer = decoding.Streamer()
    with pytest.raises(ValueError, match="penalty_alpha"):
        fastcontrast.generate(llama, ids, penalty_alpha=2.0, streamer=streamer, **OPTIONS)
    assert streamer.ends == 1

    class Closed(decoding.Streamer):
        def put(self, value):
            raise Wrong

    streamer = Closed()
    with pytest.raises(Wrong):
        search(llama, ids, stream_to=streamer)
    assert streamer.ends == 1


def test_which_lookahead_and_why(llama):
    assert choose_lookahead(llama, None, {}).implementation == "tree"
    llama.config._attn_implementation_internal, kept = "flash_attention_2", llama.config._attn_implementation_internal
    try:
        choice = choose_lookahead(llama, None, {})
        assert (choice.implementation, choice.refused) == (
            "repeat",
            {"tree": "flash_attention_2 takes no explicit mask"},
        )
        with pytest.raises(NotImplementedError, match="flash_attention_2 takes no explicit mask"):
            choose_lookahead(llama, "tree", {})
    finally:
        llama.config._attn_implementation_internal = kept


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_alpha": 1.5}, r"penalty_alpha must lie in \[0, 1\], got 1.5"),
        ({"penalty_alpha": -0.1}, r"penalty_alpha must lie in \[0, 1\], got -0.1"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"lookahead": "wide"}, "lookahead must be one of tree, repeat, sequential or None, got 'wide'"),
        ({"use_cache": False}, "use_cache must be True, got False"),
        ({"do_sample": True}, "do_sample must be False, got True"),
        ({"num_beams": 2}, "num_beams must be 1, got 2"),
    ],
)
def test_settings_out_of_range(llama, options, message):
    ids, mask = prompts()
    with pytest.raises(ValueError, match=f"contrastive_search: {message}"):
        search(llama, ids, mask, **options)


def test_prompts_that_cannot_be_continued(llama):
    ids, mask = prompts()
    with pytest.raises(ValueError, match="padding must be on the left"):
        contrastive_call(llama, ids, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match=r"input_ids must hold at least one token a row, got \[3, 0\]"):
        contrastive_call(llama, ids[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask must be \[3, 10\], got \[3, 9\]"):
        contrastive_call(llama, ids, attention_mask=mask[:, 1:])
    cache = DynamicCache()
    cache.update(torch.zeros(3, 2, 4, 12), torch.zeros(3, 2, 4, 12), 0)
    with pytest.raises(ValueError, match="past_key_values must be empty, got 4 positions"):
        contrastive_call(llama, ids, past_key_values=cache)


def contrastive_call(model, ids, **model_kwargs):
    config = GenerationConfig(max_length=20, penalty_alpha=0.6, top_k=4)
    return contrastive_search(model, ids, LogitsProcessorList(), StoppingCriteriaList(), config, **model_kwargs)


def test_a_recurrent_state_is_refused():
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4, expand=1)
    model = MambaForCausalLM(config)
    with pytest.raises(ValueError, match="MambaForCausalLM has a recurrent state"):
        search(model, torch.tensor([[1, 2, 3]]))


def test_a_cache_of_another_kind_is_refused(llama):
    ids, _ = prompts(1, padding=())
    with pytest.raises(ValueError, match="cache_implementation must be dynamic or static, got 'offloaded'"):
        config = GenerationConfig(max_length=20, penalty_alpha=0.6, top_k=4, cache_implementation="offloaded")
        contrastive_search(llama, ids, LogitsProcessorList(), None, config)


VOCABULARY = decoding.VOCABULARY


def test_generate_by_name(llama):
    ids, mask = prompts()
    with pytest.raises(ValueError, match="method must be one of contrastive, adacad"):
        fastcontrast.generate(llama, ids, method="beam")
    with pytest.raises(TypeError, match="got Linear"):
        fastcontrast.generate(torch.nn.Linear(1, 1), ids)
    with pytest.raises(ValueError, match="stop_strings need the model's tokenizer"):
        fastcontrast.generate(llama, ids, stop_strings=["a"])
    greedy = llama.generate(ids, attention_mask=mask, do_sample=False, **OPTIONS)
    assert torch.equal(fastcontrast.generate(llama, ids, method="greedy", attention_mask=mask, **OPTIONS), greedy)
    want = search(llama, ids, mask)
    got = fastcontrast.generate(llama, ids, attention_mask=mask, penalty_alpha=0.6, top_k=4, **OPTIONS)
    assert torch.equal(got, want)


def test_stop_strings(llama):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*(f"w{i}" for i in range(VOCABULARY)), "abcdef"]  # the last is what the library tries a tokenizer with
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    ids, _ = prompts(1, padding=())
    free = search(llama, ids)[0, 10:].tolist()
    stop = f"w{free[4]}"
    got = fastcontrast.generate(
        llama, ids, penalty_alpha=0.6, top_k=4, tokenizer=tokenizer, stop_strings=[stop], **OPTIONS
    )
    first = next(i for i, token in enumerate(free) if f"w{token}".startswith(stop))
    assert got[0, 10:].tolist() == free[: first + 1]
