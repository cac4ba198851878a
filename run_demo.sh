#!/usr/bin/env bash
# The whole chain on a fresh machine, without GPU or hub: PT → merge → SFT → merge → DPO → merge → before and after.
# RLHF=1 bash run_demo.sh: … SFT → merge → RM → PPO → merge in place of DPO.
#
# Reads   the example data of this project, English by default
# Writes  .venv, models/ (the demo model), demo/ (the guide's directory names); finished parts are skipped next time
#
# Other model and language:  MODEL=Qwen/Qwen2.5-0.5B DATA_LANGUAGE=zh bash run_demo.sh
# Another chat format:       TEMPLATE=llama3 MODEL=… bash run_demo.sh
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=medicalgpt/environment.sh
source medicalgpt/environment.sh

MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
DATA_LANGUAGE=${DATA_LANGUAGE:-en}
RLHF=${RLHF:-0}
case "$DATA_LANGUAGE" in
    en) files=(pretrain/medical_en.jsonl pretrain/en_article_tail500.txt finetune/medical_sft_en.jsonl reward/dpo_en.jsonl) ;;
    zh) files=(pretrain/medical_zh.jsonl pretrain/fever.txt finetune/medical_sft_1K_format.jsonl reward/dpo_zh_500.jsonl) ;;
    *) echo "error: DATA_LANGUAGE=$DATA_LANGUAGE is not allowed; expected en or zh" >&2; exit 2 ;;
esac
case "$MODEL" in
    */SmolLM2-135M-Instruct) TEMPLATE=${TEMPLATE:-smollm} ;;
    *) TEMPLATE=${TEMPLATE:-qwen} ;;
esac

step() { printf '\n=== %s\n' "$*"; }

if [ "$MODEL" = models/SmolLM2-135M-Instruct ]; then
    step "Demo model"
    python -m medicalgpt.demo_model "$MODEL"
fi

data=demo/data-$DATA_LANGUAGE
for file in "${files[@]}"; do
    mkdir -p "$data/$(dirname "$file")"
    cp "data/$file" "$data/$file"
done
held_out() { echo "data/heldout/$1/heldout_$DATA_LANGUAGE.jsonl"; }

# merge BASE ADAPTER OUTPUT
merge() {
    python merge_peft_adapter.py --base_model "$1" --tokenizer_path "$1" --lora_model "$2" --output_dir "$3"
}

step "1/6 PT: the model reads medical texts"
bash run_pt.sh --model_name_or_path "$MODEL" --train_file_dir "$data/pretrain" \
    --validation_file_dir "$(held_out pretrain)" --block_size 512 --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 1 --num_train_epochs 1 --learning_rate 5e-4 --logging_steps 5 --eval_strategy no \
    --output_dir demo/outputs-pt-qwen-v1

step "2/6 merge"
merge "$MODEL" demo/outputs-pt-qwen-v1 demo/merged-pt-qwen-v1

step "3/6 SFT: the model learns to answer"
bash run_sft.sh --model_name_or_path demo/merged-pt-qwen-v1 --train_file_dir "$data/finetune" \
    --validation_file_dir "$(held_out finetune)" --template_name "$TEMPLATE" --model_max_length 1024 \
    --max_train_samples 200 --gradient_accumulation_steps 1 --num_train_epochs 1 --learning_rate 5e-4 --logging_steps 5 --eval_strategy no \
    --output_dir demo/outputs-sft-qwen-v1

step "4/6 merge"
merge demo/merged-pt-qwen-v1 demo/outputs-sft-qwen-v1 demo/merged-sft-qwen-v1

if [ "$RLHF" = 1 ]; then
    final=demo/final-medgpt-ppo
    step "5/7 RM: a model learns to score answers"
    bash run_rm.sh --model_name_or_path demo/merged-sft-qwen-v1 --train_file_dir "$data/reward" \
        --validation_file_dir "$(held_out reward)" --template_name "$TEMPLATE" --model_max_length 1024 \
        --max_train_samples 200 --gradient_accumulation_steps 2 --num_train_epochs 1 --learning_rate 5e-4 --logging_steps 5 --eval_strategy no \
        --output_dir demo/outputs-rm-qwen-v1

    step "6/7 PPO: the model writes answers and learns from their scores"
    bash run_ppo.sh --sft_model_path demo/merged-sft-qwen-v1 --reward_model_path demo/outputs-rm-qwen-v1 \
        --train_file_dir "$data/finetune" --validation_file_dir "$(held_out finetune)" --template_name "$TEMPLATE" \
        --max_source_length 192 --max_completion_length 96 --max_steps 20 --max_eval_samples 48 \
        --learning_rate 7e-4 --save_steps 5 --output_dir demo/outputs-ppo-qwen-v1

    step "7/7 merge"
    merge demo/merged-sft-qwen-v1 demo/outputs-ppo-qwen-v1 "$final"
    report=(--rm_results demo/outputs-rm-qwen-v1/eval_results.json --ppo_results demo/outputs-ppo-qwen-v1/eval_results.json)
    models=(PPO="$final")
else
    final=demo/final-medgpt-dpo
    step "5/6 DPO: the model learns which answer is better"
    bash run_dpo.sh --model_name_or_path demo/merged-sft-qwen-v1 --train_file_dir "$data/reward" \
        --validation_file_dir "$(held_out reward)" --template_name "$TEMPLATE" --model_max_length 1024 \
        --max_train_samples 120 --gradient_accumulation_steps 2 --num_train_epochs 1 --learning_rate 2e-4 --logging_steps 5 --eval_strategy no \
        --output_dir demo/outputs-dpo-qwen-v1

    step "6/6 merge"
    merge demo/merged-sft-qwen-v1 demo/outputs-dpo-qwen-v1 "$final"
    report=(--dpo_results demo/outputs-dpo-qwen-v1/eval_results.json)
    models=(DPO="$final")
fi

step "What it has learned"
python -m medicalgpt.demo_report --language "$DATA_LANGUAGE" --report demo/report.json "${report[@]}" \
    --models "base=$MODEL" PT=demo/merged-pt-qwen-v1 SFT=demo/merged-sft-qwen-v1 "${models[@]}"

printf '\nTalk to it:   source .venv/bin/activate && python inference.py --base_model %s --interactive\n' "$final"
