"""Contrastive search by transformers 4.55.4, the last version that had it: `make oracle`, in an environment of its own.

    python tests/oracle.py [--check]

Writes tests/golden/contrastive_search_4.55.4.json, which `tests/test_contrastive_search.py` compares with; --check only
compares with what is recorded.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from decoding import OPTIONS, make, prompts

FILE = Path(__file__).parent / "golden" / "contrastive_search_4.55.4.json"
SETTINGS = {"penalty_alpha": 0.6, "top_k": 4, **OPTIONS}


def cases():
    for name in ("gpt2", "llama", "qwen2", "gemma", "t5"):
        yield name, name, 1, {}
        yield f"{name}, alpha 0.8, k 8", name, 1, {"penalty_alpha": 0.8, "top_k": 8}
    yield "llama, repetition penalty", "llama", 1, {"repetition_penalty": 1.3}
    yield "llama, an end", "llama", 1, {"eos_token_id": 11, "min_new_tokens": 5, "max_new_tokens": 40}
    yield "llama, one forward a candidate", "llama", 1, {"low_memory": True}
    yield "gpt2, batch with padding", "gpt2", 3, {}
    yield "llama, batch with padding", "llama", 3, {}


def run() -> dict:
    assert transformers.__version__ == "4.55.4", transformers.__version__
    found = []
    for name, kind, rows, options in cases():
        ids, mask = prompts(rows, padding=(4, 1, 0) if rows > 1 else ())
        tokens = make(kind).generate(input_ids=ids, attention_mask=mask, **{**SETTINGS, **options})
        found.append({"name": name, "model": kind, "input_ids": ids.tolist(), "attention_mask": mask.tolist(),
                      "options": {**SETTINGS, **options}, "tokens": tokens.tolist()})  # fmt: skip
    return {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "cases": found}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    record = run()
    if "--check" in sys.argv:
        same = json.loads(FILE.read_text())["cases"] == record["cases"]
        print(f"{len(record['cases'])} cases, {'as recorded' if same else 'NOT as recorded'}")
        sys.exit(0 if same else 1)
    FILE.write_text(json.dumps(record) + "\n")
    print(f"{len(record['cases'])} cases written to {FILE}")
