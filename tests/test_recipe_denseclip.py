"""DenseCLIP against its definition: golden values, the dense formula, prompts, invariants, edges, ranks, command."""

import pytest
import torch
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, waves
from torch import nn
from torch.nn import functional as F

from fastcontrast.recipes._parts import denseclip_pages as pages
from fastcontrast.recipes._parts import denseclip_start as start
from fastcontrast.recipes._parts.denseclip_model import (
    AttentionPool,
    ContextDecoder,
    PostModelPrompt,
    PreModelPrompt,
    PromptedText,
    cut,
)
from fastcontrast.recipes.denseclip import box_targets, detection_loss, score_maps, segmentation_loss

Z = waves(12, 6, 0).view(2, 2, 3, 6).permute(0, 3, 1, 2)  # rows in order b, h, w
TEXT, READ = waves(8, 6, 1).view(2, 4, 6), waves(8, 6, 2).view(2, 4, 6)
PROMPTED = TEXT + 1e-4 * READ
LABELS = (torch.arange(12) % 4).index_fill(0, torch.tensor(0), 255).view(2, 2, 3)
FLAT = torch.zeros(2, 4, 2, 3, dtype=torch.float64)  # logits of a decoder that says nothing
LOG4 = 1.3862943611198906


def masked_boxes() -> tuple[torch.Tensor, torch.Tensor]:
    """Image 0: class 1 at columns 0 and 1; image 1: class 2 at row 0, columns 1 and 2; at stride 4."""
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([[4.0, 0.0, 12.0, 4.0]])
    return box_targets(boxes, (torch.tensor([1]), torch.tensor([2])), 4, (2, 3))


def test_golden_values():
    prompt = PostModelPrompt(6, width=4, layers=1).double()
    prompt.decoder = Says(READ)
    text = prompt(TEXT, torch.zeros(2, 7, 6))
    torch.testing.assert_close(text, PROMPTED, rtol=0, atol=1e-11)  # 1e-4 is a float32
    s = score_maps(Z, PROMPTED)
    close(s[0, :, 0, 0], -0.25094267, -0.18760248, 0.27727002, -0.12759599)
    close(s.square().sum(), 8.98819432)
    value, norm = gradients(lambda z: segmentation_loss(FLAT, score_maps(z, PROMPTED), LABELS, auxiliary=1.0), Z)
    close(value - LOG4, 8.09870178)
    close(norm.norm(), 2.97746221)
    close(segmentation_loss(FLAT, s, LABELS) - LOG4, 0.4 * 8.09870178)
    close(segmentation_loss(FLAT, s, LABELS, reduction="all") - 11 / 12 * LOG4, 0.4 * 7.42380996)
    targets, mask = masked_boxes()
    close(detection_loss(s, targets, mask), 12.82912371)
    close(detection_loss(s, targets, mask, reduction="entries"), 3.20728093)


class Says(nn.Module):
    def __init__(self, what: torch.Tensor):
        super().__init__()
        self.what = what

    def forward(self, text, visual):
        return self.what


def dense_scores(z, text):
    z, text = (x / x.norm(dim=d, keepdim=True) for x, d in ((z, 1), (text, 2)))
    return torch.einsum("bchw,bkc->bkhw", z, text)


def dense_segmentation(logits, z, text, labels, tau=0.1, auxiliary=0.3):
    losses = []
    for x in (logits, dense_scores(z, text) / tau):
        up = F.interpolate(x, labels.shape[1:], mode="bilinear", align_corners=False)
        losses.append(F.cross_entropy(up, labels, ignore_index=255))
    return losses[0] + auxiliary * losses[1]


def dense_detection(z, text, targets, mask, tau=0.1):
    up = F.interpolate(dense_scores(z, text) / tau, mask.shape[1:], mode="bilinear", align_corners=False)
    p = up.sigmoid()
    return -(torch.where(targets, p, 1 - p).log() * mask[:, None]).sum() / mask.sum()


def drawn(b=3, k=5, c=7, h=3, w=4, height=17, width=9):
    torch.manual_seed(0)
    logits, z, text = (torch.randn(b, *x).double() for x in ((k, 6, 8), (c, h, w), (k, c)))
    labels = torch.randint(k, (b, height, width)).masked_fill(torch.rand(b, height, width) < 0.3, 255)
    return logits, z, text, labels, torch.rand(b, k, height, width) < 0.2, torch.rand(b, height, width) < 0.6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_dense_formula(dtype, tolerance):
    *leaves, labels, targets, mask = drawn()
    options = {"tau": 0.1, "auxiliary": 0.3}
    objectives = (
        (lambda a, z, t: segmentation_loss(a, score_maps(z, t), labels, **options),
         lambda a, z, t: dense_segmentation(a, z, t, labels)),
        (lambda z, t: detection_loss(score_maps(z, t), targets, mask, tau=0.1),
         lambda z, t: dense_detection(z, t, targets, mask)),
    )  # fmt: skip
    for (ours, dense), inputs in zip(objectives, (leaves, leaves[1:]), strict=True):
        found, expected = gradients(ours, *(x.to(dtype) for x in inputs)), gradients(dense, *inputs)
        for x, y in zip(found, expected, strict=True):  # nothing is detached
            assert x.dtype == dtype and y.norm() > 0
            assert (x.double() - y).norm() <= tolerance * y.norm()


def test_half_precision_cosines_are_float32():
    _, z, text, *_ = drawn()
    halves = z.to(torch.bfloat16), text.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = score_maps(*halves)
    torch.testing.assert_close(found, score_maps(*(x.float() for x in halves)), rtol=0, atol=0)


def test_invariants():
    logits, z, text, labels, *_ = drawn()
    s, order = score_maps(z, text), torch.tensor([2, 0, 4, 1, 3])
    torch.testing.assert_close(score_maps(3 * z, 0.2 * text), s)
    torch.testing.assert_close(score_maps(z, text[:, order]), s[:, order])
    torch.testing.assert_close(score_maps(z, text[0])[1:], score_maps(z, text[:1].expand(3, -1, -1))[1:])
    assert s.abs().max() <= 1
    # τ is in the auxiliary loss alone
    cold, warm = (gradients(lambda a, b, t=t: segmentation_loss(a, b, labels, tau=t), logits, s) for t in (0.07, 0.5))
    torch.testing.assert_close(cold[1], warm[1])
    assert (cold[2] - warm[2]).abs().max() > 1e-3
    loss = segmentation_loss(logits, s, labels, auxiliary=0.0)
    torch.testing.assert_close(segmentation_loss(logits, s, labels, auxiliary=0.0, tau=1.0), loss)


def test_edges():
    logits, z, text, labels, targets, mask = drawn()
    hidden = z.clone()
    hidden[1, :, 2, 3] = 0
    s, gradient = gradients(lambda x: score_maps(x, text)[1, :, 2, 3].sum(), hidden)
    assert s == 0 and gradient.isfinite().all()
    for dtype in (torch.float64, torch.float32):
        leaves = logits.to(dtype), score_maps(z, text).to(dtype)
        nothing, *found = gradients(lambda a, b: segmentation_loss(a, b, torch.full_like(labels, 255)), *leaves)
        assert nothing == 0 and all((g == 0).all() for g in found)
        nothing, found = gradients(lambda b: detection_loss(b, targets, torch.zeros_like(mask)), leaves[1])
        assert nothing == 0 and (found == 0).all()


def test_boxes_become_targets():
    boxes = torch.tensor([[3.9, 0.0, 12.1, 7.9], [8.0, 2.0, 10.0, 20.0], [5.0, 5.0, 6.0, 6.0], [-5.0, -9.0, 4.0, 4.0]])
    targets, mask = box_targets((boxes, boxes[:0]), (torch.tensor([0, 1, 2, 1]), torch.tensor([]).long()), 3, (4, 4))
    expected = torch.zeros(2, 3, 4, 4).bool()
    expected[0, 0, 0, 0:3] = True  # ⌊12.1 / 4⌋ = 3, ⌊7.9 / 4⌋ = 1
    expected[0, 1, 0, 0] = True  # cut at the border; the second box is [0:5, 2:2], the third [1:1, 1:1]
    assert torch.equal(targets, expected) and torch.equal(mask, expected.any(1))
    both = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 12.0, 12.0]])
    targets, mask = box_targets((both,), (torch.tensor([0, 2]),), 3, (4, 4))
    assert targets[0, :, 1, 1].tolist() == [True, False, True] and mask.sum() == 7 and targets.sum() == 8
    with pytest.raises(ValueError, match=r"box_targets: classes must lie in \[0, 2\), got"):
        box_targets((both,), (torch.tensor([0, 2]),), 2, (4, 4))
    with pytest.raises(ValueError, match=r"box_targets: boxes must be \[N, 4\] .* got \[2, 3\]"):
        box_targets((both[:, :3],), (torch.tensor([0, 2]),), 3, (4, 4))
    assert box_targets((), (), 3, (4, 4))[0].shape == (0, 3, 4, 4)


# ------------------------------------------------------------------------------------------------------------- prompts


def dense_attention(x, memory, state, name, heads):
    q, k, v = (y @ state[f"{name}.{part}.weight"].T for y, part in ((x, "q"), (memory, "k"), (memory, "v")))
    size, out = q.shape[-1] // heads, []
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        out.append((q[..., part] @ k[..., part].mT / size**0.5).softmax(-1) @ v[..., part])
    return torch.cat(out, -1) @ state[f"{name}.out.weight"].T + state[f"{name}.out.bias"]


def dense_decoder(text, visual, state, layers, heads):
    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    memory = norm(linear(norm(visual, "visual.0"), "visual.1"), "visual.2")
    x = linear(norm(text, "text.0"), "text.1")
    for i in range(layers):
        at = f"layers.{i}"
        y = norm(x, f"{at}.norms.0")
        x = x + dense_attention(y, y, state, f"{at}.own", heads)
        x = x + dense_attention(norm(x, f"{at}.norms.1"), memory, state, f"{at}.cross", heads)
        y = linear(norm(x, f"{at}.norms.2"), f"{at}.mlp.0")
        x = x + linear(y * (1 + torch.erf(y / 2**0.5)) / 2, f"{at}.mlp.3")
    return linear(norm(x, "out.0"), "out.1")


def test_the_context_decoder_is_its_formula():
    torch.manual_seed(0)
    decoder = ContextDecoder(5, 6, width=8, heads=2, layers=2).double().eval()
    for p in decoder.parameters():
        nn.init.normal_(p)
    text, visual = torch.randn(2, 3, 5).double(), torch.randn(2, 7, 6).double()
    found = decoder(text, visual)
    torch.testing.assert_close(found, dense_decoder(text, visual, decoder.state_dict(), 2, 2))
    torch.testing.assert_close(decoder(text, visual[:, torch.randperm(7)]), found)
    decoder.train()
    assert not torch.equal(decoder(text, visual), decoder(text, visual))  # dropout
    full = ContextDecoder(512, 512)
    assert sum(p.numel() for p in full.layers.parameters()) == 3 * (
        2 * (4 * 256 * 256 + 256) + 2 * 4 * 256 * 256 + 5 * 256 + 3 * 512
    )


def test_without_gamma_texts_know_no_image():
    prompt, visual = PostModelPrompt(6, 0.0, width=8, layers=1), torch.randn(2, 7, 6)
    assert torch.equal(prompt(TEXT[0].float(), visual), TEXT[:1].float().expand(2, -1, -1))
    prompt = PostModelPrompt(6, width=8, layers=1)
    assert prompt.gamma.shape == (6,) and (prompt.gamma == 1e-4).all()
    text = prompt(TEXT[0].float(), visual)
    assert 0 < (text - TEXT[0].float()).abs().max() < 1e-3 and not torch.equal(text[0], text[1])
    text.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prompt.parameters())


def small_text(**changed) -> PromptedText:
    return PromptedText(11, 10, 6, **{"width": 8, "heads": 2, "layers": 2, "contexts": 3, **changed}).double()


NAMES = torch.tensor([[1, 4, 10, 0, 0], [1, 5, 6, 7, 10]])


def test_prompted_texts():
    torch.manual_seed(0)
    encoder = small_text()
    text = encoder(NAMES)
    assert text.shape == (2, 6)
    assert torch.equal(encoder(torch.where(NAMES == 0, 9, NAMES)), text)  # nothing after the end is read
    # By hand: [start, P, rest] of one name alone, without its padding
    rows = torch.cat([encoder.tokens(NAMES[0, :1]), encoder.contexts, encoder.tokens(NAMES[0, 1:3])])
    rows = (rows + encoder.positions[:6])[None]
    mask = torch.full((6, 6), -torch.inf).double().triu(1)
    torch.testing.assert_close(encoder.projection(encoder.blocks(rows, mask)[0, -1]), text[0])
    # Contexts of each image
    contexts = torch.randn(3, 3, 8).double()
    each = encoder(NAMES, contexts)
    with torch.no_grad():
        encoder.contexts.copy_(contexts[1])
    torch.testing.assert_close(each[1], encoder(NAMES))
    # Only contexts learn
    encoder(NAMES).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is not None] == ["contexts"]
    contexts = PromptedText(11, 10, 6, width=256, heads=2, layers=1).contexts
    assert contexts.shape == (8, 256) and 0.85 < contexts.std() < 0.91  # normal, cut at 2
    for names in (NAMES[0], NAMES[:, :4], NAMES.where(NAMES < 10, 2)):
        with pytest.raises(ValueError, match=r"PromptedText: names must be \[K, 5\] with an end token"):
            encoder(names)


def test_names_are_cut_with_their_end_last():
    long = torch.tensor([[1, 2, 3, 4, 5, 6, 10], [1, 2, 10, 0, 0, 0, 0]])
    assert cut(long, 5, 10).tolist() == [[1, 2, 3, 4, 10], [1, 2, 10, 0, 0]]
    assert cut(long[1:, :3], 5, 10).tolist() == [[1, 2, 10, 0, 0]]


def test_pre_model_prompts_are_read_from_each_image():
    torch.manual_seed(0)
    prompt = PreModelPrompt(small_text(), 6, width=8, heads=2, layers=1, dropout=0.0).double()
    visual = torch.randn(3, 7, 6).double()
    text = prompt(NAMES, visual)
    assert text.shape == (3, 2, 6)
    for i in range(3):
        contexts = prompt.decoder(prompt.queries[None], visual[i : i + 1])
        torch.testing.assert_close(text[i], prompt.encoder(NAMES, contexts)[0])
    score_maps(torch.randn(3, 6, 2, 2).double(), text).square().sum().backward()
    learned = {name.split(".")[0] for name, p in prompt.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {"queries", "decoder"}


def test_pooling_keeps_every_position_of_any_grid():
    torch.manual_seed(0)
    pool = AttentionPool(8, 6, 4, heads=2).double()
    for module in (pool.attention.q, pool.attention.k, pool.attention.v):
        nn.init.zeros_(module.bias)
    for side in (4, 7):
        x = torch.randn(2, 8, side, side).double()
        grid = F.interpolate(pool.grid[None], (side, side), mode="bilinear", align_corners=False)[0]
        pixels = [x[:, :, i, j] + grid[:, i, j] for i in range(side) for j in range(side)]
        tokens = torch.stack([x.mean((2, 3)) + pool.first[0], *pixels], 1)
        state = {f"a.{name}": p for name, p in pool.attention.state_dict().items()}
        torch.testing.assert_close(pool(x), dense_attention(tokens, tokens, state, "a", 2))


def test_what_does_not_fit_is_named():
    logits, z, text, labels, targets, mask = drawn()
    s = score_maps(z, text)
    for call, message in (
        (lambda: score_maps(z[0], text), "score_maps: z must be .* got"),
        (lambda: score_maps(z, text[:2]), r"score_maps: text must be \[K, 7\] or \[3, K, 7\] .* got \[2, 5, 7\]"),
        (lambda: score_maps(z, text[..., :6]), r"text must be \[K, 7\] or .* got \[3, 5, 6\]"),
        (lambda: segmentation_loss(logits, s[:2], labels), r"labels must be \[2, H, W\] .* got \[3, 17, 9\]"),
        (lambda: segmentation_loss(logits, s, labels + 1), r"labels must lie in \[0, 5\), got"),
        (lambda: segmentation_loss(logits, s, labels, reduction="sum"), "segmentation_loss: reduction must be one of"),
        (lambda: detection_loss(s, targets[:, :4], mask), r"targets must be \[3, 5, H, W\] .* got"),
        (lambda: detection_loss(s, targets, mask[:, 1:]), r"mask must be \[3, 17, 9\] .* got"),
        (lambda: detection_loss(s, targets, mask, reduction="valid"), "detection_loss: reduction must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def segmentation_of(logits, z, text, labels):
    return segmentation_loss(logits, score_maps(z, text), labels)


def detection_of(z, text, targets, mask):
    return detection_loss(score_maps(z, text), targets, mask)


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((1, 4), "ring")])
def test_ranks_equal_one(sizes, how):
    logits, z, text, labels, targets, mask = drawn(5)
    labels[0], mask[0] = 255, False  # on the second layout a rank without anything that counts
    assert_ranks_equal_one(segmentation_of, [logits, z, text, labels], sizes, how)
    assert_ranks_equal_one(detection_of, [z, text, targets, mask], sizes, how)


def test_resumes():
    def step(prompt, i):
        text = prompt(TEXT.float(), waves(14, 6, i).view(2, 7, 6).float())
        text.square().sum().backward()
        with torch.no_grad():
            for p in prompt.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        return text

    assert_resumes(lambda: PostModelPrompt(6, width=8, layers=1, dropout=0.0), step)


# ---------------------------------------------------------------------------------------------------------- the command


def test_labels_lie_on_what_they_name():
    glyphs = torch.zeros(1, 32, 32, dtype=torch.uint8)
    glyphs[0, 3:7, 10] = 9
    glyphs[0, 5, 20] = 1
    expected = torch.zeros(32, 32).bool()
    expected[3:7, 10:21] = True
    assert torch.equal(pages.frames(glyphs)[0], expected)


def test_iou_is_the_mean_over_classes_that_occur():
    labels = torch.tensor([[0, 0, 0, 1, 1, 255]])
    found = torch.tensor([[0, 0, 1, 1, 1, 2]])
    assert pages._iou(found, labels, 4) == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(start, "BATCH", 16)
    monkeypatch.setattr(pages, "TEST_PAGES", 8)
    results = train_a_little("denseclip", tmp_path, monkeypatch, BATCH=4)
    assert set(results["models"]) == {"CLIP, fine-tuned", "DenseCLIP"} and len(results["classes"]) > 15
    for label, found in results["models"].items():
        assert len(found["losses"]) == 2 and found["implementations"] == {"upsampled_cross_entropy": "torch"}
        assert [*found["metrics"]][:2] == ["mIoU, %", "pixels right, %"]
        assert ("mIoU of score maps, %" in found["metrics"]) == (label == "DenseCLIP")
