#!/usr/bin/env bash
# Full finetuning of Mixtral-8x7B on the dialogues of ultrachat_200k and evol-codealpaca; 32 GPUs of 80 GB.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"

name=finetune/sg/dialog_ultrachat200kWizardcode_mistral
options=(--llama_type mistral --batch_size 4 --lr 5e-6 --model_parallel_size 8)
run_experiment "$@"
