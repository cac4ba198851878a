"""Reward modelling: the loss by hand and against TRL, scores against plain transformers, and scoring files."""

import json
import math
from pathlib import Path

import merge_peft_adapter
import reward_modeling
from medicalgpt.attention import FLAT_ATTENTION
from medicalgpt.collator import FlatCollator, PairCollator
from medicalgpt.engine import FlatScorer
from medicalgpt.errors import ConfigError, DataError, ModelError
from medicalgpt.modeling import load_model, new_score_head
from medicalgpt.scoring import load_judge, separate_pad_token
from medicalgpt.tokenization import ChatFormat, tokens
from reward_modeling import by_length, pair_loss
from template import TEMPLATES

import pytest
import torch
from conftest import tiny_config, write_jsonl
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

VOCAB = 300
LENGTHS = [(12, 7, 9), (3, 20, 1), (25, 2, 14), (8, 8, 8)]


def random_ids(num: int, seed: int) -> list[int]:
    return torch.randint(5, VOCAB, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- the loss ----------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """Scores 1.5 and 0.5: log(1 + e⁻¹) = 0.3132617; margin 1: log 2; centred with 0.1: + 0.1 · 2² = 0.4."""
    chosen, rejected = torch.tensor([1.5, 1.5]), torch.tensor([0.5, 0.5])
    losses = pair_loss(chosen, rejected, torch.tensor([0.0, 1.0]))
    assert losses.tolist() == pytest.approx([0.3132617, math.log(2)], abs=1e-6)
    assert pair_loss(chosen, rejected, torch.zeros(2), 0.1)[0].item() == pytest.approx(0.7132617, abs=1e-6)


@pytest.fixture(scope="module")
def scorer():
    set_seed(7)
    config = tiny_config("llama", VOCAB)
    config.num_labels, config.pad_token_id = 1, 0
    model = AutoModelForSequenceClassification.from_config(config)
    new_score_head(model)
    return model.eval()


@pytest.fixture(scope="module")
def pairs():
    return [{"prompt_ids": random_ids(p, p), "chosen_ids": random_ids(c, c + 50), "rejected_ids": random_ids(r, r + 90)}
            for p, c, r in LENGTHS]  # fmt: skip


def flat_scores(model, pairs, *, padded=False) -> torch.Tensor:
    rows = [
        {name: tokens(ids) for name, ids in pair.items()}
        | {f"{side}_labels": tokens(pair[f"{side}_ids"]) for side in ("chosen", "rejected")}
        for pair in pairs
    ]
    model.set_attn_implementation("sdpa" if padded else FLAT_ATTENTION)
    with torch.no_grad():
        scores = FlatScorer(model).eval()(**PairCollator(padded=padded)(rows)).view(-1, 2)
    model.set_attn_implementation("sdpa")
    return scores


@pytest.mark.parametrize("center", [0.0, 0.05])
def test_the_loss_of_a_batch_is_trls(center, scorer, pairs, tmp_path, tokenizer):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {f"{side}_ids": pair["prompt_ids"] + pair[f"{side}_ids"] for side in ("chosen", "rejected")}
        | {"margin": margin}
        for pair, margin in zip(pairs, (0.0, 0.5, 1.0, -0.5), strict=True)
    ]
    config = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None,
        center_rewards_coefficient=center or None, disable_dropout=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=scorer, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows)
    )
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, batch)
    margins = torch.tensor([row["margin"] for row in rows])
    losses = pair_loss(*flat_scores(scorer, pairs).unbind(1), margins, center)
    assert losses.std() > 0.01
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_scores_in_a_row_are_those_of_each_answer_alone(padded, scorer, pairs):
    """Plain transformers, one prompt and answer at a time, without any padding."""
    expected = [
        [
            scorer(input_ids=torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])).logits.item()
            for side in ("chosen", "rejected")
        ]
        for pair in pairs
    ]
    assert torch.allclose(flat_scores(scorer, pairs, padded=padded), torch.tensor(expected), atol=1e-5)


def test_which_answer_is_longer():
    """Alike: 91 and 100 differ by 9 %. Not alike: 90 and 100, 10 %."""
    found = by_length(torch.tensor([[100, 91], [100, 90], [50, 100], [7, 7]]))
    assert {name: where.tolist() for name, where in found.items()} == {
        "chosen_longer": [False, True, False, False],
        "rejected_longer": [False, False, True, False],
        "alike": [True, False, False, True],
    }


# ---- training ----------------------------------------------------------------------------------------------


def rm_flags(model_dir, data_dir, output_dir, **flags) -> list[str]:
    options = {
        "model_name_or_path": model_dir, "train_file_dir": data_dir / "dpo", "output_dir": output_dir,
        "template_name": "chatml", "torch_dtype": "float32", "bf16": False, "report_to": "none", "max_steps": 6,
        "learning_rate": 1e-2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4,
        "eval_strategy": "no", "validation_split_percentage": 20,
    }  # fmt: skip
    return [text for name, value in (options | flags).items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(model_dir, data_dir, tmp_path_factory) -> Path:
    """A reward model's adapter after a few steps."""
    output = tmp_path_factory.mktemp("rm") / "adapter"
    reward_modeling.main(rm_flags(model_dir, data_dir, output))
    return output


@pytest.fixture(scope="module")
def merged(model_dir, trained) -> Path:
    output = trained.parent / "merged"
    merge_peft_adapter.main(
        ["--base_model", str(model_dir), "--lora_model", str(trained), "--output_dir", str(output)]
    )
    return output


TALKS = [
    ("what helps against fever", "drink and rest"),
    ("is it dangerous", "no"),
    ("hello", "a somewhat longer answer, so that the rows of a batch are padded to another length"),
]


@pytest.fixture
def answers(tmp_path) -> Path:
    return write_jsonl(tmp_path / "answers.jsonl", [{"question": q, "answer": a} for q, a in TALKS])


def scored(*flags: object) -> list[float]:
    """Score a file with the script and return the scores."""
    flags = [str(flag) for flag in flags]
    reward_modeling.main(flags)
    output = Path(flags[flags.index("--score_file") + 1]).with_suffix(".scored.jsonl")
    return [json.loads(line)["score"] for line in output.read_text().splitlines()]


def plain_scores(model, directory: Path) -> torch.Tensor:
    """What transformers gives to the same talks: its own template, its own padding, its own pooling."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenize=False
        ).rstrip("\n")
        for q, a in TALKS
    ]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


def test_peft_and_transformers_give_the_scores_that_the_script_gives(model_dir, trained, answers):
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1, dtype="float32")
    expected = plain_scores(PeftModel.from_pretrained(base, trained), trained)
    found = scored("--model_name_or_path", model_dir, "--peft_path", trained, "--score_file", answers)
    assert expected.std() > 1e-3
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_merged_reward_model_gives_the_adapters_scores_in_any_tool(model_dir, trained, merged, answers):
    adapter = scored("--model_name_or_path", model_dir, "--peft_path", trained, "--score_file", answers)
    assert scored("--model_name_or_path", merged, "--score_file", answers) == pytest.approx(adapter, abs=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(merged)
    assert plain.config.num_labels == 1
    assert plain_scores(plain, merged).tolist() == pytest.approx(adapter, abs=1e-4)


def test_the_padding_token_of_a_reward_model_ends_no_answer(trained, merged, model_dir):
    assert AutoTokenizer.from_pretrained(model_dir).pad_token in (None, "<|im_end|>", "<|endoftext|>")
    for directory in (trained, merged):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        stops = ChatFormat.of(TEMPLATES["chatml"], tokenizer).stop_ids(tokenizer)
        assert tokenizer.pad_token_id not in {tokenizer.eos_token_id, *stops}
    assert json.loads((merged / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id


def test_without_a_free_control_token_padding_is_refused(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    chat_format = ChatFormat.of(TEMPLATES["chatml"], tokenizer)
    free = [t for t in tokenizer.get_added_vocab() if t not in ("<|im_start|>", "<|im_end|>")]
    separate_pad_token(tokenizer, chat_format)
    assert tokenizer.pad_token in {*free, tokenizer.unk_token}


def test_evaluation_reports_scores_and_accuracy_by_length(trained):
    found = json.loads((trained / "eval_results.json").read_text())
    assert {"eval_accuracy", "eval_margin", "eval_score", "eval_score_std", "eval_loss"} <= set(found)
    shares = [value for name, value in found.items() if name.startswith("eval_share_")]
    assert sum(shares) == pytest.approx(1)
    logs = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert {"accuracy", "margin", "score", "score_std"} <= set(logs[0])


def test_it_learns_the_training_pairs(model_dir, data_dir, tmp_path):
    reward_modeling.main(rm_flags(model_dir, data_dir, tmp_path / "o", max_steps=30, logging_steps=5))
    logs = json.loads((tmp_path / "o" / "trainer_state.json").read_text())["log_history"]
    last = [line for line in logs if "loss" in line][-1]
    assert last["accuracy"] > 0.9 and last["loss"] < 0.3


def test_a_margin_asks_for_more(model_dir, data_dir, tmp_path):
    """With equal scores (no step has been taken) a margin m costs log(1 + e^m) in place of log 2."""
    rows = [json.loads(line) for line in (data_dir / "dpo" / "a.jsonl").read_text().splitlines()]
    losses = []
    for margin in (0.0, 3.0):
        write_jsonl(tmp_path / str(margin) / "a.jsonl", [row | {"margin": margin} for row in rows])
        flags = rm_flags(model_dir, data_dir, tmp_path / f"o{margin}", train_file_dir=tmp_path / str(margin))
        reward_modeling.main([*flags, "--do_train", "False"])
        losses.append(json.loads((tmp_path / f"o{margin}" / "eval_results.json").read_text())["eval_loss"])
    assert losses[1] - losses[0] > 1.5


def test_full_fine_tuning_saves_an_ordinary_reward_model(model_dir, data_dir, tmp_path, answers):
    flags = rm_flags(model_dir, data_dir, tmp_path / "o", use_peft=False, learning_rate=1e-3)
    reward_modeling.main(flags)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")
    found = scored("--model_name_or_path", tmp_path / "o", "--score_file", answers)
    assert plain_scores(plain, tmp_path / "o").tolist() == pytest.approx(found, abs=1e-4)


def test_training_continues_on_a_reward_adapter_and_its_head(model_dir, data_dir, trained, tmp_path):
    flags = rm_flags(model_dir, data_dir, tmp_path / "o", peft_path=trained, max_steps=1, learning_rate=0.0)
    reward_modeling.main(flags)
    before, after = (json.loads((d / "eval_results.json").read_text()) for d in (trained, tmp_path / "o"))
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)


def test_qlora_keeps_the_score_head_in_float32(model_dir, data_dir, tmp_path):
    flags = rm_flags(model_dir, data_dir, tmp_path / "o", qlora=True, max_steps=2)
    reward_modeling.main([*flags, "--torch_dtype", "bfloat16", "--bf16", "True"])
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "o" / "adapter_model.safetensors")
    heads = [tensor for name, tensor in weights.items() if "score" in name]
    assert len(heads) == 1 and heads[0].dtype == torch.float32


# ---- scoring files, and what is refused --------------------------------------------------------------------


def test_conversations_are_scored_like_their_question_and_answer(merged, answers, tmp_path):
    chats = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in TALKS
    ]
    file = write_jsonl(tmp_path / "chats.jsonl", chats)
    expected = scored("--model_name_or_path", merged, "--score_file", answers)
    assert scored("--model_name_or_path", merged, "--score_file", file) == pytest.approx(expected, abs=1e-6)
    one = scored("--model_name_or_path", merged, "--score_file", file, "--per_device_eval_batch_size", 1)
    assert one == pytest.approx(expected, abs=1e-5)


def test_a_question_that_is_too_long_has_no_score(merged, tmp_path):
    rows = [{"question": "long " * 400, "answer": "a"}, {"question": "short", "answer": "a"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = scored("--model_name_or_path", merged, "--score_file", file, "--model_max_length", 100)
    assert found[0] is None and isinstance(found[1], float)


@pytest.mark.parametrize("rows, reason", [
    ([{"question": "q"}], "expected question and one of answer"),
    ([{"conversations": [{"from": "human", "value": "q"}]}], "does not end with an answer"),
    ([{"question": "q", "answer": 3}], "answer: is a number"),
])  # fmt: skip
def test_rows_without_an_answer_are_refused_by_line(rows, reason, merged, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"a\.jsonl:1.*{reason}"):
        reward_modeling.main(["--model_name_or_path", str(merged), "--score_file", str(file)])


def test_what_has_no_score_head_scores_nothing(model_dir, merged, answers, tmp_path):
    with pytest.raises(ModelError, match="has no score head"):
        load_judge(model_dir, None)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    with pytest.raises(ModelError, match="adapter of task CAUSAL_LM"):
        load_judge(model_dir, tmp_path / "sft")
    with pytest.raises(ConfigError, match="does not exist"):
        reward_modeling.main(
            ["--model_name_or_path", str(merged), "--score_file", str(tmp_path / "no.jsonl")]
        )


def test_an_adapter_of_another_base_scores_nothing(qwen2_dir, trained):
    with pytest.raises(ModelError, match="was trained on"):
        load_judge(qwen2_dir, trained)


def test_a_reward_model_does_not_chat(merged):
    with pytest.raises(ModelError, match="scores answers and writes none"):
        load_model(merged, "auto")


def test_a_margin_must_be_a_number(tmp_path, model_dir, data_dir):
    row = {"question": "q", "response_chosen": "a", "response_rejected": "b", "margin": "much"}
    write_jsonl(tmp_path / "d" / "a.jsonl", [row])
    flags = rm_flags(model_dir, data_dir, tmp_path / "o", train_file_dir=tmp_path / "d")
    with pytest.raises(DataError, match="margin: is a string; expected a finite number"):
        reward_modeling.main(flags)


def test_empty_batches_score_nothing(scorer):
    scorer.set_attn_implementation(FLAT_ATTENTION)
    assert FlatScorer(scorer)(**PairCollator()([])).shape == (0,)
    assert FlatScorer(scorer)(**FlatCollator()([])).shape == (1,)
