"""Supervised fine-tuning (SFT): the model learns to answer.

Reads   --train_file_dir   .jsonl/.json conversations, ShareGPT {"conversations": [{"from", "value"}]} or
                           OpenAI {"messages": [{"role", "content"}]}
Writes  --output_dir       LoRA adapter (or model), tokenizer, run.json, train_results, eval_results, logs/,
checkpoint-N/ Next    merge_peft_adapter.py, then dpo_training.py on the merged model, or inference.py

    bash run_sft.sh
    python supervised_finetuning.py --model_name_or_path merged-pt-qwen-v1 --train_file_dir data/finetune

Method: next-token prediction on every answer of a conversation and its stop token, − Σ log p(y_t | before) /
number of answer tokens; questions, system prompts and role markers are read and not trained.
"""

from dataclasses import dataclass, field

from medicalgpt.arguments import (
    AdapterArguments,
    ChatArguments,
    DataArguments,
    ModelArguments,
    StageArguments,
    parse_arguments,
    require,
)
from medicalgpt.chat_template import export_template, resolve_template
from medicalgpt.collator import FlatCollator
from medicalgpt.dataset import load_data
from medicalgpt.errors import run_script
from medicalgpt.model_files import load_tokenizer, resolve_model_dir
from medicalgpt.records import RowLog, parse_chat
from medicalgpt.run_record import recorded_template
from medicalgpt.stage import (
    build_model,
    choose_activation_checkpointing,
    open_run,
    report_data,
    run_training,
    show_example,
)
from medicalgpt.tokenization import ChatEncoder, ChatFormat
from medicalgpt.trainer import LanguageModelTrainer


@dataclass
class FinetuningArguments:
    """What only SFT has."""

    neft_alpha: float = field(
        default=0.0, metadata={"help": "noise on the embeddings of training rows (NEFTune), e.g. 5; 0: none"}
    )

    def __post_init__(self):
        require(self.neft_alpha >= 0, f"--neft_alpha {self.neft_alpha} is not allowed; expected 0 or more")


SUFFIXES = (".jsonl", ".json")
DEFAULTS = {
    "output_dir": "outputs-sft-qwen-v1",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 1.0,
}


def main(argv: list[str]) -> None:
    """Train, or continue training, as the flags say."""
    # 1. Flags
    model_args, adapter_args, data_args, chat_args, sft_args, args = arguments = parse_arguments(
        argv,
        (ModelArguments, AdapterArguments, DataArguments, ChatArguments, FinetuningArguments, StageArguments),
        __doc__,
        DEFAULTS,
    )

    # 2. Data: every row is read and checked before a model is looked at
    data = load_data(data_args, parse_chat, SUFFIXES, do_eval=args.do_eval, cache_dir=model_args.cache_dir)
    base_dir = resolve_model_dir(
        model_args.model_name_or_path,
        "--model_name_or_path",
        model_args.cache_dir,
        remote_code=model_args.trust_remote_code,
    )
    tokenizer = load_tokenizer(
        resolve_model_dir(
            model_args.tokenizer_name_or_path or str(base_dir),
            "--tokenizer_name_or_path",
            model_args.cache_dir,
        ),
        trust_remote_code=model_args.trust_remote_code,
    )
    template = resolve_template(
        tokenizer,
        chat_args.template_name,
        recorded=recorded_template(base_dir),
        force=chat_args.force_template,
    )

    # 3. The run: new, to be continued, or done
    record = open_run("sft", arguments, args, base_dir, data, template.name)
    if record is None:
        return

    # 4. Conversations → ids and labels
    chat_format = ChatFormat.of(template, tokenizer)
    encoder = ChatEncoder(
        tokenizer,
        chat_format,
        max_length=chat_args.model_max_length,
        max_source_length=chat_args.max_source_length,
        max_target_length=chat_args.max_target_length,
    )
    train = encoder.encode_chats(data.train, data.log)
    validation = encoder.encode_chats(data.validation, RowLog())
    report_data(data, train, validation, args)
    show_example(tokenizer, [(train[0]["input_ids"], train[0]["labels"])])

    # 5. Model
    model, padded = build_model(
        model_args,
        adapter_args,
        args,
        base_dir,
        tokenizer,
        chat_args.model_max_length,
        neftune_alpha=sft_args.neft_alpha,
    )
    choose_activation_checkpointing(model, args, train)

    # 6. Train, evaluate, save
    export_template(tokenizer, chat_format)
    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        record=record,
        data_collator=FlatCollator(padded=padded),
        train_dataset=train,
        eval_dataset=validation,
    )
    run_training(trainer, args, record, tokenizer.save_pretrained)


if __name__ == "__main__":
    run_script(main)
