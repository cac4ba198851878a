"""A wrong command line is refused in one line that says what is wrong; old flags are understood or answered."""

import os
import shlex
from dataclasses import dataclass, field

from medicalgpt.arguments import (
    COMMON_DEFAULTS,
    AdapterArguments,
    ChatArguments,
    DataArguments,
    ModelArguments,
    StageArguments,
    cpu_has_fast_bfloat16,
)
from medicalgpt.errors import ConfigError
from medicalgpt.flags import GONE_FLAGS, RENAMED_FLAGS, parse_arguments

import pytest
import torch
from transformers import TrainingArguments

TYPES = (ModelArguments, AdapterArguments, DataArguments, ChatArguments, StageArguments)
NEEDED = "--model_name_or_path m --train_file_dir d"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """The same machine for every test: no GPU, a CPU with fast bfloat16, one thread."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("medicalgpt.arguments.cpu_has_fast_bfloat16", lambda: True)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")


def parse(line: str, *, needed: str = NEEDED, **defaults):
    """Return the parsed groups of a command line."""
    return parse_arguments(
        shlex.split(f"{needed} {line}"),
        TYPES,
        "description",
        COMMON_DEFAULTS | {"output_dir": "out", **defaults},
    )


def parse_stage(line: str, **defaults) -> StageArguments:
    return parse(line, **defaults)[-1]


# ---- what is refused ---------------------------------------------------------------------------------------

REFUSED = {
    # unknown flags
    "--lora_rnk 8": r"^unknown argument '--lora_rnk'; did you mean --lora_rank\?$",
    "--train_flie_dir=x": r"^unknown argument '--train_flie_dir'; did you mean --train_file_dir\?$",
    "--zzzqqq 1": r"^unknown argument '--zzzqqq'; --help lists the flags$",
    "stray": r"^unknown argument 'stray'; --help lists the flags$",
    "--max_steps 5 stray --zzzqqq": r"^unknown argument '--zzzqqq'",
    # abbreviations
    "--lora_r 8": r"^unknown argument '--lora_r'; did you mean --lora_rank\?$",
    "--learning 1e-4": r"^unknown argument '--learning'; did you mean --learning_rate\?$",
    # flags that are gone
    "--logging_dir x": r"^--logging_dir no longer exists: leave it out, .* logs/ of --output_dir$",
    "--logging_dir=x": r"^--logging_dir no longer exists",
    "--group_by_length True": r"^--group_by_length no longer exists: .*rows need no padding",
    "--save_safetensors": r"^--save_safetensors no longer exists: .* always saved as safetensors$",
    "--preprocessing_only": r"^--preprocessing_only no longer exists: ",
    # types
    "--lora_rank eight": r"--lora_rank.*: invalid int value: 'eight'",
    "--lora_rank 1.5": r"--lora_rank.*: invalid int value: '1\.5'",
    "--lora_rank": r"--lora_rank.*: expected one argument",
    "--learning_rate fast": r"--learning_rate.*: invalid float value: 'fast'",
    "--use_peft maybe": r"--use_peft.*got maybe but expected one of yes/no, true/false",
    "--eval_strategy sometimes": r"--eval_strategy.*'sometimes' \(choose from '?no'?, '?steps'?, '?epoch'?\)",
    # ranges
    "--torch_dtype fp8": r"^--torch_dtype fp8 is not allowed; expected bfloat16, float16, float32$",
    "--rope_scaling dynamic": r"^--rope_scaling dynamic is not allowed; expected linear or yarn",
    "--lora_rank 0": r"^--lora_rank 0 is not allowed; expected 1 or more$",
    "--lora_alpha 0": r"^--lora_alpha 0\.0 is not allowed; expected more than 0$",
    "--lora_alpha nan": r"^--lora_alpha nan is not allowed",
    "--lora_dropout 1": r"^--lora_dropout 1\.0 is not allowed; expected 0 to below 1$",
    "--lora_dropout -0.1": r"^--lora_dropout -0\.1 is not allowed",
    "--preprocessing_num_workers 0": r"^--preprocessing_num_workers 0 is not allowed; expected 1 or more$",
    "--max_train_samples 0": r"^--max_train_samples 0 is not allowed; expected -1 \(all\) or 1 and more$",
    "--max_eval_samples -2": r"^--max_eval_samples -2 is not allowed",
    "--validation_split_percentage 0": r"^--validation_split_percentage 0\.0 is not allowed; expected more than 0",
    "--validation_split_percentage 100": r"^--validation_split_percentage 100\.0 is not .* less than 100$",
    "--model_max_length 7": r"^--model_max_length 7 is not allowed; expected 8 or more$",
    "--max_source_length 0": r"^--max_source_length 0 is not allowed; expected 1 or more$",
    "--max_target_length -1": r"^--max_target_length -1 is not allowed; expected 1 or more$",
    "--gradient_checkpointing sometimes": r"^--gradient_checkpointing sometimes is not .* auto, True or False$",
    "--per_device_train_batch_size 0": r"^--per_device_train_batch_size 0 is not allowed; expected 1 or more$",
    "--per_device_eval_batch_size 0": r"^--per_device_eval_batch_size 0 is not allowed",
    "--gradient_accumulation_steps 0": r"^--gradient_accumulation_steps 0 is not allowed; expected 1 or more$",
    "--learning_rate -1": r"^--learning_rate -1\.0 is not allowed; expected 0 or more$",
    "--learning_rate nan": r"^--learning_rate nan is not allowed",
    "--max_steps 0": r"^--max_steps 0 is not allowed; expected -1 \(whole epochs\) or 1 and more$",
    "--num_train_epochs 0": r"^--num_train_epochs 0\.0 is not allowed; expected more than 0$",
    # combinations
    "--load_in_4bit --load_in_8bit": r"^--load_in_4bit and --load_in_8bit exclude each other$",
    "--qlora --load_in_8bit": r"^--qlora means a 4-bit base; leave out --load_in_8bit$",
    "--use_peft False --qlora": r"^a quantised base cannot be fine-tuned in full; use --use_peft True$",
    "--use_peft False --load_in_8bit": r"^a quantised base cannot be fine-tuned in full",
    "--use_peft False --peft_path a": r"^--peft_path and --modules_to_save belong to LoRA; use --use_peft True",
    "--use_peft False --modules_to_save lm_head": r"^--peft_path and --modules_to_save belong to LoRA",
    "--fp16": r"^--fp16 and --bf16 exclude each other, and bf16 is the default; add --bf16 False$",
    "--fp16 --bf16 False": r"^--fp16 needs a GPU and there is none; use --bf16 True or neither$",
    "--flash_attn": r"^--flash_attn True needs an NVIDIA GPU of compute capability",
    "--dataset_name medical": r"^give the training data as --train_file_dir DIR or as --dataset_name NAME, exactly one",
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=REFUSED)
def test_a_wrong_command_line_is_refused_in_one_line_that_names_the_flag(line, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        parse(line)
    assert refusal.value.exit_code == 2
    assert "\n" not in str(refusal.value)


def test_training_data_must_be_given():
    with pytest.raises(ConfigError, match="as --train_file_dir DIR or as --dataset_name NAME, exactly one"):
        parse("", needed="--model_name_or_path m")


def test_a_model_must_be_given():
    with pytest.raises(ConfigError, match=r"required: --model_name_or_path"):
        parse("", needed="--train_file_dir d")


@pytest.mark.parametrize("flag", sorted(GONE_FLAGS))
def test_a_flag_that_is_gone_is_no_flag_of_the_libraries_either(flag):
    assert flag[2:] not in TrainingArguments.__dataclass_fields__


def test_a_gpu_without_bfloat16_is_named_with_what_to_write_instead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    message = r"^--bf16: Tesla V100 has no bfloat16; use --torch_dtype float16 --fp16 True --bf16 False$"
    with pytest.raises(ConfigError, match=message):
        parse("--bf16")


# ---- what is understood ------------------------------------------------------------------------------------


@pytest.mark.parametrize("equals", [" ", "="])
@pytest.mark.parametrize(
    ("flag", "value", "name", "expected"),
    [
        ("--warmup_ratio", "0.25", "warmup_steps", 0.25),
        ("--evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("--no_cuda", "True", "use_cpu", True),
        ("--activation_checkpointing", "True", "gradient_checkpointing", "true"),
        ("--per_gpu_train_batch_size", "3", "per_device_train_batch_size", 3),
        ("--per_gpu_eval_batch_size", "3", "per_device_eval_batch_size", 3),
    ],
)
def test_a_flag_that_the_libraries_renamed_is_still_understood(flag, value, name, expected, equals):
    assert flag in RENAMED_FLAGS
    assert getattr(parse_stage(f"{flag}{equals}{value}"), name) == expected


def test_a_warmup_share_becomes_that_share_of_the_steps():
    """0.25 of 100 steps; without the flag 0.05 of 100."""
    assert parse_stage("--warmup_ratio 0.25").get_warmup_steps(100) == 25
    assert parse_stage("").get_warmup_steps(100) == 5


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", False),
        ("--qlora", True),
        ("--qlora True", True),
        ("--qlora true", True),
        ("--qlora=True", True),
        ("--qlora 1", True),
        ("--qlora yes", True),
        ("--qlora False", False),
        ("--qlora=false", False),
        ("--qlora 0", False),
        ("--qlora False --qlora", True),
    ],
)
def test_a_boolean_is_given_bare_or_with_a_value(line, expected):
    assert parse(line)[1].qlora is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", True),
        ("--use_peft", True),
        ("--use_peft True", True),
        ("--use_peft False", False),
        ("--use_peft=0", False),
    ],
)
def test_a_boolean_that_is_on_by_default_can_be_switched_off(line, expected):
    assert parse(line)[1].use_peft is expected


def test_a_boolean_takes_no_other_flags_value():
    groups = parse("--qlora --lora_rank 4 --bf16 --seed 7")
    assert (groups[1].qlora, groups[1].lora_rank, groups[-1].bf16, groups[-1].seed) == (True, 4, True, 7)


def test_of_a_flag_that_is_given_twice_the_last_one_counts():
    assert parse("--lora_rank 4 --lora_rank 16")[1].lora_rank == 16


def test_a_negative_number_is_a_value_and_no_flag():
    assert parse("--max_train_samples -1 --max_steps -1")[-1].max_steps == -1


def test_a_value_with_spaces_stays_whole():
    assert parse("'--output_dir=my model dir'")[-1].output_dir == "my model dir"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "auto"),
        ("--gradient_checkpointing auto", "auto"),
        ("--gradient_checkpointing True", "true"),
        ("--gradient_checkpointing true", "true"),
        ("--gradient_checkpointing=False", "false"),
    ],
)
def test_activation_checkpointing_is_auto_on_or_off_and_left_to_us(line, expected):
    """transformers' own switch stays off in every mode: the stage decides after it has measured a step."""
    args = parse_stage(line)
    assert args.gradient_checkpointing == expected
    assert not args.activation_checkpointing


# ---- defaults ----------------------------------------------------------------------------------------------


def test_a_script_trains_lora_of_rank_8_on_all_layers_and_evaluates_unless_told_otherwise():
    _, adapter, data, chat, args = parse("")
    assert (adapter.use_peft, adapter.lora_rank, adapter.lora_alpha, adapter.lora_dropout) == (
        True,
        8,
        16,
        0.05,
    )
    assert (adapter.target_modules, adapter.quantization_bits) == ("all", None)
    assert (data.max_train_samples, data.max_eval_samples, data.validation_file_dir) == (-1, -1, None)
    assert (chat.template_name, chat.model_max_length) == (None, 2048)
    assert (args.do_train, args.do_eval, args.eval_strategy, args.overwrite_output_dir) == (
        True,
        True,
        "steps",
        False,
    )


def test_a_scripts_own_default_goes_before_the_common_one_and_a_flag_before_both():
    assert parse_stage("").learning_rate == COMMON_DEFAULTS["learning_rate"] == 2e-4
    assert parse_stage("", learning_rate=5e-5).learning_rate == 5e-5
    assert parse_stage("--learning_rate 1e-3", learning_rate=5e-5).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("line", "bits"),
    [("--qlora", 4), ("--load_in_4bit", 4), ("--qlora --load_in_4bit", 4), ("--load_in_8bit", 8)],
)
def test_a_quantised_base_has_4_or_8_bits(line, bits):
    assert parse(line)[1].quantization_bits == bits


def test_a_number_of_workers_limits_the_threads_that_tokenise():
    parse("--preprocessing_num_workers 3")
    assert os.environ["RAYON_NUM_THREADS"] == "3"


@dataclass
class ToolArguments:
    """A tool's flags."""

    output_file: str | None = field(default=None)


def test_a_tool_has_its_own_flags_only():
    (args,) = parse_arguments(["--output_file", "x"], (ToolArguments,), "description", {})
    assert args == ToolArguments("x")
    with pytest.raises(ConfigError, match="unknown argument '--learning_rate'"):
        parse_arguments(["--learning_rate", "1"], (ToolArguments,), "description", {})


# ---- hardware ----------------------------------------------------------------------------------------------


def test_without_gpu_the_cpu_is_used():
    assert parse_stage("").use_cpu is True
    assert parse_stage("--use_cpu False").use_cpu is True


def test_bfloat16_stays_on_for_a_cpu_that_computes_it_fast():
    assert parse_stage("--bf16").bf16 is True


def test_bfloat16_is_switched_off_for_a_slow_cpu_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr("medicalgpt.arguments.cpu_has_fast_bfloat16", lambda: False)
    with caplog.at_level("INFO", "medicalgpt"):
        assert parse_stage("--bf16").bf16 is False
    assert [record.message for record in caplog.records] == [
        "bf16=False: this CPU has no fast bfloat16 instructions, computing in float32"
    ]


def test_fast_bfloat16_means_matrix_or_vector_instructions(monkeypatch):
    for amx, avx512 in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert cpu_has_fast_bfloat16() is (amx or avx512)


# ---- found by an independent tester ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["--report_to foo", "--num_train_epochs inf", "--learning_rate inf", "--lora_alpha inf", "--seed -1",
     "--save_total_limit 0", "--save_total_limit -1", "--weight_decay -1", "--max_grad_norm -1",
     "--dataloader_num_workers -1"],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(line):
    with pytest.raises(ConfigError, match="is not allowed"):
        parse(line)


@pytest.mark.parametrize(
    "line",
    ["--label_smoothing_factor 0.1", "--neftune_noise_alpha 5", "--load_best_model_at_end True",
     "--use_liger_kernel True", "--auto_find_batch_size True", "--push_to_hub True", "--torch_compile True",
     "--save_only_model True", "--ignore_data_skip True"],
)  # fmt: skip
def test_flags_of_the_library_that_would_do_nothing_here_are_refused(line):
    with pytest.raises(ConfigError, match="has no place here"):
        parse(line)


def test_bare_and_dashed_forms_of_renamed_flags_are_understood():
    assert parse_stage("--gradient_checkpointing").gradient_checkpointing == "true"
    assert parse_stage("--gradient-checkpointing False").gradient_checkpointing == "false"
    assert parse_stage("--warmup-ratio 0.1").warmup_steps == 0.1
    assert parse_stage("--evaluation-strategy epoch").eval_strategy == "epoch"
