"""Preference losses: against TRL's trainer on the same pairs, and against values worked out by hand."""

import math

from dpo_training import log1mexp, preference_loss
from medicalgpt.attention import FLAT_ATTENTION
from medicalgpt.collator import PairCollator
from medicalgpt.engine import FlatLM
from medicalgpt.tokenization import tokens

import pytest
import torch
from conftest import build_model

LN2 = math.log(2)


def loss_of(policy, ref, lengths, **options):
    ref = None if ref is None else torch.tensor([ref])
    losses, chosen, rejected = preference_loss(
        torch.tensor([policy]), ref, torch.tensor([lengths]), **options
    )
    return losses.item(), chosen.item(), rejected.item()


@pytest.mark.parametrize(
    "loss_type, expected", [("sigmoid", LN2), ("hinge", 1.0), ("ipo", (1 / (2 * 0.1)) ** 2)]
)
def test_a_policy_that_is_its_reference_has_the_loss_of_no_preference(loss_type, expected):
    loss, chosen, rejected = loss_of([-20.0, -30.0], [-20.0, -30.0], [10, 20], loss_type=loss_type, beta=0.1)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert chosen == rejected == 0


def test_sigmoid_by_hand():
    """Log-ratios 2 and −1, β 0.1: Δ = 3, −log σ(0.3) = log(1 + e^−0.3) = 0.5543552; rewards 0.2 and −0.1."""
    loss, chosen, rejected = loss_of([-18.0, -31.0], [-20.0, -30.0], [10, 20], loss_type="sigmoid", beta=0.1)
    assert loss == pytest.approx(0.5543552, abs=1e-6)
    assert (chosen, rejected) == (pytest.approx(0.2), pytest.approx(-0.1))


def test_label_smoothing_by_hand():
    """ε 0.1: 0.9 · 0.5543552 + 0.1 · log(1 + e^0.3) = 0.9 · 0.5543552 + 0.1 · 0.8543552 = 0.5843552."""
    loss, *_ = loss_of(
        [-18.0, -31.0], [-20.0, -30.0], [10, 20], loss_type="sigmoid", beta=0.1, label_smoothing=0.1
    )
    assert loss == pytest.approx(0.5843552, abs=1e-6)


def test_simpo_by_hand():
    """Per token −1.8 and −1.55, β 2, γ 0.5: −log σ(2 · (−0.25) − 0.5) = log(1 + e) = 1.3132617."""
    loss, chosen, rejected = loss_of(
        [-18.0, -31.0], None, [10, 20], loss_type="simpo", beta=2.0, simpo_gamma=0.5
    )
    assert loss == pytest.approx(1.3132617, abs=1e-6)
    assert (chosen, rejected) == (pytest.approx(-3.6), pytest.approx(-3.1))


def test_orpo_by_hand():
    """Per-token probabilities 0.5 and 0.25: odds 1 and 1/3, log odds ratio log 3.

    NLL log 2, −log σ(log 3) = log(1 + 1/3) = 0.2876821; β 0.1: 0.6931472 + 0.0287682 = 0.7219154.
    """
    loss, *_ = loss_of([10 * math.log(0.5), 20 * math.log(0.25)], None, [10, 20], loss_type="orpo", beta=0.1)
    assert loss == pytest.approx(0.7219154, abs=1e-6)


@pytest.mark.parametrize("x", [-1e-6, -0.1, -0.6931, -5.0, -50.0])
def test_log1mexp_is_exact_at_both_ends(x):
    expected = math.log(-math.expm1(x))
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9)


VOCAB = 300
LENGTHS = [(12, 7, 9), (3, 20, 1), (25, 2, 14), (8, 8, 8)]


def random_ids(num: int, seed: int) -> list[int]:
    return torch.randint(5, VOCAB, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def pairs():
    return [{"prompt_ids": random_ids(p, p), "chosen_ids": random_ids(c, c + 50), "rejected_ids": random_ids(r, r + 90)}
            for p, c, r in LENGTHS]  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """A policy and another reference, so that the losses are far from those of no preference."""
    return build_model("llama", VOCAB, seed=3), build_model("llama", VOCAB, seed=4)


@pytest.fixture(scope="module")
def logps(models, pairs):
    """Summed log-probabilities of the answers by policy and reference, and the answers' lengths, (P, 2) each."""
    rows = [
        pair | {f"{side}_labels": pair[f"{side}_ids"] for side in ("chosen", "rejected")} for pair in pairs
    ]
    batch = PairCollator()([{name: tokens(ids) for name, ids in row.items()} for row in rows])
    results = []
    for model in models:
        model.set_attn_implementation(FLAT_ATTENTION)
        with torch.no_grad():
            token_logps = FlatLM(model).eval()(**batch)
        model.set_attn_implementation("sdpa")
        results.append(torch.zeros(8).index_add(0, batch["sequence_index"], token_logps).view(-1, 2))
    return *results, batch["sequence_index"].bincount().view(-1, 2)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_the_loss_of_a_batch_is_trls(loss_type, models, pairs, logps, tmp_path, tokenizer):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Pretokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    config = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none",
        loss_type=[loss_type], beta=0.3, per_device_train_batch_size=4, max_length=None,
    )  # fmt: skip
    trainer = Pretokenised(
        model=models[0],
        ref_model=models[1],
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(pairs),
    )
    batch = trainer._prepare_inputs(trainer.data_collator(pairs))
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, batch)
    losses, *_ = preference_loss(*logps, loss_type=loss_type, beta=0.3)
    assert losses.std() > 0.01
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)
