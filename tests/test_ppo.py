"""PPO: its equations by hand, its parts against independent computations, what must not change, and that it learns."""

import json
import logging
import math
import random
from pathlib import Path
from types import SimpleNamespace

import merge_peft_adapter
import ppo_training
import reward_modeling
import supervised_finetuning
from medicalgpt.attention import FLAT_ATTENTION
from medicalgpt.backbone import POLICY, VALUE, Backbone
from medicalgpt.callbacks import ProgressBar
from medicalgpt.collator import FlatCollator
from medicalgpt.engine import FlatLM
from medicalgpt.errors import ConfigError, DataError, ModelError, RunError, StoppedError
from medicalgpt.rank_means import RankMeans
from medicalgpt.rewards import FunctionScorer, ScoreScale
from medicalgpt.rl_trainer import answers_per_update
from medicalgpt.rollout import Sampler
from medicalgpt.scoring import load_judge
from medicalgpt.tokenization import tokens
from ppo_training import (
    adapted_kl_coef,
    advantages_and_returns,
    leave_one_out,
    policy_losses,
    token_rewards,
    value_losses,
)

import pytest
import torch
from conftest import build_model, torchrun, write_jsonl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# ---- the equations, by hand --------------------------------------------------------------------------------


def test_the_score_stands_on_the_last_token_and_every_token_pays_for_its_distance():
    """β 0.1; two tokens of 0.5 and −0.2 nats with score 3; one token of 1 nat with score −1."""
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    rewards = token_rewards(torch.tensor([3.0, -1.0]), torch.tensor([[0.5, -0.2], [1.0, 9.0]]), mask, 0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 3.02], [-1.1, 0.0]]))


def test_advantages_by_hand():
    """γ 0.9, λ 0.5, rewards 0, 1, 2, values 0.5, 1, 1.5.

    δ3 = 2 − 1.5 = 0.5; δ2 = 1 + 0.9·1.5 − 1 = 1.35; δ1 = 0 + 0.9·1 − 0.5 = 0.4. A3 = 0.5;
    A2 = 1.35 + 0.45·0.5 = 1.575; A1 = 0.4 + 0.45·1.575 = 1.10875. The second answer has one token: A = 1 − 0.25.
    """
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    rewards = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [0.25, 7.0, 7.0]]) * mask
    advantages, returns = advantages_and_returns(rewards, values, mask, 0.9, 0.5)
    assert torch.allclose(advantages, torch.tensor([[1.10875, 1.575, 0.5], [0.75, 0.0, 0.0]]))
    assert torch.allclose(returns, torch.tensor([[1.60875, 2.575, 2.0], [1.0, 0.0, 0.0]]))


def test_with_lambda_and_gamma_one_the_return_is_what_is_still_to_come():
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3)
    _, returns = advantages_and_returns(rewards, torch.tensor([[0.3, -0.7, 0.1]]), mask, 1.0, 1.0)
    assert torch.allclose(returns, torch.tensor([[7.0, 6.0, 4.0]]))


def test_the_clipped_policy_loss_by_hand():
    """ε 0.2. A 1: ratio 1.5 → −1.2 (clipped), 0.5 → −0.5. A −1: ratio 1.5 → 1.5, 0.5 → 0.8 (clipped)."""
    ratios, advantages = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    losses, clipped = policy_losses(ratios.log() - 3, torch.full((4,), -3.0), advantages, 0.2)
    assert torch.allclose(losses, torch.tensor([-1.2, -0.5, 1.5, 0.8]))
    assert clipped.tolist() == [1, 0, 0, 1]


def test_the_clipped_value_loss_by_hand():
    """ε 0.2, old value 0, return 1: V 0.5 → clip 0.2 → ½·0.64; V −0.5 → ½·2.25. Return 0.1: V 0.5 → ½·0.16."""
    values, returns = torch.tensor([0.5, -0.5, 0.5]), torch.tensor([1.0, 1.0, 0.1])
    losses, clipped = value_losses(values, torch.zeros(3), returns, 0.2)
    assert torch.allclose(losses, torch.tensor([0.32, 1.125, 0.08]))
    assert clipped.tolist() == [1, 0, 0]


def test_the_others_to_a_prompt_are_the_baseline():
    """1, 2, 6 to one prompt: 1 − 4, 2 − 3.5, 6 − 1.5; 0, 0, 3: −1.5, −1.5, 3."""
    found = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
    assert found.tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_the_penalty_follows_the_distance_in_small_steps():
    """Target 6, 32 answers, horizon 1000: 12 nats → error clipped to 0.2: × 1.0064; 5.4 nats → −0.1: × 0.9968."""
    assert adapted_kl_coef(0.05, 12.0, 6.0, 32, 1000) == pytest.approx(0.05 * 1.0064)
    assert adapted_kl_coef(0.05, 5.4, 6.0, 32, 1000) == pytest.approx(0.05 * 0.9968)
    assert adapted_kl_coef(0.05, 0.0, 6.0, 32, 1000) == pytest.approx(0.05 * 0.9936)


def test_whitening_sees_tokens_only():
    """1, 3 and 5 have mean 3 and variance 8/3; what stands behind an answer's end stays zero."""
    means = RankMeans(1, "cpu")
    values, mask = torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    scale = math.sqrt(8 / 3)
    found = means.whiten(values, mask)
    assert torch.allclose(found, torch.tensor([[-2 / scale, 0.0], [2 / scale, 0.0]]), atol=1e-6)
    kept = means.whiten(values, mask, keep_mean=True)
    assert torch.allclose(kept, torch.tensor([[3 - 2 / scale, 3.0], [3 + 2 / scale, 0.0]]), atol=1e-6)


# ---- parts against other computations ----------------------------------------------------------------------

VOCAB = 300


@pytest.fixture
def backbone():
    """A policy away from its base, and a value function."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    lm = get_peft_model(build_model("llama", VOCAB, seed=5), config)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lm.get_base_model().set_attn_implementation(FLAT_ATTENTION)
    whole = Backbone(FlatLM(lm), temperature=0.7).eval()
    whole.add_value()
    whole.freeze_all_but(POLICY, VALUE)
    return whole


def rows(*lengths: tuple[int, int], seed: int = 0) -> list[dict]:
    """Return prompts and answers of some lengths as a collator takes them."""
    generator, examples = torch.Generator().manual_seed(seed), []
    for prompt, answer in lengths:
        ids = tokens(torch.randint(5, VOCAB, (prompt + answer,), generator=generator).tolist())
        labels = ids.copy()
        labels[:prompt] = -100
        examples.append({"input_ids": ids, "labels": labels, "lengths": [len(ids)]})
    return examples


def own_log_softmax(lm, example: dict, prompt: int, temperature: float) -> torch.Tensor:
    """The model's own log-probabilities at an answer's tokens, with its own attention, (n, V)."""
    lm.get_base_model().set_attn_implementation("sdpa")
    logits = lm(input_ids=torch.tensor(example["input_ids"][None].astype("int64"))).logits[0]
    lm.get_base_model().set_attn_implementation(FLAT_ATTENTION)
    return (logits[prompt - 1 : -1] / temperature).log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("with_gradient", [False, True])
def test_log_probabilities_and_entropies_are_the_models_own_at_the_temperature(with_gradient, backbone):
    lengths = [(7, 5), (12, 3)]
    examples = rows(*lengths)
    logps, entropies = backbone.logps(FlatCollator()(examples), entropy_has_gradient=with_gradient)
    references = backbone.reference_logps(FlatCollator()(examples))
    own, entropy, reference = [], [], []
    for example, (prompt, answer) in zip(examples, lengths, strict=True):
        ids = torch.tensor(example["input_ids"][prompt:].astype("int64"))[:, None]
        table = own_log_softmax(backbone.lm, example, prompt, 0.7)
        own.append(table.gather(1, ids)[:, 0])
        entropy.append(-(table.exp() * table).sum(-1))
        with backbone.lm.disable_adapter():
            reference.append(own_log_softmax(backbone.lm, example, prompt, 0.7).gather(1, ids)[:, 0])
        assert len(table) == answer
    assert torch.allclose(logps, torch.cat(own), atol=1e-4)
    assert torch.allclose(entropies, torch.cat(entropy), atol=1e-4)
    assert torch.allclose(references, torch.cat(reference), atol=1e-4)
    assert (logps - references).abs().max() > 1e-2


def test_switching_adapters_leaves_what_is_trained_as_it_was(backbone):
    before = [p.requires_grad for p in backbone.parameters()]
    batch = FlatCollator()(rows((4, 3)))
    backbone.reference_logps(batch)
    backbone.values(batch).sum().backward()
    assert [p.requires_grad for p in backbone.parameters()] == before
    names = {n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert names and all(".value." in n or "value_head" in n for n in names)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy(backbone):
    """Against autograd through the model's own logits."""
    example = rows((5, 4))[0]
    batch = FlatCollator()([example])
    backbone.logps(batch, entropy_has_gradient=True)[1].sum().backward()
    parameters = backbone.parameters_of(POLICY)
    found = [p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    table = own_log_softmax(backbone.lm, example, 5, 0.7)
    (-(table.exp() * table).sum()).backward()
    for one, parameter in zip(found, parameters, strict=True):
        assert torch.allclose(one, parameter.grad, atol=1e-4)


def sampler(model, **options) -> Sampler:
    settings = {"stop_ids": [2], "max_new_tokens": 12, "temperature": 1.0, "batch_size": 8}
    return Sampler(FlatLM(model).eval(), **(settings | options))


PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 10, 11], [20], [30, 31, 32, 33]]


def test_the_likeliest_answers_are_those_of_generate():
    model = build_model("llama", 40, seed=2)
    draws = sampler(model, temperature=0)(PROMPTS, [0] * 4)
    for prompt, draw in zip(PROMPTS, draws, strict=True):
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        assert draw.ids == output[0, len(prompt) :].tolist()
        assert draw.ended == (draw.ids[-1] == 2)


def test_an_answer_does_not_depend_on_the_batch_it_is_drawn_in():
    """A small vocabulary, so that some answers end while others go on."""
    model = build_model("llama", 12, seed=3)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 10, 11], [3], [6, 7, 8, 9]] * 4
    seeds = list(range(16))
    together = sampler(model, batch_size=16)(prompts, seeds)
    assert len({len(draw.ids) for draw in together}) > 2 and any(draw.ended for draw in together)
    for size in (1, 3):
        assert sampler(model, batch_size=size)(prompts, seeds) == together


def test_tokens_are_drawn_as_often_as_the_model_says():
    """4,000 draws of one token: every frequency within five standard errors of softmax(logits / 0.8)."""
    model = build_model("llama", 12, seed=4)
    draws = sampler(model, max_new_tokens=1, temperature=0.8, batch_size=1000)([[5, 6]] * 4000, range(4000))
    with torch.no_grad():
        wanted = (model(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 0.8).softmax(-1)
    found = torch.bincount(torch.tensor([draw.ids[0] for draw in draws]), minlength=12) / 4000
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-9).all()


# ---- runs --------------------------------------------------------------------------------------------------

SENTENCES = ["Drink water and rest.", "A fever is a temperature above 38 degrees.", "I am here to help you.",
             "It has a beginning and an end.", "Rest helps.", "You are a helpful person."]  # fmt: skip
RARE = "See a doctor if it lasts."


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    """Conversations whose answers rarely name a doctor and rarely end within 20 tokens."""
    generator, chats = random.Random(0), []
    for i in range(200):
        said = generator.choices(
            [*SENTENCES, RARE], weights=[4] * 6 + [0.5], k=generator.choice([1, 3, 4, 4, 5, 5, 5, 5])
        )
        chats.append({"conversations": [{"from": "human", "value": f"Question {i}: what should I do?"},
                                        {"from": "gpt", "value": " ".join(said)}]})  # fmt: skip
    return write_jsonl(tmp_path_factory.mktemp("talks") / "a.jsonl", chats)


@pytest.fixture(scope="module")
def sft_model(talks, shared_tokenizer, tmp_path_factory) -> Path:
    """A tiny model that has learned to speak like them."""
    root = tmp_path_factory.mktemp("sft")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
    model = build_model("llama", len(shared_tokenizer), tie_word_embeddings=True, **sizes)
    model.save_pretrained(root / "raw")
    shared_tokenizer.save_pretrained(root / "raw")
    options = {
        "model_name_or_path": root / "raw", "train_file_dir": talks, "output_dir": root / "sft",
        "template_name": "chatml", "use_peft": False, "torch_dtype": "float32", "bf16": False, "report_to": "none",
        "num_train_epochs": 8, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "eval_strategy": "no",
        "gradient_accumulation_steps": 1, "logging_steps": 50, "save_strategy": "no", "do_eval": False,
    }  # fmt: skip
    supervised_finetuning.main([text for n, v in options.items() for text in (f"--{n}", str(v))])
    return root / "sft"


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("functions") / "reward.py"
    file.write_text(
        "import random\n"
        "def ends_soon(response_ids, ended):\n    return float(ended and len(response_ids) <= 20)\n"
        "def word(prompt, response):\n    return float('doctor' in response)\n"
        "def marks(prompt, response):\n    return len(set(response)) / 5\n"
        "def marks_times_8(prompt, response):\n    return 8 * marks(prompt, response) - 100\n"
        "def noisy(response):\n    return len(response) / 100 + random.random() * 0.01\n"
        "def nan(response):\n    return float('nan')\n"
        "def broken(response):\n    return response.score\n"
        "def other(text):\n    return 0.0\n"
    )
    return file


def flags(sft_model, talks, output_dir, **more) -> list[str]:
    options = {
        "sft_model_path": sft_model, "train_file_dir": talks, "output_dir": output_dir, "torch_dtype": "float32",
        "bf16": False, "report_to": "none", "max_steps": 3, "learning_rate": 3e-3, "max_source_length": 100,
        "max_completion_length": 48, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_eval_samples": 4, "validation_split_percentage": 5, "num_sample_prompts": 2, "warmup_steps": 0,
    }  # fmt: skip
    return [text for name, value in (options | more).items() for text in (f"--{name}", str(value))]


def run(*args, **more) -> Path:
    ppo_training.main(flags(*args, **more))
    return args[2]


def history(output_dir: Path, *names: str) -> list[list]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [[line[name] for name in names] for line in state["log_history"] if "policy_loss" in line]


NUMBERS = ("score", "kl", "policy_loss", "value_loss", "entropy", "grad_norm", "update_kl", "response_length")


def test_learning_rate_zero_changes_nothing(sft_model, talks, functions, tmp_path):
    output = run(sft_model, talks, tmp_path / "o", reward_function=f"{functions}:word", learning_rate=0)
    assert [row[0] for row in history(output, "kl")] == [0, 0, 0]
    weights = load_file(output / "adapter_model.safetensors")
    assert all((tensor == 0).all() for name, tensor in weights.items() if "lora_B" in name)


def test_in_the_first_minibatch_the_policy_is_the_one_that_drew(sft_model, talks, functions, tmp_path):
    """Ratio 1: nothing is clipped, KL 0, and the loss is minus the mean of whitened advantages, 0."""
    output = run(sft_model, talks, tmp_path / "o", reward_function=f"{functions}:word", max_steps=1,
                 num_ppo_epochs=1, num_mini_batches=1)  # fmt: skip
    ((kl, clipped, loss, distance),) = history(output, "update_kl", "clip_fraction", "policy_loss", "kl")
    assert (clipped, distance) == (0, 0)
    assert kl == pytest.approx(0, abs=1e-9) and loss == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("generations", [1, 4])
def test_the_numbers_do_not_depend_on_how_a_batch_is_split(
    generations, sft_model, talks, functions, tmp_path
):
    """In batches of one answer, none shares its prompt."""
    logs = [
        history(run(sft_model, talks, tmp_path / str(size), reward_function=f"{functions}:marks", max_steps=2,
                    per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
                    per_device_eval_batch_size=size, num_generations=generations), *NUMBERS)
        for size in (8, 4, 1)
    ]  # fmt: skip
    for other in logs[1:]:
        assert torch.tensor(other) == pytest.approx(torch.tensor(logs[0]), rel=2e-4, abs=1e-5)


def test_activation_checkpointing_changes_no_number(sft_model, talks, functions, tmp_path):
    """What is computed again must be computed with the adapter that is trained."""
    plain, checkpointed = (
        history(run(sft_model, talks, tmp_path / str(on), reward_function=f"{functions}:marks", max_steps=2,
                    gradient_checkpointing=on), *NUMBERS, "value_grad_norm", "explained_variance")
        for on in (False, True)
    )  # fmt: skip
    assert torch.tensor(checkpointed) == pytest.approx(torch.tensor(plain), rel=1e-4, abs=1e-6)


def test_checkpoints_are_saved_when_they_are_due(sft_model, talks, functions, tmp_path):
    output = run(sft_model, talks, tmp_path / "o", reward_function=f"{functions}:marks", max_steps=5,
                 save_steps=2, num_ppo_epochs=1)  # fmt: skip
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (2, 4, 5)}


def test_with_normalized_scores_their_scale_is_indifferent(sft_model, talks, functions, tmp_path):
    names = ("kl", "policy_loss", "value_loss", "grad_norm", "reward", "score")
    plain, scaled, other = (
        history(run(sft_model, talks, tmp_path / f"{name}{normalize}", reward_function=f"{functions}:{name}",
                    normalize_scores=normalize, max_steps=2), *names)
        for name, normalize in (("marks", True), ("marks_times_8", True), ("marks_times_8", False))
    )  # fmt: skip
    for a, b in zip(plain, scaled, strict=True):
        assert b[:5] == pytest.approx(a[:5], rel=1e-3, abs=1e-5) and b[5] == pytest.approx(8 * a[5] - 100)
    assert other[0][4] < -50


def test_normalized_scores_by_hand():
    scale = ScoreScale.of(torch.tensor([1.0, 3.0]), RankMeans(1, "cpu"))
    assert scale(torch.tensor([1.0, 3.0, 5.0])).tolist() == [-1, 1, 3]
    equal = ScoreScale.of(torch.full((32,), 0.1), RankMeans(1, "cpu"))
    assert equal(torch.tensor([0.6])).item() == pytest.approx(0.5)


def test_two_ranks_are_one(sft_model, talks, functions, tmp_path):
    more = {"reward_function": f"{functions}:word", "max_steps": 2}
    run(sft_model, talks, tmp_path / "one", gradient_accumulation_steps=2, **more)
    two = flags(sft_model, talks, tmp_path / "two", gradient_accumulation_steps=1, **more)
    done = torchrun(["ppo_training.py", *two], ranks=2, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    one, both = (history(tmp_path / name, *NUMBERS) for name in ("one", "two"))
    assert torch.tensor(both) == pytest.approx(torch.tensor(one), rel=2e-4, abs=1e-5)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    scores = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    for key in ("eval_score", "eval_response_length", "eval_response_length_before", "eval_ended", "eval_kl"):
        assert scores[0][key] == pytest.approx(scores[1][key], rel=2e-4, abs=1e-5), key


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_stopped_run_continues_exactly(algorithm, sft_model, talks, functions, tmp_path, monkeypatch):
    """Every logged number by repr and the final weights; the reward function draws random numbers."""
    more = {"reward_function": f"{functions}:noisy", "max_steps": 4, "algorithm": algorithm}
    random.seed(1)
    run(sft_model, talks, tmp_path / "whole", **more)
    advance = ProgressBar.on_step_end

    def advance_and_stop(bar, args, state, control, **kwargs):
        advance(bar, args, state, control, **kwargs)
        if state.global_step == 2:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    random.seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_end", advance_and_stop)
        with pytest.raises(StoppedError, match="after step"):
            run(sft_model, talks, tmp_path / "parts", **more)
    random.seed(99)
    run(sft_model, talks, tmp_path / "parts", **more)
    names = [name for name in NUMBERS if algorithm == "ppo" or "value" not in name]
    logs = [repr(history(tmp_path / name, *names, "kl_coef", "learning_rate")) for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_strong_penalty_keeps_the_policy_where_it_is(sft_model, talks, functions, tmp_path):
    far, near = (
        run(sft_model, talks, tmp_path / str(coef), reward_function=f"{functions}:ends_soon", max_steps=8,
            kl_coef=coef, target_kl=0)
        for coef in (0.0, 50.0)
    )  # fmt: skip
    (distant,), (close,) = history(far, "kl")[-1], history(near, "kl")[-1]
    assert close < 0.3 * distant and close < 0.5


def learned(output: Path) -> tuple[float, float]:
    """The share of answers that had the reward in the first update, and in the last three."""
    scores = [row[0] for row in history(output, "score")]
    return scores[0], sum(scores[-3:]) / 3


@pytest.mark.parametrize("algorithm, function, seed", [
    ("ppo", "word", 1),
    pytest.param("ppo", "word", 2, marks=pytest.mark.slow),
    pytest.param("ppo", "word", 3, marks=pytest.mark.slow),
    pytest.param("ppo", "ends_soon", 1, marks=pytest.mark.slow),
    pytest.param("ppo", "ends_soon", 2, marks=pytest.mark.slow),
    pytest.param("ppo", "ends_soon", 3, marks=pytest.mark.slow),
    pytest.param("rloo", "word", 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_it_learns_what_is_rewarded(algorithm, function, seed, sft_model, talks, functions, tmp_path):
    output = run(sft_model, talks, tmp_path / "o", reward_function=f"{functions}:{function}", seed=seed,
                 max_steps=20, algorithm=algorithm, gradient_accumulation_steps=4, sample_steps=100,
                 max_completion_length=64, validation_split_percentage=2, temperature=1.0,
                 num_generations=1 if algorithm == "ppo" else 4, num_ppo_epochs=4)  # fmt: skip
    before, after = learned(output)
    assert before < 0.2 and after > 0.8, (before, after)


# ---- with a reward model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_adapter(sft_model, tmp_path_factory) -> Path:
    """A reward model on the SFT model that likes doctors."""
    root = tmp_path_factory.mktemp("rm")
    generator, pairs = random.Random(1), []
    for i in range(64):
        common = " ".join(generator.choices(SENTENCES, k=2))
        better, worse = f"{common} {RARE}", f"{common} {generator.choice(SENTENCES)}"
        pairs.append({"question": f"Question {i}: what should I do?", "response_chosen": better,
                      "response_rejected": worse})  # fmt: skip
    write_jsonl(root / "data" / "a.jsonl", pairs)
    options = {
        "model_name_or_path": sft_model, "train_file_dir": root / "data", "output_dir": root / "rm", "bf16": False,
        "torch_dtype": "float32", "report_to": "none", "num_train_epochs": 4, "learning_rate": 3e-3,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "eval_strategy": "no",
    }  # fmt: skip
    reward_modeling.main([text for n, v in options.items() for text in (f"--{n}", str(v))])
    return root / "rm"


@pytest.fixture(scope="module")
def merged_reward(sft_model, reward_adapter) -> Path:
    output = reward_adapter.parent / "merged"
    merge_peft_adapter.main(
        ["--base_model", str(sft_model), "--lora_model", str(reward_adapter), "--output_dir", str(output)]
    )
    return output


def test_one_base_and_a_reward_model_of_its_own_give_the_same_run(
    sft_model, talks, reward_adapter, merged_reward, tmp_path
):
    """The adapter scores ids, the merged model the text; here both are the same answer."""
    shared, own = (
        run(
            sft_model,
            talks,
            tmp_path / reward.name,
            reward_model_path=reward,
            max_steps=1,
            num_ppo_epochs=1,
            max_completion_length=120,
        )
        for reward in (reward_adapter, merged_reward)
    )
    assert history(shared, "score", "reward") == [
        pytest.approx(row, abs=1e-3) for row in history(own, "score", "reward")
    ]


def test_the_value_function_starts_at_zero_on_the_reward_models_adapter(sft_model, reward_adapter):
    """With the reward model's head, it says what the reward model says."""
    model = AutoModelForCausalLM.from_pretrained(sft_model)
    lm = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.set_attn_implementation(FLAT_ATTENTION)
    whole = Backbone(FlatLM(lm), temperature=1.0).eval()
    whole.add_reward(reward_adapter)
    whole.add_value()
    batch = FlatCollator()(rows((6, 4), (3, 5)))
    with torch.no_grad():
        assert (whole.values(batch) == 0).all()
        whole.value_head.weight.data.copy_(whole.score_head.weight)
        values = whole.values(batch)
        scores = whole.scores(batch | {"last_index": batch["source_index"]})
    assert values.std() > 1e-3 and torch.allclose(values, scores, atol=1e-6)


def test_the_score_on_the_shared_base_is_the_reward_models_own(sft_model, reward_adapter):
    model = AutoModelForCausalLM.from_pretrained(sft_model)
    lm = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.set_attn_implementation(FLAT_ATTENTION)
    whole = Backbone(FlatLM(lm), temperature=1.0).eval()
    whole.add_reward(reward_adapter)
    judge, batch = load_judge(sft_model, reward_adapter), FlatCollator()(rows((6, 4), (3, 5)))
    with torch.no_grad():
        assert torch.allclose(whole.scores(batch), judge.model(**batch), atol=1e-5)


def test_the_policy_is_an_adapter_like_any_other(sft_model, talks, reward_adapter, tmp_path):
    output = run(sft_model, talks, tmp_path / "ppo", reward_model_path=reward_adapter, max_steps=2)
    merge_peft_adapter.main(
        ["--base_model", str(sft_model), "--lora_model", str(output), "--output_dir", str(tmp_path / "final")]
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").can_generate()
    assert AutoTokenizer.from_pretrained(output).chat_template
    names = {path.name for path in output.iterdir()}
    assert {"adapter_model.safetensors", "run.json", "eval_results.json", "trainer_state.json"} <= names
    found = json.loads((output / "eval_results.json").read_text())
    assert {"eval_score", "eval_score_before", "eval_kl", "eval_ended"} <= set(found)
    line = json.loads((output / "trainer_state.json").read_text())["log_history"][0]
    wanted = {"score", "kl", "reward", "entropy", "policy_loss", "value_loss", "clip_fraction", "value_clip_fraction",
              "explained_variance", "response_length", "ended", "tokens_per_second_rollout",
              "tokens_per_second_update", "kl_coef"}  # fmt: skip
    assert wanted <= set(line)
    samples = [json.loads(text) for text in (output / "logs" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2} and samples[0]["before"] == samples[0]["now"]


def test_the_same_command_again_changes_nothing(sft_model, talks, functions, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "medicalgpt"):
        for _ in range(2):
            run(sft_model, talks, tmp_path / "o", reward_function=f"{functions}:word", max_steps=1)
    assert "already complete" in caplog.text
    with pytest.raises(ConfigError, match="reward function"):
        run(sft_model, talks, tmp_path / "o", reward_function=f"{functions}:ends_soon", max_steps=1)


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, reason", [
    ("nan", "is nan; nothing was trained"),
    ("broken", "broken failed on .*a.jsonl"),
])  # fmt: skip
def test_scores_that_are_none_stop_the_run(name, reason, sft_model, talks, functions, tmp_path):
    with pytest.raises(RunError, match=reason):
        run(sft_model, talks, tmp_path / "o", reward_function=f"{functions}:{name}")


@pytest.mark.parametrize("name, reason", [
    ("{file}:missing", "has no function missing"),
    ("{file}:other", "takes text; allowed are prompt"),
    ("nowhere.py:f", "there is no file nowhere.py"),
    ("word", "expected FILE.py:NAME"),
])  # fmt: skip
def test_reward_functions_that_cannot_be_used(name, reason, functions):
    with pytest.raises(ConfigError, match=reason):
        FunctionScorer.load(name.format(file=functions))


def test_reward_models_that_do_not_belong_to_the_policy(
    sft_model, talks, reward_adapter, qwen2_dir, tmp_path
):
    with pytest.raises(ModelError, match="was trained on"):
        run(qwen2_dir, talks, tmp_path / "o", reward_model_path=reward_adapter, template_name="chatml")
    with pytest.raises(ModelError, match="has no score head"):
        run(sft_model, talks, tmp_path / "o", reward_model_path=qwen2_dir)
    with pytest.raises(ConfigError, match="does not exist"):
        run(sft_model, talks, tmp_path / "o", reward_model_path=tmp_path / "nothing")


@pytest.mark.parametrize("more, reason", [
    ({}, "exactly one of them"),
    ({"reward_model_path": "x", "reward_function": "y"}, "exactly one of them"),
    ({"reward_function": "f", "algorithm": "rloo", "num_generations": 1}, "expected 2 or more"),
    ({"reward_function": "f", "algorithm": "trpo"}, "choose from ppo, rloo"),
    ({"reward_function": "f", "temperature": 0}, "--temperature 0.0 is not allowed"),
    ({"reward_function": "f", "lam": 1.5}, "expected 0 to 1"),
    ({"reward_function": "f", "use_peft": False}, "adapters on one base"),
    ({"reward_function": "f", "optim": "adafactor"}, "expected adamw_torch"),
    ({"reward_function": "f", "algorithm": "rloo", "num_generations": 5}, "does not divide the 16 answers"),
])  # fmt: skip
def test_flags_that_mean_nothing(more, reason, sft_model, talks, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        run(sft_model, talks, tmp_path / "o", **more)


def test_an_update_has_a_prompt_for_every_process():
    args = SimpleNamespace(optim="adamw_torch", fp16=False, per_device_train_batch_size=1,
                           gradient_accumulation_steps=1, world_size=2)  # fmt: skip
    assert answers_per_update(args, SimpleNamespace(num_mini_batches=4, num_generations=4)) == 8
    with pytest.raises(ConfigError, match="1 prompts for 2 processes; raise"):
        answers_per_update(args, SimpleNamespace(num_mini_batches=2, num_generations=4))


def test_prompts_that_are_all_too_long_leave_nothing(sft_model, talks, functions, tmp_path):
    with pytest.raises(DataError, match=r"no prompt is left of .* raise --max_source_length"):
        run(sft_model, talks, tmp_path / "o", reward_function=f"{functions}:word", max_source_length=5)
