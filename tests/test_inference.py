"""Answers: against transformers' own greedy generation, in input order, stopped where the template stops, over a pipe."""

import io
import json
import sys

import inference
from medicalgpt.chat_template import resolve_template
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.generation import Generator, generation_settings
from medicalgpt.tokenization import ChatFormat

import pytest
import torch
from conftest import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

GREEDY = [
    "--temperature",
    "0",
    "--repetition_penalty",
    "1.0",
    "--torch_dtype",
    "float32",
    "--template_name",
    "chatml",
]
PROMPTS = ["Hi", "What is a fever? " * 6, "And 发热?", "x", "See a doctor. " * 3]


def answer_file(model_dir, tmp_path, rows, *flags) -> list[dict]:
    data, output = write_jsonl(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"
    inference.main(["--base_model", str(model_dir), "--data_file", str(data), "--output_file", str(output),
                    *GREEDY, "--max_new_tokens", "12", *flags])  # fmt: skip
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def greedy_alone(model_dir, prompt: str) -> tuple[str, int, int]:
    """Answer one prompt with the library alone, from the chat template as text."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
    )
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2)
    out = model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()
    return (
        tokenizer.decode([i for i in out if i != 2], skip_special_tokens=True).strip(),
        ids.shape[1],
        len(out),
    )


def test_a_batch_of_mixed_lengths_answers_as_one_prompt_at_a_time(model_dir, tmp_path):
    rows = [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]
    answers = answer_file(model_dir, tmp_path, rows, "--batch_size", "3")
    for row, answer in zip(rows, answers, strict=True):
        text, num_prompt, num_response = greedy_alone(model_dir, row["prompt"])
        assert answer | row == answer  # the input's fields are kept, in input order
        assert (answer["response"], answer["num_prompt_tokens"]) == (text, num_prompt)
        assert answer["num_response_tokens"] == num_response
        assert answer["finish_reason"] in ("length", "stop")


def test_sampled_answers_are_the_same_for_the_same_seed(model_dir, tmp_path):
    texts = []
    for seed in ("1", "1", "2"):
        flags = ("--temperature", "1.0", "--do_sample", "True", "--seed", seed, "--overwrite", "True")
        texts.append(
            [answer["response"] for answer in answer_file(model_dir, tmp_path, [{"prompt": "Hi"}], *flags)]
        )
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_that_does_not_fit_is_answered_with_an_error_and_not_a_crash(model_dir, tmp_path):
    rows = [{"prompt": "word " * 2000}, {"prompt": "Hi"}]
    long, short = answer_file(model_dir, tmp_path, rows)
    assert long["finish_reason"] == "error" and "longer than" in long["error"]
    assert short["response"] == greedy_alone(model_dir, "Hi")[0]


def forced_model(model_dir, script: list[int]):
    """Return a model that says `script`, whatever it is asked."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    vocab_size, start = model.config.vocab_size, {}

    def forward(input_ids=None, **kwargs):
        begin = start.setdefault("length", input_ids.shape[1])
        said = sum(start.setdefault("steps", []))
        start["steps"].append(1)
        logits = torch.full((input_ids.shape[0], input_ids.shape[1], vocab_size), -100.0)
        logits[:, -1, script[min(said, len(script) - 1)]] = 100.0
        assert begin
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits, past_key_values=kwargs.get("past_key_values"))

    model.forward = forward
    return model


@pytest.mark.parametrize("end, reason", [("<|im_end|>", "stop"), (" more", "length")])
def test_generation_stops_on_the_templates_stop_token(model_dir, shared_tokenizer, end, reason):
    script = [i for text in ("Yes.", end, " junk") for i in shared_tokenizer(text).input_ids]
    template = resolve_template(shared_tokenizer, "chatml", recorded=None, force=True)
    settings = {"do_sample": False, "max_new_tokens": 20}
    generator = Generator(forced_model(model_dir, script), shared_tokenizer, ChatFormat.of(template, shared_tokenizer),
                          settings)  # fmt: skip
    (answer,) = generator.answer([[5, 6, 7]])
    assert answer.finish_reason == reason
    assert (answer.text == "Yes.") == (reason == "stop")


def test_a_stop_string_of_several_tokens_is_cut_off(model_dir, shared_tokenizer):
    script = shared_tokenizer("Yes. ### Instruction: more").input_ids
    template = resolve_template(shared_tokenizer, "alpaca", recorded=None, force=True)
    generator = Generator(forced_model(model_dir, script), shared_tokenizer, ChatFormat.of(template, shared_tokenizer),
                          {"do_sample": False, "max_new_tokens": 60})  # fmt: skip
    (answer,) = generator.answer([[5, 6, 7]])
    assert (answer.text, answer.finish_reason) == ("Yes.", "stop")


def test_an_interrupt_ends_the_answer_after_the_token(model_dir, shared_tokenizer):
    template = resolve_template(shared_tokenizer, "chatml", recorded=None, force=True)
    generator = Generator(AutoModelForCausalLM.from_pretrained(model_dir), shared_tokenizer,
                          ChatFormat.of(template, shared_tokenizer), {"do_sample": False, "max_new_tokens": 50})  # fmt: skip
    pieces = []
    (answer,) = generator.answer([[5, 6, 7]], write=pieces.append, interrupted=lambda: True)
    assert answer.finish_reason == "interrupted"
    assert answer.num_response_tokens == 1


def test_flags_win_over_the_models_own_settings_and_those_over_the_safe_ones(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert generation_settings(model, {})["repetition_penalty"] == 1.15
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.8)
    assert generation_settings(model, {"top_p": 0.5, "top_k": None}) == {
        "do_sample": True, "temperature": 0.6, "top_p": 0.5
    }  # fmt: skip
    assert generation_settings(model, {"temperature": 0.0}) == {"do_sample": False}


def chat(model_dir, monkeypatch, capsys, text: str, *flags) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    inference.main(["--base_model", str(model_dir), *GREEDY, "--max_new_tokens", "6", *flags])
    return capsys.readouterr().out


def test_the_chat_works_over_a_pipe_and_remembers(model_dir, monkeypatch, capsys):
    first, second = chat(model_dir, monkeypatch, capsys, "Hi\n\nAnd then?\n").splitlines()[:2]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert first == answer_of(model_dir, tokenizer, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n").input_ids
    ids += tokenizer(first).input_ids
    ids += tokenizer("<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n").input_ids
    assert second == answer_of(model_dir, tokenizer, ids)


def answer_of(model_dir, tokenizer, prompt) -> str:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt])
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=2)
    return tokenizer.decode(
        model.generate(ids, generation_config=config)[0, ids.shape[1] :], skip_special_tokens=True
    ).strip()


def test_history_that_outgrows_the_context_loses_its_oldest_turns(model_dir, monkeypatch, capsys, caplog):
    with caplog.at_level("INFO", logger="medicalgpt"):
        chat(model_dir, monkeypatch, capsys, "What is a fever?\n" * 6, "--max_length", "100")
    assert "no longer fit and are forgotten" in caplog.text


@pytest.mark.parametrize("flags, error, message", [
    (["--data_file", "missing.jsonl", "--output_file", "o.jsonl"], ConfigError, "--data_file missing.jsonl does not exist"),
    (["--data_file", "x"], ConfigError, "belong together"),
    (["--interactive", "--data_file", "x", "--output_file", "y"], ConfigError, "exclude each other"),
    (["--top_p", "1.5"], ConfigError, "--top_p 1.5 is not allowed"),
    (["--max_new_tokens", "5000"], ConfigError, "leaves no room"),
    (["--template_name", "gwen"], ConfigError, "gwen is not known"),
    (["--lora_model", "nowhere"], ConfigError, "--lora_model nowhere does not exist"),
])  # fmt: skip
def test_wrong_flags_are_refused(flags, error, message, model_dir):
    with pytest.raises(error, match=message):
        inference.main(["--base_model", str(model_dir), "--template_name", "chatml", *flags])


def test_a_row_without_prompt_is_named(model_dir, tmp_path):
    with pytest.raises(DataError, match=r"q.jsonl:2: prompt: missing"):
        answer_file(model_dir, tmp_path, [{"prompt": "Hi"}, {"text": "Hi"}])


def test_an_existing_output_file_is_not_replaced_without_asking(model_dir, tmp_path):
    (tmp_path / "a.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match="exists"):
        answer_file(model_dir, tmp_path, [{"prompt": "Hi"}])
    assert (tmp_path / "a.jsonl").read_text() == "mine\n"


def test_an_adapter_on_top_answers_as_the_merged_model(model_dir, data_dir, tmp_path):
    import merge_peft_adapter
    import supervised_finetuning

    from test_training import command

    supervised_finetuning.main(command("sft", model_dir, data_dir, tmp_path / "a", max_steps=4))
    merge_peft_adapter.main(["--base_model", str(model_dir), "--lora_model", str(tmp_path / "a"), "--output_dir",
                             str(tmp_path / "m")])  # fmt: skip
    rows = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    on_top = answer_file(model_dir, tmp_path, rows, "--lora_model", str(tmp_path / "a"))
    merged = answer_file(tmp_path / "m", tmp_path, rows, "--overwrite", "True")
    assert [row["response"] for row in on_top] == [row["response"] for row in merged]
    assert (
        on_top[0]["response"] != answer_file(model_dir, tmp_path, rows, "--overwrite", "True")[0]["response"]
    )
