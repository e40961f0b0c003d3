#!/usr/bin/env bash
# The same training as dialog_ultrachat200kWizardcode_mistral.sh, with the experts of a layer spread over the eight GPUs
# of a node, to which tokens travel, and all else sharded over both nodes; 2 nodes of 8 GPUs of 80 GB.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"

name=finetune/sg/dialog_ultrachat200kWizardcode_mistralExperts
options=(--llama_type mistral --batch_size 1 --lr 5e-6 --expert_parallel_size 8 --data_parallel fsdp)
run_experiment "$@"
