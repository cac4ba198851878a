#!/usr/bin/env bash
# Proximal policy optimisation (PPO): the model learns to write answers that the reward model scores high.
#
# Reads   the merged SFT model, the reward model's adapter on it, and the conversations under --train_file_dir: each up to
#         its last answer is a prompt, with its history
# Writes  --output_dir: the policy's LoRA adapter, results, logs/ for TensorBoard and logs/samples.jsonl, checkpoint-N/
# Next    python merge_peft_adapter.py --base_model merged-sft-qwen-v1 --lora_model outputs-ppo-qwen-v1 --output_dir final-medgpt-ppo
#
# One update draws processes × --per_device_train_batch_size × --gradient_accumulation_steps × --num_mini_batches answers;
# --max_steps counts updates. One process on one GPU; more: CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 and half
# of --gradient_accumulation_steps. Little memory: lower --per_device_train_batch_size and raise
# --gradient_accumulation_steps, or add --qlora True --load_in_4bit True.
# Watch score (should rise), kl (nats per answer away from the SFT model; far above --target_kl answers decay) and ended.
# Keep every line of the command ending in a backslash: a # or an empty line in between would cut off the rest.
# Any flag can be given behind the script's name: bash run_ppo.sh --max_steps 100
set -euo pipefail
cd "$(dirname "$0")"
source medicalgpt/launch.sh

CUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node 1 ppo_training.py \
    --sft_model_path ./merged-sft-qwen-v1 \
    --reward_model_path ./outputs-rm-qwen-v1 \
    --train_file_dir ./data/finetune \
    --validation_file_dir ./data/finetune \
    --template_name qwen \
    --max_source_length 512 \
    --max_completion_length 128 \
    --max_train_samples -1 \
    --max_eval_samples 32 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 64 \
    --gradient_accumulation_steps 4 \
    --num_generations 4 \
    --num_mini_batches 2 \
    --num_ppo_epochs 2 \
    --num_train_epochs 1 \
    --max_steps -1 \
    --learning_rate 3e-4 \
    --warmup_steps 0.05 \
    --weight_decay 0 \
    --temperature 0.7 \
    --kl_coef 0.07 \
    --target_kl 6 \
    --cliprange 0.2 \
    --cliprange_value 0.2 \
    --vf_coef 0.5 \
    --gamma 1.0 \
    --lam 0.95 \
    --missing_eos_penalty 1.0 \
    --seed 42 \
    --torch_dtype bfloat16 \
    --bf16 \
    --gradient_checkpointing auto \
    --use_peft True \
    --lora_rank 8 \
    --lora_alpha 16 \
    --target_modules all \
    --output_dir outputs-ppo-qwen-v1 \
    --report_to tensorboard \
    --sample_steps 10 \
    --save_strategy steps \
    --save_steps 50 \
    --save_total_limit 3 \
    "$@"
