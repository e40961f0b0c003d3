#!/usr/bin/env bash
# Bias, norm and LoRA tuning of Mixtral-8x7B on the dialogues of ultrachat_200k and evol-codealpaca; 16 GPUs of 80 GB.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"

name=finetune/sg/dialog_ultrachat200kWizardcode_mistralPeft
configs=("$repository/accessory/configs/model/finetune/sg/llamaPeft_normBiasLora.json")
options=(--llama_type mistral_peft --batch_size 8 --lr 2e-5 --model_parallel_size 4)
run_experiment "$@"
