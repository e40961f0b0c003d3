# What the experiments share. An experiment sets `name` (its folder under output/) and `options`, then calls
# `run_experiment "$@"`. It may be started from any folder, alone, or on many ranks by srun or torchrun --no-python;
# paths that a user gives count from the folder that the user is in, and so does output/.
set -euo pipefail
repository="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Said by one rank; the others give it time, since srun ends all with the first.
usage() {
    if [ "${SLURM_PROCID:-${RANK:-0}}" = 0 ]; then
        echo "usage: [srun ...] bash $0 PRETRAINED CONFIG_JSON TOKENIZER [OPTIONS OF main_finetune.py ...]" >&2
    else
        trap 'kill $! 2> /dev/null || true' TERM  # with its group the sleep may have ended before
        sleep 2 &
        wait $! || true
    fi
    exit 2
}

# run_experiment PRETRAINED CONFIG_JSON TOKENIZER [OPTIONS OF main_finetune.py ...]
run_experiment() {
    # One that begins with a dash is an option: one of the three was left out.
    if [ $# -lt 3 ] || [[ "$1" == -* || "$2" == -* || "$3" == -* ]]; then
        usage
    fi
    local pretrained="$1" config="$2" tokenizer="$3"
    shift 3
    # `configs` is written so because bash before 4.4 takes an empty array for an unset variable.
    # Not a child but this very process, so that signals of SLURM reach the training.
    exec "${PYTHON:-python}" -u "$repository/accessory/main_finetune.py" \
        --output_dir "output/$name" \
        --pretrained_path "$pretrained" --pretrained_type consolidated \
        --llama_config "$config" ${configs[@]+"${configs[@]}"} --tokenizer_path "$tokenizer" --no_visual \
        --data_config "$repository/accessory/configs/data/finetune/sg/dialog_ultrachat200kWizardcode.yaml" --dialog \
        --epochs 1 --warmup_epochs 0.1 --accum_iter 8 --max_words 4096 --num_workers 4 \
        --min_lr 0 --clip_grad 2 --weight_decay 0 \
        --data_parallel sdp --checkpointing \
        "${options[@]}" "$@"
}

# Config files that overlay CONFIG_JSON; an experiment may name some.
configs=()
