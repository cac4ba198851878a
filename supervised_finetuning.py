"""Supervised fine-tuning (SFT): the model learns to answer.

Reads   --train_file_dir   .jsonl/.json conversations, ShareGPT {"conversations": [{"from", "value"}]} or
                           OpenAI {"messages": [{"role", "content"}]}
Writes  --output_dir       LoRA adapter (or model), tokenizer, run.json, results, logs/, checkpoint-N/
Next    merge_peft_adapter.py, then dpo_training.py on the merged model, or inference.py

    bash run_sft.sh
    python supervised_finetuning.py --model_name_or_path merged-pt-qwen-v1 --train_file_dir data/finetune

Method: next-token prediction on every answer of a conversation and its stop token, − Σ log p(y_t | before) /
number of answer tokens; questions, system prompts and role markers are read and not trained.
"""

from dataclasses import dataclass, field

from medicalgpt.arguments import parse_stage
from medicalgpt.base import open_base
from medicalgpt.collator import FlatCollator
from medicalgpt.dataset import load_data
from medicalgpt.errors import run_script
from medicalgpt.flags import require
from medicalgpt.records import parse_chat
from medicalgpt.row_log import RowLog
from medicalgpt.stage import (
    build_model,
    chat_encoder,
    choose_activation_checkpointing,
    open_run,
    report_data,
    run_training,
    show_example,
)
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
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 1.0,
}


def main(argv: list[str]) -> None:
    """Train, or continue training, as the flags say."""
    # 1. Flags
    flags = parse_stage(argv, FinetuningArguments, __doc__, DEFAULTS)

    # 2. Data: every row is read and checked before a model is looked at
    data = load_data(flags, parse_chat, SUFFIXES)
    base = open_base(flags)

    # 3. The run: new, to be continued, or done
    record = open_run("sft", flags, base, data)
    if record is None:
        return

    # 4. Conversations → ids and labels
    encoder = chat_encoder(flags, base)
    train = encoder.encode_chats(data.train, data.log)
    validation = encoder.encode_chats(data.validation, RowLog())
    report_data(data, train, validation, flags.run)
    show_example(base.tokenizer, [(train[0]["input_ids"], train[0]["labels"])])

    # 5. Model
    model = build_model(
        flags, base, max_length=flags.chat.model_max_length, neftune_alpha=flags.own.neft_alpha
    )
    choose_activation_checkpointing(model, flags.run, train)

    # 6. Train, evaluate, save
    trainer = LanguageModelTrainer(
        model=model,
        args=flags.run,
        record=record,
        data_collator=FlatCollator(padded=model.padded),
        train_dataset=train,
        eval_dataset=validation,
    )
    run_training(trainer, record, base)


if __name__ == "__main__":
    run_script(main, resumable=True)
