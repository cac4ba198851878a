"""Continued pretraining (PT): the model reads domain texts.

Reads   --train_file_dir   .txt files and .jsonl/.json rows {"text": …}
Writes  --output_dir       LoRA adapter (or model), tokenizer, run.json, results, logs/, checkpoint-N/
Next    merge_peft_adapter.py, then supervised_finetuning.py on the merged model

    bash run_pt.sh
    python pretraining.py --model_name_or_path Qwen/Qwen2.5-0.5B --train_file_dir data/pretrain

Method: next-token prediction over whole documents, − Σ log p(x_t | x_<t) / number of tokens, packed into
rows of `block_size` tokens without padding; documents of a row do not see each other, and each ends with a
trained EOS.
"""

import logging
import statistics
from dataclasses import dataclass, field

from medicalgpt.arguments import parse_text_stage
from medicalgpt.base import open_base
from medicalgpt.collator import FlatCollator
from medicalgpt.dataset import load_data
from medicalgpt.documents import encode_texts, pack_documents
from medicalgpt.errors import run_script
from medicalgpt.flags import require
from medicalgpt.records import parse_text
from medicalgpt.stage import (
    build_model,
    choose_activation_checkpointing,
    open_run,
    report_data,
    run_training,
    show_example,
)
from medicalgpt.trainer import LanguageModelTrainer

logger = logging.getLogger("medicalgpt")

SUFFIXES = (".txt", ".jsonl", ".json")
SHORT_DOCUMENT = 128  # tokens; a smaller median usually means that lines were taken for documents


@dataclass
class PretrainingArguments:
    """How texts become rows."""

    block_size: int = field(default=1024, metadata={"help": "length of a row, in tokens"})
    txt_documents: str = field(
        default="file",
        metadata={
            "help": "what is one document in a .txt file: the file, a blank-line separated part, or a line"
        },
    )

    def __post_init__(self):
        require(self.block_size >= 8, f"--block_size {self.block_size} is not allowed; expected 8 or more")
        require(
            self.txt_documents in ("file", "blank", "line"),
            f"--txt_documents {self.txt_documents} is not allowed; expected file, blank or line",
        )


DEFAULTS = {
    "output_dir": "outputs-pt-qwen-v1",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 1.0,
}


def main(argv: list[str]) -> None:
    """Train, or continue training, as the flags say."""
    # 1. Flags
    flags = parse_text_stage(argv, PretrainingArguments, __doc__, DEFAULTS)

    # 2. Data: every row is read and checked before a model is looked at
    data = load_data(flags, parse_text, SUFFIXES, txt_documents=flags.own.txt_documents)
    base = open_base(flags)

    # 3. The run: new, to be continued, or done
    record = open_run("pt", flags, base, data)
    if record is None:
        return

    # 4. Documents → rows of block_size tokens
    documents = encode_texts(data.train, base.tokenizer)
    train = pack_documents(documents, flags.own.block_size)
    validation = pack_documents(encode_texts(data.validation, base.tokenizer), flags.own.block_size)
    report_data(data, train, validation, flags.run)
    warn_of_short_documents(documents, flags.own.txt_documents)
    show_example(base.tokenizer, [(train[0]["input_ids"], train[0]["labels"])])

    # 5. Model
    model = build_model(flags, base, max_length=flags.own.block_size)
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


def warn_of_short_documents(documents: list[list[int]], txt_documents: str) -> None:
    """Say when documents are so short that lines were probably taken for them."""
    median = statistics.median(map(len, documents))
    if median < SHORT_DOCUMENT:
        logger.warning(
            "warning: the median document has %d tokens, under %d; are lines taken for documents? "
            "(--txt_documents %s)",
            median,
            SHORT_DOCUMENT,
            txt_documents,
        )


if __name__ == "__main__":
    run_script(main, resumable=True)
