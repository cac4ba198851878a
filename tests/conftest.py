"""Tiny models and tokenizers, built here: no network, no hub."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import medicalgpt  # noqa: F401  (sets what the libraries read at import)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

CORPUS = [
    "Fever is a temperature above 38 degrees. Drink water and rest.",
    "What should I do when my child has a fever? See a doctor if it lasts.",
    "system user assistant You are a helpful AI assistant. I am here to help you.",
    "发热是体温高于正常范围。多喝水,注意休息,必要时就医。",
    "An answer has a beginning and an end; a question ends with a question mark?",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ChatML's control tokens; two of them are not special, as in Qwen3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL[:3], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(SPECIAL[3:])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def shared_tokenizer():
    return build_tokenizer()


@pytest.fixture
def tokenizer(shared_tokenizer):
    return copy.deepcopy(shared_tokenizer)


def tiny_config(family: str, vocab_size: int, **more):
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": vocab_size,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**sizes | more)


def build_model(family: str, vocab_size: int, seed: int = 0, **more):
    """Return a random fp32 model; a wide initialisation keeps its outputs far from uniform."""
    torch.manual_seed(seed)
    model_class = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family]
    return model_class(tiny_config(family, vocab_size, **more)).eval()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, shared_tokenizer) -> Path:
    """Save a tiny Llama with tied embeddings and its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    build_model("llama", len(shared_tokenizer), tie_word_embeddings=True).save_pretrained(directory)
    shared_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def qwen2_dir(tmp_path_factory, shared_tokenizer) -> Path:
    """Save a tiny Qwen2 with separate embeddings and its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    build_model("qwen2", len(shared_tokenizer), seed=1, tie_word_embeddings=False).save_pretrained(directory)
    shared_tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Write small data for every stage: pt/, sft/, dpo/."""
    root = tmp_path_factory.mktemp("data")
    write_jsonl(
        root / "pt" / "a.jsonl", [{"text": " ".join(CORPUS[i % 5 :][: 2 + i % 3])} for i in range(24)]
    )
    talks = []
    for i in range(24):
        turns = [
            {"from": "human", "value": f"Question {i}: what is a fever?"},
            {"from": "gpt", "value": f"Answer {i}."},
        ]
        if i % 3 == 0:
            turns += [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": f"Rest, number {i}."}]
        talks.append({"conversations": turns})
    write_jsonl(root / "sft" / "a.jsonl", talks)
    pairs = [{"question": f"Question {i}?", "response_chosen": f"See a doctor {i}. Drink water.",
              "response_rejected": f"It is nothing {i}."} for i in range(24)]  # fmt: skip
    write_jsonl(root / "dpo" / "a.jsonl", pairs)
    return root


def torchrun(arguments: list[str], ranks: int, timeout: int = 120) -> subprocess.CompletedProcess:
    """Run a script of the project under torchrun; on a time-out its workers are ended too."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    process = subprocess.Popen([*launcher, *arguments], env=environment, cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, which are sessions of their own
        process.wait(60)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
