"""AdaCAD, CAD, CFG, contrastive decoding and DoLa: token for token what their formulas give without a cache."""

import decoding
import pytest
import torch
from decoding import OPTIONS, SEQ2SEQ, dense_mix, make, prompts, states
from transformers import MambaConfig, MambaForCausalLM

import fastcontrast
from fastcontrast import ops
from fastcontrast.decoding.two_logits import candidate_layers, farthest_layer

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {**OPTIONS, "max_new_tokens": 15}


def divergence(z1, z0):
    p, q = z1.softmax(1), z0.softmax(1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2


def adaptive(floor=0.0):
    def mix(z1, z0):
        a = divergence(z1, z0).clamp(min=floor)[:, None]
        return (1 + a) * z1 - a * z0

    return mix


def against_amateur(z1, z0, beta=0.1, weight=2.0):
    expert = z1.log_softmax(1)
    implausible = expert < expert.amax(1, keepdim=True) + torch.tensor(beta).log()
    return (expert - weight * z0.log_softmax(1)).masked_fill(implausible, -torch.inf)


def without(length=4, seed=1):
    ids, mask = prompts(3, length, padding=(0, 2, 0), seed=seed)
    return ids, mask


def run(model, ids, mask, method, **options):
    return fastcontrast.generate(model, ids, method=method, attention_mask=mask, **{**SHORT, **options})


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("length", [4, 13])
def test_two_contexts(name, length):
    """The prompt without the context is shorter, or longer; both are padded on their own."""
    model = make(name)
    (ids, mask), (other, other_mask) = prompts(), without(length)
    sides = {"unconditional_ids": other, "unconditional_mask": other_mask}
    for method, options, mix in (
        ("adacad", {}, adaptive()),
        ("adacad", {"floor": 0.4}, adaptive(0.4)),
        ("cad", {"weight": 0.7}, lambda z1, z0: 1.7 * z1 - 0.7 * z0),
        ("cfg", {"guidance": 1.7}, lambda z1, z0: 1.7 * z1 - 0.7 * z0),
    ):
        want = dense_mix(model, model, ids, mask, other, other_mask, mix)
        assert torch.equal(run(model, ids, mask, method, **sides, **options), want), method


def test_guidance_is_that_of_the_library(llama):
    """Whose processor begins from the last token of the prompt, too."""
    ids, mask = prompts()
    theirs = llama.generate(ids, attention_mask=mask, guidance_scale=1.7, **SHORT)
    assert torch.equal(run(llama, ids, mask, "cfg", guidance=1.7), theirs)
    greedy = llama.generate(ids, attention_mask=mask, do_sample=False, **SHORT)
    assert torch.equal(run(llama, ids, mask, "cfg", guidance=1.0), greedy)


def test_the_two_limits_of_adacad(llama):
    """Equal contexts: divergence 0, greedy search. Contexts that have nothing in common: a = ln 2."""
    ids, mask = prompts()
    out = run(llama, ids, mask, "adacad", unconditional_ids=ids, unconditional_mask=mask, return_dict_in_generate=True,
              return_divergence=True)  # fmt: skip
    assert torch.equal(out.sequences, llama.generate(ids, attention_mask=mask, do_sample=False, **SHORT))
    assert len(out.divergences) == len(out.weights) == 15
    assert torch.stack(out.divergences).max() < 1e-6
    z1, z0 = torch.full((2, 1, 6), -40.0)
    z1[0, 0], z0[0, 3] = 40.0, 40.0
    mix = ops.two_logit_mix(z1, z0)
    torch.testing.assert_close(mix.weight, torch.tensor([2.0]).log())
    assert mix.log_probabilities.argmax() == 0


def test_divergences_are_those_of_the_logits(llama):
    (ids, mask), (other, other_mask) = prompts(), without()
    out = run(llama, ids, mask, "cad", unconditional_ids=other, unconditional_mask=other_mask, weight=0.3,
              return_dict_in_generate=True, return_divergence=True)  # fmt: skip
    z1, z0 = states(llama, ids, mask)[0][:, -1], states(llama, other, other_mask)[0][:, -1]
    torch.testing.assert_close(out.divergences[0], divergence(z1, z0), rtol=1e-4, atol=1e-6)
    assert out["weights"][3].tolist() == pytest.approx([0.3] * 3)
    with pytest.raises(ValueError, match="return_divergence needs return_dict_in_generate=True"):
        run(llama, ids, mask, "cad", unconditional_ids=other, return_divergence=True)


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("method", ["adacad", "cad"])
def test_an_encoder_decoder_has_its_contexts_in_the_encoder(name, method):
    model = make(name)
    ids, _ = prompts(2, padding=())
    other, other_mask = prompts(2, 6, padding=(2, 0), seed=1)
    other, other_mask = other.flip(1), other_mask.flip(1)  # an encoder's padding is on the right
    got = fastcontrast.generate(model, ids, method=method, unconditional_ids=other, unconditional_mask=other_mask,
                                **{**OPTIONS, "max_new_tokens": 6})  # fmt: skip
    mix = adaptive() if method == "adacad" else lambda z1, z0: 1.5 * z1 - 0.5 * z0
    text = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(6):
        with torch.no_grad():
            both = (ids, torch.ones_like(ids)), (other, other_mask)
            outs = [model(input_ids=x, attention_mask=m, decoder_input_ids=text, use_cache=False) for x, m in both]
            sides = [out.logits[:, -1].double() for out in outs]
        text = torch.cat([text, mix(*sides).argmax(1, keepdim=True)], 1)
    assert torch.equal(got, text)


def test_contrastive_decoding(llama):
    amateur = make("gpt2")
    ids, mask = prompts()
    want = dense_mix(llama, amateur, ids, mask, ids, mask, against_amateur)
    assert torch.equal(run(llama, ids, mask, "contrastive_decoding", amateur=amateur), want)
    greedy = llama.generate(ids, attention_mask=mask, do_sample=False, **SHORT)
    for options in ({"amateur_weight": 0.0}, {"plausibility": 1.0}):
        assert torch.equal(run(llama, ids, mask, "contrastive_decoding", amateur=amateur, **options), greedy)


def dense_dola(model, ids, mask, layers, steps=10, beta=0.1):
    head = model.get_output_embeddings()
    for _ in range(steps):
        at = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=at, output_hidden_states=True, use_cache=False)
            last = out.logits[:, -1].double().log_softmax(1)
            earlier = [head(out.hidden_states[j][:, -1]).double().log_softmax(1) for j in layers]
        distance = []
        for other in earlier:
            m = (last.exp() + other.exp()) / 2
            distance.append(((m * (m.log() - last)).mean() + (m * (m.log() - other)).mean()) / 2)
        other = earlier[int(torch.stack(distance).argmax())]
        implausible = last < last.amax(1, keepdim=True) + torch.tensor(beta).log()
        token = (last - other).masked_fill(implausible, -torch.inf).argmax(1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), decoding.longer(mask)
    return ids


def test_dola():
    model = make("llama", num_hidden_layers=4)
    ids, mask = prompts()
    for layers, indices in (("low", [0]), ("high", [2]), ([0, 1, 2, 3], [0, 1, 2, 3])):
        assert candidate_layers("dola", model, layers) == indices
        want = dense_dola(model, ids, mask, indices)
        assert torch.equal(run(model, ids, mask, "dola", layers=layers, max_new_tokens=10), want), layers
    out = run(model, ids, mask, "dola", layers=[0, 1, 2, 3], return_dict_in_generate=True, return_divergence=True)
    assert len(out.layers) == 15 and set(out.layers) <= {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"dola: layers must lie in \[0, 4\), below the last layer, got \[4\]"):
        run(model, ids, mask, "dola", layers=[4])
    with pytest.raises(ValueError, match="layers must be 'low', 'high' or a list"):
        run(model, ids, mask, "dola", layers="middle")


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_dola_of_an_encoder_decoder(name):
    """Its layers are the decoder's, however many the encoder has."""
    model = make(name)
    ids, _ = prompts(2, padding=())
    assert candidate_layers("dola", model, "high") == [1]
    want = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(6):
        with torch.no_grad():
            out = model(input_ids=ids, decoder_input_ids=want, output_hidden_states=True, use_cache=False)
            early = model.get_output_embeddings()(out.decoder_hidden_states[1][:, -1])
        mixed = against_amateur(out.logits[:, -1].double(), early.double(), weight=1.0)
        want = torch.cat([want, mixed.argmax(1, keepdim=True)], 1)
    got = fastcontrast.generate(model, ids, method="dola", layers="high", **{**OPTIONS, "max_new_tokens": 6})
    assert torch.equal(got, want)


def test_the_layers_of_large_and_tied_models():
    def layers(n, tied, which):
        return candidate_layers("dola", make("llama", num_hidden_layers=n, tie_word_embeddings=tied), which)

    assert layers(6, True, "low") == [2] and layers(6, False, "low") == [0, 2] and layers(6, False, "high") == [3, 5]
    assert layers(42, False, "high") == list(range(22, 42, 2)) and layers(42, True, "low") == list(range(2, 20, 2))


def golden(rows, columns, c):
    i, k = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)
    return 3 * torch.sin(1 + c + 0.7 * i + 1.3 * k + 0.11 * i * k)


def test_golden_layer_of_dola():
    """Divergences 0.0119 and 0.0991: the second."""
    assert farthest_layer(golden(2, 6, 0.0), [golden(2, 6, 0.6), golden(2, 6, 1.4)]) == 1
    assert farthest_layer(golden(2, 6, 0.0), [golden(2, 6, 1.4), golden(2, 6, 0.6)]) == 0


def test_sampling_processors_and_the_end(llama):
    (ids, mask), (other, other_mask) = prompts(), without()
    sides = {"unconditional_ids": other, "unconditional_mask": other_mask}
    torch.manual_seed(0)
    first = run(llama, ids, mask, "cad", do_sample=True, top_k=0, temperature=2.0, **sides)
    torch.manual_seed(0)
    assert torch.equal(run(llama, ids, mask, "cad", do_sample=True, top_k=0, temperature=2.0, **sides), first)
    greedy = run(llama, ids, mask, "cad", **sides)
    assert not torch.equal(first, greedy)
    end = int(greedy[2, 12])
    ended = run(llama, ids, mask, "cad", eos_token_id=end, **sides)
    for row, text in zip(ended.tolist(), greedy.tolist(), strict=True):
        stop = text.index(end, 10) + 1 if end in text[10:] else len(text)
        assert row[:stop] == text[:stop] and set(row[stop:]) <= {0}
    assert not torch.equal(run(llama, ids, mask, "cad", repetition_penalty=1.5, **sides), greedy)


def test_streaming_ends_whatever_happens(llama):
    ids, _ = prompts(1, padding=())
    streamer = decoding.Streamer()
    got = run(llama, ids, None, "adacad", unconditional_ids=ids[:, -2:], streamer=streamer)
    assert torch.equal(torch.cat([streamer.values[0][0], *streamer.values[1:]]), got[0]) and streamer.ends == 1
    streamer = decoding.Streamer()
    with pytest.raises(ValueError, match="amateur must be a model of the same vocabulary, got None"):
        run(llama, ids, None, "contrastive_decoding", streamer=streamer)
    assert streamer.ends == 1


def test_the_dictionary(llama):
    (ids, mask), (other, other_mask) = prompts(), without()
    out = run(llama, ids, mask, "cad", unconditional_ids=other, unconditional_mask=other_mask, output_scores=True,
              output_logits=True, output_hidden_states=True, return_dict_in_generate=True)  # fmt: skip
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 15
    assert out.hidden_states[1][-1].shape == (3, 1, 48)
    assert out.past_key_values.layers[0].keys.shape[:3] == (3, 2, 24)
    torch.testing.assert_close(out.scores[0].exp().sum(1), torch.ones(3))  # log-probabilities


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (
            "adacad",
            {},
            TypeError,
            "unconditional_ids must be a tensor of the prompts without the context, got NoneType",
        ),
        (
            "cad",
            {"unconditional_ids": torch.ones(2, 3).long()},
            ValueError,
            r"must be token ids \[3, L\], got \[2, 3\]",
        ),
        ("cad", {"unconditional_ids": torch.ones(3, 0).long()}, ValueError, "must hold at least one token"),
        ("cad", {"unconditional_ids": torch.ones(3, 2)}, ValueError, "must be token ids"),
        ("adacad", {"unconditional_ids": torch.ones(3, 2).long(), "floor": -1.0}, ValueError, "floor must lie in"),
        ("contrastive_decoding", {"amateur_temperature": 0.0}, ValueError, "amateur_temperature must be positive"),
        ("cfg", {"use_cache": False}, ValueError, "use_cache must be True"),
        ("cfg", {"num_beams": 2}, ValueError, "num_beams must be 1"),
    ],
)
def test_errors(llama, method, options, error, message):
    ids, mask = prompts()
    with pytest.raises(error, match=message):
        run(llama, ids, mask, method, **options)


def test_masks_and_models_that_do_not_fit(llama):
    ids, mask = prompts()
    other = torch.ones(3, 3, dtype=torch.long)
    right = torch.tensor([[1, 1, 0]] * 3)
    with pytest.raises(ValueError, match="unconditional_ids must be padded on the left"):
        run(llama, ids, mask, "cad", unconditional_ids=other, unconditional_mask=right)
    with pytest.raises(ValueError, match=r"unconditional_mask must be \[3, 3\], got \[3, 2\]"):
        run(llama, ids, mask, "cad", unconditional_ids=other, unconditional_mask=right[:, :2])
    with pytest.raises(ValueError, match="must leave at least one token a row"):
        run(llama, ids, mask, "cad", unconditional_ids=other, unconditional_mask=right * 0)
    with pytest.raises(ValueError, match="must have the expert's vocabulary of 97, got 98"):
        run(llama, ids, mask, "contrastive_decoding", amateur=make("gpt2", vocab_size=98))
    with pytest.raises(NotImplementedError, match="got an encoder-decoder"):
        run(llama, ids, mask, "contrastive_decoding", amateur=make("t5"))
    state = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4, expand=1))
    with pytest.raises(ValueError, match="MambaForCausalLM has a recurrent state"):
        run(llama, ids, mask, "contrastive_decoding", amateur=state)
