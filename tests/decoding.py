"""What the tests of decoding share: tiny models with weights that are the same under every version of transformers, and
contrastive search as its definition has it, without a cache."""

import zlib

import torch
import transformers
from torch.nn import functional as F

VOCABULARY = 97
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, **IDS,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "decoder_start_token_id": 0, "forced_eos_token_id": None, **IDS,
}  # fmt: skip
GEMMA = {**LLAMA, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
# Weights so large that scores are no near ties.
MODELS = {
    "gpt2": ("GPT2", "LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, **IDS}, 0.35),
    "llama": ("Llama", "ForCausalLM", LLAMA, 0.35),
    "qwen2": ("Qwen2", "ForCausalLM", LLAMA, 0.35),
    "gemma": ("Gemma", "ForCausalLM", GEMMA, 0.2),
    "gemma2": ("Gemma2", "ForCausalLM", {**GEMMA, "sliding_window": 8}, 0.2),
    "mistral": ("Mistral", "ForCausalLM", {**LLAMA, "sliding_window": 6}, 0.35),
    "t5": ("T5", "ForConditionalGeneration", T5, 0.2),
    "bart": ("Bart", "ForConditionalGeneration", BART, 0.2),
}
SEQ2SEQ = ("t5", "bart")
DECODERS = [name for name in MODELS if name not in SEQ2SEQ]


def make(name: str, **changes):
    family, task, options, size = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**options, **changes})
    model = getattr(transformers, f"{family}{task}")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(size * noise)
            else:  # norms' weights and biases, whose defaults differ between versions
                weight.copy_(0.1 * noise + float(key.endswith("weight")))
    model.tie_weights()
    return model


def prompts(rows: int = 3, length: int = 10, padding=(4, 1, 0), seed: int = 0):
    """Token ids and mask; row i begins with padding[i] tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding[:rows]):
        mask[row, :count] = 0
    return ids.masked_fill(mask == 0, 0), mask


OPTIONS = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 20}


@torch.no_grad()
def states(model, ids, mask, encoder_ids=None):
    """Logits and last hidden states of whole texts, nothing cached."""
    if encoder_ids is not None:
        out = model(input_ids=encoder_ids, attention_mask=torch.ones_like(encoder_ids), decoder_input_ids=ids,
                    output_hidden_states=True, use_cache=False)  # fmt: skip
        return out.logits.float(), out.decoder_hidden_states[-1].float()
    at = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=at, output_hidden_states=True, use_cache=False)
    return out.logits.float(), out.hidden_states[-1].float()


def longer(mask):
    return torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def dense_search(model, ids, mask=None, *, steps=20, k=4, alpha=0.6, encoder_ids=None, process=lambda ids, z: z):
    """Contrastive search by running [x, v] anew for each candidate v."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        z, h = states(model, ids, mask, encoder_ids)
        p, tokens = process(ids, z[:, -1]).softmax(1).topk(k)
        context = F.normalize(h, dim=2)
        score = []
        for j in range(k):
            _, ahead = states(model, torch.cat([ids, tokens[:, j : j + 1]], 1), longer(mask), encoder_ids)
            cosines = (context @ F.normalize(ahead[:, -1:], dim=2).mT)[..., 0]
            score.append((1 - alpha) * p[:, j] - alpha * cosines.masked_fill(mask == 0, -2.0).amax(1))
        best = torch.stack(score, 1).argmax(1)
        ids, mask = torch.cat([ids, tokens.gather(1, best[:, None])], 1), longer(mask)
    return ids


def dense_mix(first, second, ids, mask, other_ids, other_mask, mix, steps=15):
    """Greedy decoding of mix(z₁, z₀), both texts run anew in each step, in float64 after the logits."""
    for _ in range(steps):
        z1, z0 = (states(m, *x)[0][:, -1].double() for m, *x in ((first, ids, mask), (second, other_ids, other_mask)))
        token = mix(z1, z0).argmax(1, keepdim=True)
        ids, other_ids = (torch.cat([x, token], 1) for x in (ids, other_ids))
        mask, other_mask = longer(mask), longer(other_mask)
    return ids


class Streamer:
    """Records what it is given."""

    def __init__(self):
        self.values, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.values.append(value.clone())

    def end(self):
        self.ends += 1
