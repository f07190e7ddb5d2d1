"""The README keeps its word: its commands exist, its example runs, and its figures are those of committed results."""

import json
import re
from pathlib import Path

import pytest
import torch
from fastcontrast.benchmarks._harness import operations
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_two_commands_and_both_are_targets():
    (commands,) = blocks("bash")
    commands = [line.split("#")[0].strip() for line in commands.splitlines()]
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.removeprefix("make ") for command in commands} <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_example_runs_and_trains():
    code, _, _ = blocks("python")
    assert len(code.strip().splitlines()) <= 10 + 1  # the blank line between imports and code
    torch.manual_seed(0)
    towers = {name: nn.Linear(16, 8) for name in ("image_tower", "text_tower")}
    images = torch.randn(600, 16)
    before = [p.detach().clone() for tower in towers.values() for p in tower.parameters()]
    seen = {**towers, "loader": [(images, images + 0.1 * torch.randn_like(images))] * 3}
    exec(code, seen)
    after = [p for tower in towers.values() for p in tower.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert seen["loss"].isfinite() and seen["loss_fn"].log_scale.grad is None  # zero_grad saw it


def test_the_example_of_decoding_prints_what_is_shown(capsys, one_thread):
    pytest.importorskip("gguf", reason="the model's package is not installed")
    _, code, _ = blocks("python")
    (shown,) = blocks("text")
    exec(code, {})
    assert capsys.readouterr().out == shown


def test_the_example_of_attention_across_frames_runs():
    _, _, code = blocks("python")
    seen = {"clips": 2, "frames": 3, "tokens": 5, "heads": 2, "width": 8, "qkv": torch.randn(6, 5, 48)}
    exec(code, seen)
    q, k, v = (
        x.transpose(1, 2) for x in (seen["q"][:, 1], seen["k"][:, :2].flatten(1, 2), seen["v"][:, :2].flatten(1, 2))
    )
    dense = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert seen["out"].shape == (2, 3, 5, 2, 8)
    assert not torch.allclose(seen["out"][:, 1], dense)  # at frame 1 both are frame 0
    dense = nn.functional.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5]).transpose(1, 2)
    torch.testing.assert_close(seen["out"][:, 1], dense)


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


MEASURED = {
    "N = 8,192: fastcontrast": ("clip 8192", "fastcontrast"),
    "N = 8,192: fastcontrast, workspace of 4N² bytes": ("clip 8192", "fastcontrast, 4N² bytes"),
    "N = 8,192: dense torch, compiled": ("clip 8192", "dense torch, compiled"),
    "N = 8,192: open_clip.ClipLoss": ("clip 8192", "open_clip.ClipLoss"),
    "N = 16,384: fastcontrast": ("clip 16384", "fastcontrast"),
    "N = 16,384: open_clip.ClipLoss": ("clip 16384", "open_clip.ClipLoss"),
    "N = 65,536: fastcontrast": ("clip 65536", "fastcontrast"),
}
AGAINST = {
    "NT-Xent, 4,096 rows, D = 128": ("nt_xent 4096 × 128", "lightly.NTXentLoss"),
    "supervised contrast, 4,096 rows, D = 128": ("supcon 4096 × 128", "pytorch_metric_learning.SupConLoss"),
    "loss stage of cached training, 4,096 × 384": ("cached loss stage 4096 × 384", "sentence-transformers, 512 rows"),
    "SigLIP, N = 8,192": ("siglip 8192", "open_clip.SigLipLoss"),
    "head's cross entropy, 4,096 tokens": ("cross entropy 4096 × 49152 × 576", "dense torch, compiled"),
    "divergence from a teacher's head, 4,096 tokens": ("forward KL 4096 × 49152 × 576", "dense torch, compiled"),
}


def imported(library: str, name: str) -> str:
    return f"`from fastcontrast.integrations.{library.replace('-', '_')} import {name}`"


ST, PML, LIGHTLY, OPEN_CLIP = "sentence-transformers", "pytorch-metric-learning", "lightly", "open_clip"
RANKING = "CachedMultipleNegativesRankingLoss"
INTEGRATED = {
    (ST, imported(ST, RANKING), "loss stage, 4,096 × 768"): (f"{RANKING}, loss stage 4096 × 768", ST),
    ("", "the same", "a step of MiniLM, 256 pairs"): (f"{RANKING}, MiniLM, 256 pairs", ST),
    ("", "`... import CachedGISTEmbedLoss`", "loss stage, 1,024 × 768"):
        ("CachedGISTEmbedLoss, loss stage 1024 × 768", ST),
    (PML, imported(PML, "NTXentLoss"), "in `SelfSupervisedLoss`, 256 pairs × 128"):
        ("SelfSupervisedLoss(NTXentLoss), 256 pairs × 128", PML),
    ("", "the same", "16,384 pairs × 128"): ("SelfSupervisedLoss(NTXentLoss), 16384 pairs × 128", PML),
    ("", "`... import SupConLoss`", "4,096 × 128"): ("SupConLoss, 4096 × 128", PML),
    (LIGHTLY, imported(LIGHTLY, "NTXentLoss"), "2,048 pairs × 128"): ("NTXentLoss, 2048 pairs × 128", LIGHTLY),
    (OPEN_CLIP, imported(OPEN_CLIP, "ClipLoss"), "8,192 × 512"): ("ClipLoss, 8192 × 512", OPEN_CLIP),
    ("", "the same, with `ClipLoss.reuse = True`", "`--accum-freq 8`, 8,192 × 512"):
        ("accum-freq 8, 8192 × 512", OPEN_CLIP),
    ("", "`... import SigLipLoss`", "8,192 × 512"): ("SigLipLoss, 8192 × 512", OPEN_CLIP),
    ("transformers", "`fastcontrast.integrations.transformers.patch_clip(model)`",
     "tiny `CLIPModel`, 4,096 pairs × 512"): ("CLIPModel, return_loss, 4096 × 512", "transformers"),
}  # fmt: skip

DECODED = [f"{model}, context {length}, k = {k}" for length, k in (("512", 5), ("1,024", 8))
           for model in ("GPT-2 small", "SmolLM2-135M")]  # fmt: skip
DECODERS = ("fastcontrast, tree", "greedy search, transformers", "as transformers 4.55 did")


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], dict]:
    """Of every operation on a CPU."""
    files = (RESULTS / f"{op}.json" for op in operations())
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text())["rows"]]
    return {(row["workload"], row["provider"]): row for row in rows}


def cost(row: dict) -> str:
    if row["status"] == "skipped":
        return "does not fit"
    return f"{seconds(row['seconds'])}, {row['peak_extra_bytes'] / 2**20:.0f} MiB"


def test_tables_are_the_committed_results(results):
    rows = []
    for label, key in MEASURED.items():
        row = results[key]
        over = f"{row['ratio']:.2f} × {row['floor'].removesuffix(' products')}"
        rows.append(f"| {label} | {seconds(row['seconds'])} | {over} | {row['peak_extra_bytes'] / 2**20:.0f} MiB |")
    for label, (workload, rival) in AGAINST.items():
        ours, theirs = (seconds(results[workload, name]["seconds"]) for name in ("fastcontrast", rival))
        rows.append(f"| {label} | {ours} | {theirs}, {rival} |")
    for label, (workload, library) in INTEGRATED.items():
        cells = (cost(results[workload, name]) for name in (library, OURS))
        rows.append("| " + " | ".join([*label, *cells]) + " |")
    for label in DECODED:
        times = (seconds(results[label, name]["seconds"]) for name in DECODERS)
        rows.append("| " + " | ".join([label, *times]) + " |")
    for label, (workload, *rivals) in ACROSS_FRAMES.items():
        for part in (", forward", ""):
            found = (results.get((workload + part, name)) for name in (OURS, *rivals))
            times = ("none" if row is None else seconds(row["seconds"]) for row in found)
            rows.append("| " + " | ".join([label + part, *times]) + " |")
    assert [row for row in rows if row not in README] == []
    unchecked = [line for line in README.splitlines() if re.search(r"^\| .*\d m?s ", line) and line not in rows]
    assert unchecked == []


OURS = "fastcontrast"
ACROSS_FRAMES = {
    "AnimateDiff level 0, temporal": ("animatediff_l0", "torch, copy-free", "torch, rearranged"),
    "TimeSformer, temporal": ("timesformer", "torch, copy-free", "torch, rearranged"),
    "Tune-A-Video level 1, first and previous": ("tune_l1", None, "torch, concatenated"),
}


def test_claims_in_prose_are_the_committed_results(results):
    prose = " ".join(README.split())
    assert f"{results['nt_xent 8192 × 512', 'fastcontrast']['ratio']:.2f} × its two bare products" in README
    core = [row for row in results.values() if row["op"] == "similarity_lse"]
    small = [bar for row in core for bar in row["bars"] if bar["claim"] == "fastcontrast / dense torch ≤ 1"]
    assert len(small) == 20 and all(bar["met"] for bar in small)
    told_here = [row for row in results.values() if row["op"] != "recipes"]  # those are in docs/recipes.md
    missed = {row["workload"] for row in told_here for bar in row["bars"] if bar["met"] is False}
    assert missed == {"siglip 128", "siglip 256"}
    assert "SigLIP is at 128 and 256" in README

    def times(workload: str, rival: str, mine: str = OURS) -> float:
        return results[workload, rival]["seconds"] / results[workload, mine]["seconds"]

    stage, library = "CachedMultipleNegativesRankingLoss, loss stage 4096 × 768", "sentence-transformers"
    bare = results[stage, library]["ratio"]
    assert (
        f"is {times(stage, library):.1f} × faster, where the bare matrix products alone would be {bare:.0f} ×" in prose
    )
    encoded = INTEGRATED["", "the same", "a step of MiniLM, 256 pairs"]
    steps = results[encoded[0], OURS]["reps"]
    assert f"the medians of {steps} differ by {100 * abs(times(*encoded) - 1):.0f} %" in prose
    alone, *ways = (results["clip 8192 × 512", f"{OURS}, {how}"] for how in ("one process", "gather", "ring"))
    assert f"take one process {cost(alone).replace(',', ' and')}, two gloo ranks" in prose
    gathered, ring = (cost(row).replace(",", " and") for row in ways)
    assert f"{gathered} each by gathering, {ring} round the ring" in prose
    forward, both = (times(f"tune_l0{part}", "torch, concatenated") for part in (", forward", ""))
    assert f"is {forward:.2f} × as fast as concatenating, {both:.2f} × with backward" in prose
    free = [row["bars"] for row in results.values() if row["op"] == "temporal_attention" and row["provider"] == OURS]
    free = [bar for bars in free for bar in bars if bar["claim"] == "torch, copy-free / fastcontrast ≥ 1"]
    assert len(free) == 2 * 11 and all(bar["met"] for bar in free)
    assert f"frames is {times('timesformer_long, forward', 'torch, rearranged'):.2f} × as fast as rearranging" in prose
    layer = times("X-CLIP block B/16", "transformers, sdpa", f"{OURS}, patch_video")
    assert f"{100 * (1 - 1 / layer):.0f} % less with its backward" in prose
    message = [row["bars"] for row in results.values() if row["workload"] == "X-CLIP message attention, forward"]
    assert all(bar["value"] >= 3 for bars in message for bar in bars) and any(message)
    beside, copied = (
        results["tune_l1, forward", name]["peak_extra_bytes"] >> 20 for name in (OURS, "torch, concatenated")
    )
    assert beside == 0 and f"concatenating {copied}" in README
    searches = [[results[label, name]["seconds"] for name in DECODERS] for label in DECODED]
    over_greedy = {label: ours / greedy for label, (ours, greedy, _) in zip(DECODED, searches, strict=True)}
    assert all(ratio < 1 for label, ratio in over_greedy.items() if "SmolLM2" in label)
    assert f"takes at most {max(over_greedy.values()):.2f} × the library's greedy search" in prose
    siglip, cross_entropy, divergence = (results[AGAINST[label][0], "fastcontrast"] for label in [*AGAINST][3:])
    assert f"{siglip['ratio']:.2f} × its three bare products" in prose
    heads = f"{cross_entropy['ratio']:.2f} × three products, the divergence {divergence['ratio']:.2f} × four"
    assert heads in prose
    extra = (row["peak_extra_bytes"] / 2**20 for row in (cross_entropy, results[AGAINST[[*AGAINST][4]]]))
    assert "{:.0f} MiB instead of {:.0f}".format(*extra) in prose
    ours = [row for row in results.values() if row["provider"].startswith("fastcontrast") and row["error"] is not None]
    assert max(row["error"] for row in ours) < 1e-5
    cosine = max(
        row["ratio"] for row in results.values() if (row["op"], row["provider"]) == ("max_cosine", "fastcontrast")
    )
    assert f"takes {cosine:.2f} × one read of it at most" in prose
    ours, chain = (results["AdaCAD, R = 1, V = 128,256", name]["seconds"] for name in ("fastcontrast", "torch chain"))
    assert f"{chain / ours:.1f} × faster than the chain" in prose
    demo = json.loads((RESULTS / "demo_icons.json").read_text())
    recall = {way: 100 * share["1"] for way, share in demo["recall_after"].items()}
    claim = f"image → text recall@1 {recall['item_to_name']:.1f} %, text → image {recall['name_to_item']:.1f} %"
    assert claim in prose and f"{demo['seconds']['total']:.0f} s in all" in prose
    assert f"{demo['items']:,} real icons" in prose and f"{demo['batch']:,} pairs a step" in prose
    assert demo["batch"] >= 4096 and min(recall.values()) >= 20 and demo["seconds"]["total"] <= 300
