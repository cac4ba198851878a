"""Continued pretraining (PT): the model reads domain texts.

Reads   --train_file_dir   .txt files and .jsonl/.json rows {"text": …}
Writes  --output_dir       LoRA adapter (or model), tokenizer, run.json, train_results, eval_results, logs/,
checkpoint-N/ Next    merge_peft_adapter.py, then supervised_finetuning.py on the merged model

    bash run_pt.sh
    python pretraining.py --model_name_or_path Qwen/Qwen2.5-0.5B --train_file_dir data/pretrain

Method: next-token prediction over whole documents, − Σ log p(x_t | x_<t) / number of tokens, packed into
rows of `block_size` tokens without padding; documents of a row do not see each other, and each ends with a
trained EOS.
"""

import logging
import statistics
from dataclasses import dataclass, field

from medicalgpt.arguments import (
    AdapterArguments,
    DataArguments,
    ModelArguments,
    StageArguments,
    parse_arguments,
    require,
)
from medicalgpt.collator import FlatCollator
from medicalgpt.dataset import load_data
from medicalgpt.documents import encode_texts, pack_documents
from medicalgpt.errors import run_script
from medicalgpt.model_files import load_tokenizer, resolve_model_dir
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
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 1.0,
}


def main(argv: list[str]) -> None:
    """Train, or continue training, as the flags say."""
    # 1. Flags
    model_args, adapter_args, data_args, pt_args, args = arguments = parse_arguments(
        argv,
        (ModelArguments, AdapterArguments, DataArguments, PretrainingArguments, StageArguments),
        __doc__,
        DEFAULTS,
    )

    # 2. Data: every row is read and checked before a model is looked at
    data = load_data(
        data_args,
        parse_text,
        SUFFIXES,
        do_eval=args.do_eval,
        txt_documents=pt_args.txt_documents,
        cache_dir=model_args.cache_dir,
    )
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

    # 3. The run: new, to be continued, or done
    record = open_run("pt", arguments, args, base_dir, data, None)
    if record is None:
        return

    # 4. Documents → rows of block_size tokens
    documents = encode_texts(data.train, tokenizer)
    train = pack_documents(documents, pt_args.block_size)
    validation = pack_documents(encode_texts(data.validation, tokenizer), pt_args.block_size)
    report_data(data, train, validation, args)
    median = statistics.median(map(len, documents))
    if median < SHORT_DOCUMENT:
        logger.warning(
            "warning: the median document has %d tokens, under %d; are lines taken for documents? "
            "(--txt_documents %s)",
            median,
            SHORT_DOCUMENT,
            pt_args.txt_documents,
        )
    show_example(tokenizer, [(train[0]["input_ids"], train[0]["labels"])])

    # 5. Model
    model, padded = build_model(model_args, adapter_args, args, base_dir, tokenizer, pt_args.block_size)
    choose_activation_checkpointing(model, args, train)

    # 6. Train, evaluate, save
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
