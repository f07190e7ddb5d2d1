"""Losses, GradCache and patched models inside other people's training loops: what a plain loop computes, bit for bit.

Accelerate and Lightning take a loss as the module it is. transformers' Trainer takes the loss of the model.
"""

import copy

import pytest
import torch
from torch import nn

import fastcontrast
from fastcontrast import GradCache

D, WIDTH, BATCH, STEPS = 6, 5, 7, 4

pytestmark = pytest.mark.usefixtures("one_thread")


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, WIDTH)) for _ in range(2))
        self.loss = fastcontrast.ClipLoss(learnable=True)

    def encode(self, x, y):
        return (nn.functional.normalize(out, dim=-1) for out in (self.a(x), self.b(y)))

    def forward(self, x, y):
        return self.loss(*self.encode(x, y))


def batches():
    torch.manual_seed(1)
    return [(torch.randn(BATCH, D), torch.randn(BATCH, D)) for _ in range(STEPS)]


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def plain_loop(model, accumulate=1):
    """Losses of a loop that steps after as many batches as `accumulate` says."""
    optimizer, losses = adam(model), []
    for i, (x, y) in enumerate(batches()):
        loss = model(x, y)
        (loss / accumulate).backward()
        losses.append(loss.detach())
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def assert_equal(ours, theirs, start):
    for (name, mine), yours, before in zip(
        ours.state_dict().items(), theirs.state_dict().values(), start.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, yours), name
        assert not torch.equal(mine, before), name


@pytest.fixture
def no_accelerator():
    """Accelerate keeps its settings for the process."""
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


# --------------------------------------------------------------------------------------------------------- Accelerate


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(no_accelerator, accumulate):
    from accelerate import Accelerator

    start = Towers()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    expected = plain_loop(theirs, accumulate)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    data = torch.utils.data.DataLoader(batches(), batch_size=None)
    ours, optimizer, data = accelerator.prepare(ours, adam(ours), data)
    losses = []
    for x, y in data:
        with accelerator.accumulate(ours):
            loss = ours(x, y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_equal(accelerator.unwrap_model(ours), theirs, start)


# ---------------------------------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # Lightning asks torch's trees so
def test_lightning():
    """Automatic optimization with a loss that learns its scale; GradCache in manual optimization."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Automatic(lightning.LightningModule):
        def __init__(self, towers):
            super().__init__()
            self.towers, self.losses = towers, []

        def configure_optimizers(self):
            return adam(self.towers)

        def training_step(self, batch, _):
            loss = self.towers(*batch)
            self.losses.append(loss.detach())
            return loss

    class Cached(Automatic):
        def __init__(self, towers):
            super().__init__(towers)
            self.automatic_optimization = False
            self.cache = GradCache([towers.a, towers.b], 3, self.compute_loss)

        def compute_loss(self, q, k):
            return self.towers.loss(nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1))

        def training_step(self, batch, _):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.losses.append(self.cache(*batch))
            optimizer.step()

    start = Towers()
    for kind, accumulate in ((Automatic, 1), (Automatic, 2), (Cached, 1)):
        ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
        module = kind(ours)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
        if kind is Automatic:
            expected = plain_loop(theirs, accumulate)
        else:
            cached, optimizer, expected = Cached(theirs), adam(theirs), []
            for x, y in batches():
                optimizer.zero_grad()
                expected.append(cached.cache(x, y))
                optimizer.step()
        assert torch.equal(torch.stack(module.losses), torch.stack(expected))
        assert_equal(ours, theirs, start)
    whole = plain_loop(copy.deepcopy(start))
    torch.testing.assert_close(torch.stack(module.losses), torch.stack(whole), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------ Trainer


def clip_model():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 19},
        vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=10,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.CLIPModel(config)


def pairs(count):
    torch.manual_seed(2)
    words = torch.randint(2, 19, (count, 6))
    words[:, -1] = 19
    return [{"input_ids": ids, "pixel_values": torch.randn(3, 8, 8), "unread": 1} for ids in words]


def collate(examples):
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    return {**batch, "return_loss": True}


def recall(prediction):
    """From the logits, as metrics of CLIP read them."""
    logits = torch.as_tensor(prediction.predictions[0])
    return {
        "shape": list(logits.shape),
        "recall": (logits.argmax(1) == torch.arange(len(logits))).float().mean().item(),
    }


def train(model, folder):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=STEPS,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, gradient_accumulation_steps=2,
        logging_steps=1, learning_rate=0.01, optim="sgd", seed=3, dataloader_pin_memory=False,
    )  # fmt: skip
    data = pairs(STEPS * BATCH * 2)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data[:BATCH])
    trainer.train()
    steps = [{name: entry[name] for name in ("loss", "grad_norm")} for entry in trainer.state.log_history[:STEPS]]
    trainer.compute_metrics = recall
    return steps, trainer.evaluate()


def test_trainer_of_transformers(no_accelerator, tmp_path):
    """A patched CLIPModel: the losses, gradient norms, weights and metrics of the model as it was."""
    from fastcontrast.integrations.transformers import patch_clip

    theirs = clip_model()
    ours = patch_clip(copy.deepcopy(theirs))
    expected, their_metrics = train(theirs, tmp_path)
    steps, metrics = train(ours, tmp_path)
    assert len(steps) == STEPS
    for mine, yours in zip(steps, expected, strict=True):
        assert mine == pytest.approx(yours, rel=1e-4)
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-4, msg=name)
    assert metrics["eval_loss"] == pytest.approx(their_metrics["eval_loss"], rel=1e-4)
    assert metrics["eval_recall"] == their_metrics["eval_recall"] and metrics["eval_shape"] == [BATCH, BATCH]
