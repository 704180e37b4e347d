# Shared by both scripts, which source it from the repository's root inside a job's allocation.

MODEL=${MODEL:-Qwen2.5-Math-1.5B}
METHOD=${METHOD:-capo}
CONFIG=${CONFIG:-deepscaler}
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-fsdp2}  # ddp, fsdp2, zero2, zero3
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

recipe=recipes/$MODEL/$METHOD/config_$CONFIG.yaml
launcher=recipes/accelerate_configs/$ACCELERATE_CONFIG.yaml
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))

export OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64}  # srun does not inherit it from sbatch
# If the nodes do not reach each other through their first network interface:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

fail() {
    echo "$1" >&2
    exit 2
}

for file in "$recipe" "$launcher"; do
    [ -f "$file" ] || fail "$file does not exist. Check MODEL, METHOD, CONFIG and ACCELERATE_CONFIG."
done

# Print the value of a key of the recipe.
from_recipe() {
    awk -v key="$1:" '$1 == key { print $2 }' "$recipe"
}

# Print the number of micro-batches (recipe key $1) with $2 processes. The recipes are made for 8 processes. With
# another number, each process gets more or fewer micro-batches, so that a generation and an update keep their size.
micro_batches() {
    local with_8
    with_8=$(from_recipe "$1")
    [ -n "$with_8" ] || fail "$recipe has no $1, which these scripts need to divide the micro-batches: add it."
    [ $((with_8 * 8 % $2)) -eq 0 ] ||
        fail "$1: $with_8 micro-batches for 8 processes cannot be divided among $2. Use another number of nodes."
    echo $((with_8 * 8 / $2))
}

# Run `trl-capo train` on the first $1 nodes, with the remaining arguments as options.
train_on() {
    local processes=$(($1 * GPUS_PER_NODE)) hosts accumulation generation
    hosts=$(IFS=, && echo "${nodes[*]:0:$1}")
    accumulation=$(micro_batches gradient_accumulation_steps "$processes")
    generation=$(micro_batches steps_per_generation "$processes")
    # Only a machine itself knows its rank, so its own shell fills it in. Without --kill-on-bad-exit, the other nodes
    # would wait for one that failed. The port depends on the job id, so that two jobs do not share one.
    srun --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --nodelist="$hosts" --kill-on-bad-exit=1 \
        bash -c 'exec accelerate launch --machine_rank "$SLURM_PROCID" "$@"' launch \
        --config_file "$launcher" \
        --num_machines "$1" \
        --num_processes "$processes" \
        --main_process_ip "${nodes[0]}" \
        --main_process_port $((20000 + SLURM_JOB_ID % 20000)) \
        -m trl_capo.scripts.train \
        --config "$recipe" \
        --gradient_accumulation_steps "$accumulation" \
        --steps_per_generation "$generation" \
        --resume_from_checkpoint true \
        "${@:2}"
}
