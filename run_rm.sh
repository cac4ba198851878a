#!/usr/bin/env bash
# Reward modelling (RM): a model learns to give the better of two answers the higher score.
#
# Reads   the .jsonl pairs under --train_file_dir
# Writes  --output_dir: the LoRA adapter with its score head, results, logs/ for TensorBoard, checkpoint-N/
# Next    bash run_ppo.sh, which takes the adapter as it is
#
# One process on one GPU. More: write CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 and half of
# --gradient_accumulation_steps; the effective batch is
# processes × --per_device_train_batch_size × --gradient_accumulation_steps.
# Little memory: lower --per_device_train_batch_size and raise --gradient_accumulation_steps, or add
# --qlora True --load_in_4bit True --optim paged_adamw_32bit. Without --validation_file_dir of its own, or with the
# training directory as here, validation rows are held out by a hash of their prompt.
# Keep every line of the command ending in a backslash: a # or an empty line in between would cut off the rest.
# Any flag can be given behind the script's name: bash run_rm.sh --max_steps 100
set -euo pipefail
cd "$(dirname "$0")"
source medicalgpt/launch.sh

CUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node 1 reward_modeling.py \
    --model_name_or_path ./merged-sft-qwen-v1 \
    --train_file_dir ./data/reward \
    --validation_file_dir ./data/reward \
    --template_name qwen \
    --model_max_length 2048 \
    --max_train_samples -1 \
    --max_eval_samples 100 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 2 \
    --gradient_accumulation_steps 4 \
    --num_train_epochs 1 \
    --max_steps -1 \
    --learning_rate 1e-4 \
    --warmup_steps 0.05 \
    --weight_decay 0.01 \
    --seed 42 \
    --torch_dtype bfloat16 \
    --bf16 \
    --gradient_checkpointing auto \
    --use_peft True \
    --lora_rank 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --target_modules all \
    --output_dir outputs-rm-qwen-v1 \
    --report_to tensorboard \
    --logging_steps 1 \
    --logging_first_step True \
    --eval_strategy steps \
    --eval_steps 50 \
    --save_strategy steps \
    --save_steps 50 \
    --save_total_limit 3 \
    "$@"
