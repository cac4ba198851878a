"""Merging: merged = base + adapter, the chain remembers where it comes from, and what does not fit is refused."""

import json
import shutil

import merge_peft_adapter
import supervised_finetuning
from medicalgpt.checkpoint import why_not_whole
from medicalgpt.errors import ConfigError, ModelError

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_training import command
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)

IDS = torch.arange(5, 45)[None]


def merge(base, adapter, output, **flags):
    extra = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    merge_peft_adapter.main(
        ["--base_model", str(base), "--lora_model", str(adapter), "--output_dir", str(output), *extra]
    )
    return output


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def random_adapter(directory, base, **config):
    """Save an adapter that changes much, as if trained elsewhere: no run.json."""
    torch.manual_seed(7)
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False,
               "task_type": "CAUSAL_LM"}  # fmt: skip
    adapted = get_peft_model(base, LoraConfig(**options | config))
    adapted.save_pretrained(directory)
    return adapted


@pytest.fixture(scope="module")
def trained(model_dir, data_dir, tmp_path_factory):
    """Train an SFT adapter."""
    output = tmp_path_factory.mktemp("runs") / "sft"
    supervised_finetuning.main(command("sft", model_dir, data_dir, output, max_steps=3))
    return output


@pytest.fixture(scope="module")
def merged(model_dir, trained, tmp_path_factory):
    return merge(model_dir, trained, tmp_path_factory.mktemp("merged") / "m", tokenizer_path=model_dir)


def test_the_merged_model_says_what_base_and_adapter_say(model_dir, trained, merged):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, trained))
    assert (expected - before).abs().max() > 0.1
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-4)


def test_the_merged_directory_is_whole_and_carries_the_trained_chat_template(merged):
    assert why_not_whole(merged) is None
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    generation = json.loads((merged / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation["eos_token_id"]


def test_run_json_names_base_adapter_and_template(model_dir, trained, merged):
    record = json.loads((merged / "run.json").read_text())
    assert record["template"] == "chatml"
    assert record["parent"]["stage"] == "sft"
    assert record["base"]["fingerprint"] == record["parent"]["base"]["fingerprint"]
    assert record["proof"]["divergence"] <= 1e-4


def test_the_same_merge_again_changes_nothing(model_dir, trained, merged, caplog):
    before = (merged / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO", logger="medicalgpt"):
        merge(model_dir, trained, merged)
    assert "already complete" in caplog.text
    assert (merged / "model.safetensors").stat().st_mtime_ns == before


def test_the_next_stage_takes_template_and_parent_from_the_merged_model(merged, data_dir, tmp_path):
    flags = command("sft", merged, data_dir, tmp_path / "o", max_steps=1)
    place = flags.index("--template_name")
    supervised_finetuning.main(flags[:place] + flags[place + 2 :])
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert (record["template"], record["parent"]["stage"]) == ("chatml", "merge")
    with pytest.raises(ConfigError, match="trained with chatml"):
        supervised_finetuning.main(command("sft", merged, data_dir, tmp_path / "p", template_name="qwen"))


def test_tied_embeddings_stay_tied_and_trained_ones_are_merged(model_dir, data_dir, tmp_path):
    flags = command(
        "sft", model_dir, data_dir, tmp_path / "o", modules_to_save="embed_tokens,lm_head", max_steps=2
    )
    supervised_finetuning.main(flags)
    output = merge(model_dir, tmp_path / "o", tmp_path / "m")
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert model.config.tie_word_embeddings and not info["missing_keys"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    saved = next(
        t for n, t in load_file(tmp_path / "o" / "adapter_model.safetensors").items() if "embed_tokens" in n
    )
    assert torch.equal(model.get_input_embeddings().weight, saved)


def test_a_bfloat16_base_stays_bfloat16_and_within_rounding(tmp_path, shared_tokenizer):
    build_model("qwen2", len(shared_tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    shared_tokenizer.save_pretrained(tmp_path / "base")
    random_adapter(tmp_path / "a", AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_alpha=2)
    output = merge(tmp_path / "base", tmp_path / "a", tmp_path / "m")
    assert {t.dtype for t in load_file(output / "model.safetensors").values()} == {torch.bfloat16}


def test_a_classification_head_is_kept(tmp_path, shared_tokenizer):
    config = build_model("llama", len(shared_tokenizer)).config
    build_model("llama", len(shared_tokenizer)).save_pretrained(tmp_path / "base")
    shared_tokenizer.save_pretrained(tmp_path / "base")
    config.num_labels = 1
    torch.manual_seed(3)
    scorer = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", config=config)
    adapted = random_adapter(tmp_path / "a", scorer, task_type="SEQ_CLS")
    expected = logits(adapted)
    output = merge(tmp_path / "base", tmp_path / "a", tmp_path / "m")
    found = logits(AutoModelForSequenceClassification.from_pretrained(output, num_labels=1))
    assert torch.allclose(found, expected, atol=1e-4)


# ---- what does not fit -----------------------------------------------------------------------------------------


def test_another_base_of_the_same_shape_is_refused_with_both_fingerprints(
    trained, tmp_path, shared_tokenizer
):
    build_model("llama", len(shared_tokenizer), seed=9, tie_word_embeddings=True).save_pretrained(
        tmp_path / "other"
    )
    shared_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ModelError, match=r"was trained on .*fingerprint \w{32}.* not on .*fingerprint \w{32}"
    ):
        merge(tmp_path / "other", trained, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_second_merge_into_the_merged_model_is_refused(trained, merged, tmp_path):
    with pytest.raises(ModelError, match="already contains"):
        merge(merged, trained, tmp_path / "m")


def damaged(trained, directory, change):
    """Copy an adapter without its record and change its weights."""
    shutil.copytree(
        trained, directory, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "run.json", "MANIFEST.json")
    )
    weights = load_file(directory / "adapter_model.safetensors")
    change(weights)
    save_file(weights, directory / "adapter_model.safetensors")
    return directory


def test_nan_in_the_adapter_is_refused_by_name(model_dir, trained, tmp_path):
    def poison(weights):
        weights[sorted(weights)[3]][0, 0] = float("nan")

    with pytest.raises(ModelError, match=r"lora_.* holds NaN"):
        merge(model_dir, damaged(trained, tmp_path / "a", poison), tmp_path / "m")


def test_a_missing_adapter_tensor_is_refused(model_dir, trained, tmp_path):
    adapter = damaged(trained, tmp_path / "a", lambda weights: weights.pop(sorted(weights)[0]))
    with pytest.raises(ModelError, match="incomplete"):
        merge(model_dir, adapter, tmp_path / "m")


def test_an_adapter_of_another_shape_is_refused(qwen2_dir, tmp_path, shared_tokenizer):
    random_adapter(
        tmp_path / "a", build_model("llama", len(shared_tokenizer), hidden_size=48, num_attention_heads=4)
    )
    with pytest.raises(ModelError, match="does not fit this base"):
        merge(qwen2_dir, tmp_path / "a", tmp_path / "m")


def test_an_adapter_made_elsewhere_is_merged_with_a_warning(model_dir, trained, tmp_path, caplog):
    adapter = damaged(trained, tmp_path / "a", lambda weights: None)
    merge(model_dir, adapter, tmp_path / "m")
    assert "has no run.json" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["the adapter is dropped", "it is added twice", "another matrix changes"])
def test_a_merge_that_is_not_base_and_adapter_is_not_written(fault, dtype, model_dir, tmp_path, monkeypatch):
    """A weak adapter, whose absence changes the outputs less than rounding may."""
    base_dir = tmp_path / "base"
    shutil.copytree(model_dir, base_dir)
    AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).save_pretrained(base_dir)
    random_adapter(tmp_path / "a", AutoModelForCausalLM.from_pretrained(base_dir), lora_alpha=0.5)

    def distorted(self, safe_merge=False):
        if fault == "the adapter is dropped":
            return self.unload()
        if fault == "it is added twice":
            for module in self.modules():
                if isinstance(module, LoraLayer):
                    module.scaling["default"] *= 2
        model = self._unload_and_optionally_merge(merge=True, safe_merge=safe_merge)
        if fault == "another matrix changes":
            model.model.norm.weight.data *= 3
        return model

    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", distorted)
    with pytest.raises(ModelError, match="differs from base"):
        merge(base_dir, tmp_path / "a", tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_a_merge_never_replaces_what_it_reads(model_dir, trained):
    for target in (trained, trained.parent, model_dir, trained / "m"):
        with pytest.raises(ConfigError, match="is, holds or lies in what is merged"):
            merge(model_dir, trained, target, overwrite=True)
    assert (trained / "adapter_model.safetensors").is_file()


def test_a_merged_checkpoint_has_the_template_it_was_trained_in(model_dir, trained, tmp_path):
    merge(model_dir, trained / "checkpoint-3", tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False) == (
        "<|im_start|>user\nQ<|im_end|>\n"
    )


def test_sampling_settings_without_their_switch_do_not_stop_a_merge(model_dir, trained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}')
    merge(base, trained, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["do_sample"] is True


def test_a_base_whose_configuration_changed_is_refused(model_dir, trained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match=r"config\.json was changed"):
        merge(base, trained, tmp_path / "m")


def test_a_used_output_directory_is_refused_and_only_a_merged_model_replaced(model_dir, trained, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        merge(model_dir, trained, tmp_path / "m")
    with pytest.raises(ConfigError, match="holds no merged model"):
        merge(model_dir, trained, tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    merge(model_dir, trained, tmp_path / "n")
    merge(model_dir, trained / "checkpoint-3", tmp_path / "n", overwrite=True)
    assert why_not_whole(tmp_path / "n") is None


# ---- broken weights --------------------------------------------------------------------------------------------


def broken_base(model_dir, directory, content: bytes | None):
    shutil.copytree(model_dir, directory)
    file = directory / "model.safetensors"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    return directory


@pytest.mark.parametrize("what, make, message", [
    ("cut off", lambda data: data[:-100], "bytes where its header announces"),
    ("an HTML page", lambda data: b"<!DOCTYPE html><p>404", "is an HTML page"),
    ("an LFS pointer", lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ("empty", lambda data: b"", "is cut off or not safetensors"),
    ("noise", lambda data: b"\x00\xff" * 300, "is cut off or not safetensors"),
    ("missing", lambda data: None, "holds no .safetensors weights"),
])  # fmt: skip
def test_broken_weights_are_named_for_what_they_are(what, make, message, model_dir, tmp_path):
    base = broken_base(model_dir, tmp_path / "base", make((model_dir / "model.safetensors").read_bytes()))
    random_adapter(tmp_path / "a", AutoModelForCausalLM.from_pretrained(model_dir))
    with pytest.raises(ModelError, match=message):
        merge(base, tmp_path / "a", tmp_path / "m")


def test_a_missing_tensor_is_refused_and_not_made_up(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    random_adapter(tmp_path / "a", AutoModelForCausalLM.from_pretrained(model_dir))
    with pytest.raises(ModelError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        merge(tmp_path / "base", tmp_path / "a", tmp_path / "m")
