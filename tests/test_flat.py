"""Flat rows: documents and pairs in one row say what they say alone, on every attention variant."""

from medicalgpt.attention import FLAT_ATTENTION, Layout, Span, flat_attention
from medicalgpt.batches import RankBatches
from medicalgpt.collator import FlatCollator, PairCollator
from medicalgpt.engine import FlatLM, LinearLogps
from medicalgpt.probe import bytes_saved_for_backward, confines_documents
from medicalgpt.tokenization import tokens

import pytest
import torch
from conftest import build_model, tiny_config
from peft import LoraConfig, get_peft_model
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

VOCAB = 400


def example(ids: list[int], first_trained: int = 1) -> dict:
    labels = tokens(ids)
    labels[:first_trained] = -100
    return {"input_ids": tokens(ids), "labels": labels, "lengths": [len(ids)]}


def random_ids(num: int, seed: int) -> list[int]:
    return torch.randint(5, VOCAB, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


EXAMPLES = [example(random_ids(n, n), n // 3 + 1) for n in (17, 2, 30, 9, 41)]


def alone(model, examples: list[dict]) -> torch.Tensor:
    """Log-probabilities of trained tokens by the model's own forward, one document at a time."""
    logps = []
    for row in examples:
        ids = torch.tensor(row["input_ids"], dtype=torch.long)[None]
        log_softmax = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        labels = torch.tensor(row["labels"], dtype=torch.long)
        places = [i for i in range(1, len(labels)) if labels[i] != -100]
        logps += [log_softmax[i - 1, labels[i]] for i in places]
    return torch.stack(logps)


def flat_model(model) -> FlatLM:
    model.set_attn_implementation(FLAT_ATTENTION)
    return FlatLM(model).eval()


def own_attention(model, kind="eager"):
    model.set_attn_implementation(kind)
    return model


MODELS = {
    "llama": lambda: build_model("llama", VOCAB),
    "qwen2": lambda: build_model("qwen2", VOCAB),
    "mistral with a sliding window of 5": lambda: MistralForCausalLM(
        MistralConfig(**tiny_config("llama", VOCAB).to_dict() | {"model_type": "mistral", "sliding_window": 5})
    ).eval(),
    "gemma2 with soft caps and a sliding window": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            query_pre_attn_scalar=8, initializer_range=0.3,
        )
    ).eval(),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_documents_in_a_flat_row_say_what_they_say_alone(family):
    torch.manual_seed(0)
    model = MODELS[family]()
    expected = alone(own_attention(model), EXAMPLES)
    logps = flat_model(model)(**FlatCollator()(EXAMPLES))
    assert logps.shape == expected.shape
    assert (logps - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_padded_rows_say_the_same(family):
    torch.manual_seed(0)
    model = own_attention(MODELS[family]())
    logps = FlatLM(model)(**FlatCollator(padded=True)(EXAMPLES))
    assert (logps - alone(model, EXAMPLES)).abs().max() < 1e-5


PAIRS = [
    {
        "prompt_ids": tokens(random_ids(p, p)),
        "chosen_ids": tokens(random_ids(c, c + 50)), "chosen_labels": tokens(random_ids(c, c + 50)),
        "rejected_ids": tokens(random_ids(r, r + 90)), "rejected_labels": tokens(random_ids(r, r + 90)),
    }
    for p, c, r in ((12, 7, 9), (3, 20, 1), (25, 2, 14))
]  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_shared_prompt_changes_nothing(family, padded):
    torch.manual_seed(0)
    model = MODELS[family]()
    documents = [example([*pair["prompt_ids"], *pair[f"{side}_ids"]], len(pair["prompt_ids"]))
                 for pair in PAIRS for side in ("chosen", "rejected")]  # fmt: skip
    expected = alone(own_attention(model), documents)
    batch = PairCollator(padded=padded)(PAIRS)
    logps = (FlatLM(own_attention(model)) if padded else flat_model(model))(**batch)
    assert (logps - expected).abs().max() < 1e-5
    assert batch["sequence_index"].bincount().tolist() == [7, 9, 20, 1, 2, 14]
    if not padded:
        assert batch["num_tokens"] == sum(
            len(v) for pair in PAIRS for k, v in pair.items() if k.endswith("_ids")
        )


def test_an_untrained_token_inside_an_answer_carries_no_loss():
    pair = dict(PAIRS[0], chosen_labels=tokens([-100, -100, *PAIRS[0]["chosen_labels"][2:]]))
    batch = PairCollator()([pair])
    assert batch["sequence_index"].bincount().tolist() == [5, 9]


def test_attention_sinks_take_their_share_of_every_softmax():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    sinks = torch.tensor([0.5, -1.0])
    out, _ = flat_attention(
        None, query, key, value, None, scaling=0.5, layout=Layout((Span(0, 5),)), s_aux=sinks
    )
    scores = 0.5 * query @ key.transpose(2, 3) + torch.full((5, 5), -torch.inf).triu(1)
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp().view(1, 2, 1, 1))
    assert torch.allclose(out.transpose(1, 2), weights @ value, atol=1e-6)


def varlen_by_hand(query, key, value, cu_q, cu_k, window_left):
    """Causal attention as a variable-length kernel defines it: queries are the last of their keys; (T, H, D) each."""
    outputs = []
    for i in range(len(cu_q) - 1):
        q, k, v = query[cu_q[i] : cu_q[i + 1]], key[cu_k[i] : cu_k[i + 1]], value[cu_k[i] : cu_k[i + 1]]
        place = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))[None]
        hidden = (place < 0) | (
            (place > window_left) if window_left >= 0 else torch.zeros_like(place, dtype=torch.bool)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("collator, examples", [(FlatCollator(), EXAMPLES), (PairCollator(), PAIRS)])
def test_what_the_gpu_kernel_is_given_means_what_the_cpu_path_computes(collator, examples, window):
    torch.manual_seed(0)
    batch = collator(examples)
    layout, num = batch["layout"], batch["num_tokens"]
    query, key, value = (torch.randn(1, 2, num, 4) for _ in range(3))
    expected, _ = flat_attention(None, query, key, value, None, layout=layout, sliding_window=window)
    index, cu_q, cu_k = layout.on(torch.device("cpu"))
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if index is not None:
        k, v = k[index], v[index]
    left = -1 if window is None else window - 1
    assert torch.allclose(varlen_by_hand(q, k, v, cu_q, cu_k, left), expected[0], atol=1e-5)
    assert layout.max_lengths == (int(cu_q.diff().max()), int(cu_k.diff().max()))


def test_the_probe_accepts_models_that_use_the_attention_function():
    assert confines_documents(flat_model(build_model("llama", VOCAB)), VOCAB)


def test_the_probe_finds_a_model_that_ignores_it():
    torch.manual_seed(0)
    falcon = FalconForCausalLM(
        FalconConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
        )
    )
    assert not confines_documents(FlatLM(falcon), VOCAB)


def test_the_probe_finds_documents_that_see_each_other(monkeypatch):
    monkeypatch.setattr("medicalgpt.collator.Layout", lambda spans: Layout((Span(0, spans[-1].end),)))
    assert not confines_documents(flat_model(build_model("llama", VOCAB)), VOCAB)


# ---- the projection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_chunked_projection_has_the_value_and_gradient_of_log_softmax(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, requires_grad=True)
    weight, targets, upstream = torch.randn(30, 8), torch.randint(30, (10,)), torch.randn(10)
    expected = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    logps = LinearLogps.apply(hidden, weight, targets, chunk)
    (grad,) = torch.autograd.grad((logps * upstream).sum(), hidden)
    assert torch.allclose(logps, expected, atol=1e-6)
    assert torch.allclose(grad, expected_grad, atol=1e-5)


@pytest.mark.parametrize("trained", ["all", "lora on the head", "modules_to_save"])
def test_a_trained_head_gets_the_gradient_of_the_models_own_loss(trained):
    """Mean cross-entropy of one document by the model itself against ours, every gradient compared."""
    model = build_model("llama", VOCAB, tie_word_embeddings=False)
    if trained == "lora on the head":
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        )
    elif trained == "modules_to_save":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    row = example(random_ids(20, 0), 6)
    ids, labels = (torch.tensor(row[name], dtype=torch.long)[None] for name in ("input_ids", "labels"))
    model(input_ids=ids, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    flat = FlatLM(model)
    flat.bare_lm.set_attn_implementation(FLAT_ATTENTION)
    (-flat(**FlatCollator()([row])).mean()).backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.allclose(actual[name], grad, atol=1e-5), name


def test_neftune_noise_has_the_magnitude_of_its_document():
    model = build_model("llama", VOCAB)
    model.set_attn_implementation(FLAT_ATTENTION)
    flat = FlatLM(model, neftune_alpha=5.0)
    batch = FlatCollator()([example(random_ids(8, 0)), example(random_ids(200, 1))])
    noise = flat.noisy_embeddings(batch["input_ids"], batch) - model.get_input_embeddings()(
        batch["input_ids"]
    )
    for part, length in ((noise[0, :8], 8), (noise[0, 8:], 200)):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound * 1.0001
    flat.eval()
    assert torch.equal(flat(**batch), FlatLM(model).eval()(**batch))


def test_the_measured_activation_memory_grows_with_the_layers():
    small = bytes_saved_for_backward(flat_model(build_model("llama", VOCAB)), VOCAB)
    large = bytes_saved_for_backward(flat_model(build_model("llama", VOCAB, num_hidden_layers=6)), VOCAB)
    assert 2.5 < large / small < 3.5


# ---- who trains on what ----------------------------------------------------------------------------------------


def dealt(
    num_rows: int, num_ranks: int, batch_size: int = 2, epoch: int = 0, **options
) -> list[list[list[int]]]:
    """Return every rank's batches."""
    ranks = []
    for rank in range(num_ranks):
        settings = {"seed": 1, "shuffle": True, "drop_last": False} | options
        batches = RankBatches(num_rows, batch_size, rank=rank, num_ranks=num_ranks, **settings)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    return ranks


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9])
def test_ranks_take_the_batches_of_one_rank_in_turn_and_no_row_twice(num_rows):
    (alone,) = dealt(num_rows, 1)
    two = dealt(num_rows, 2)
    in_turn = [batch for pair in zip(*two, strict=True) for batch in pair]
    assert [batch for batch in in_turn if batch] == alone
    assert sorted(row for batch in in_turn for row in batch) == list(range(num_rows))


def test_every_epoch_has_another_order_that_its_number_decides():
    assert dealt(9, 1, epoch=0) != dealt(9, 1, epoch=1) == dealt(9, 1, epoch=1)
    assert dealt(5, 1, shuffle=False) == [[[0, 1], [2, 3], [4]]]
    assert dealt(5, 1, shuffle=False, drop_last=True) == [[[0, 1], [2, 3]]]


@pytest.mark.parametrize("collator", [FlatCollator(), PairCollator(), FlatCollator(padded=True)])
def test_an_empty_batch_has_no_items_and_a_gradient_of_zero(collator):
    model = get_peft_model(build_model("llama", VOCAB), LoraConfig(r=2, target_modules="all-linear"))
    flat = FlatLM(model)
    flat.bare_lm.set_attn_implementation("eager" if collator.padded else FLAT_ATTENTION)
    logps = flat(**collator([]))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)
