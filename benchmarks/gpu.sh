#!/usr/bin/env bash
# The measurements that need a GPU: the rows of docs/performance.md and docs/scaling.md that say "not measured".
#
#     benchmarks/gpu.sh OUT [minutes] [kernels] [lora] [full]      all four by default; PYTHON=python3 names another Python
#
# minutes  the ten most telling minutes, each line with a limit of its own: the kernels' and packed rows' tests; a training
#          twice, bit for bit; and resumed, bit for bit; which copies wait; a step of two layers of GPT-J's shape
# kernels  tests of the compiled log-prob kernels and packed rows; then their cost beside the bare matrix products
# lora     Llama-3-8B's shape, LoRA of rank 16 on bfloat16: a step, its memory beside the dry run's, where its time goes, and
#          P-DPO against plain rows (the arms wait side by side, about 120 GB; with less memory: STEP=--one-at-a-time)
# full     GPT-J 6B's shape, full fine-tuning in mixed precision: the same without the rows (about 110 GB on one GPU, so the
#          arms run one at a time)
#
# Weights are random (benchmarks/random_model.py) and lie in OUT/models. TRL takes part if it and peft are installed, with
# several batch sizes, and with Liger's kernels if they are; a batch size that does not fit in memory is left out. The log
# `versions` says what was installed. A part that fails does not stop the next. Every log is in OUT; the last lines of each are
# printed at the end. A trial: LAYERS="--layers 2" COMPARISONS=2 ROUNDS=1 STEP="--shape short", LOGPROB="--positions 64".
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?expected a folder for logs and tables}
shift
parts=${*:-minutes kernels lora full}
python=${PYTHON:-python}
export PYTHONPATH=$PWD:$PWD/benchmarks
mkdir -p "$out/models"

run() { # NAME COMMAND...
    local name=$1
    shift
    "$@" >"$out/$name.log" 2>&1 || echo "FAILED with status $?: $*" >>"$out/$name.log"
}

model() { # FOLDER SHAPE TYPE [--layers N]
    local folder=$1 shape=$2 type=$3
    shift 3
    [ -f "$out/models/$folder/config.json" ] || run "$folder-weights" "$python" benchmarks/random_model.py "$shape" --out "$out/models/$folder" --dtype "$type" $LAYERS "$@"
}

short() { # SECONDS NAME COMMAND...
    local limit=$1 name=$2
    shift 2
    run "$name" timeout "$limit" "$@"
    echo "== $name"
    tail -n 4 "$out/$name.log"
}

same() { # NAME RUN RUN
    if cmp "$out/$2/final/model.safetensors" "$out/$3/final/model.safetensors"; then echo "bit for bit"; else echo "OTHER BITS"; fi \
        >"$out/$1.log" 2>&1
    echo "== $1"
    cat "$out/$1.log"
}

minutes() {
    local tiny=(train.py --config tiny.yaml --set model.compute_dtype=bfloat16 train.save_every=3 train.keep_checkpoints=9)
    short 90 minutes-1-kernels "$python" -m pytest -q -x tests/test_logprobs.py
    short 120 minutes-2-packed "$python" -m pytest -q -x tests/method/test_tree.py -k "gpu or block_mask"
    short 60 minutes-3-train "$python" "${tiny[@]}" "run_dir=$out/a"
    short 60 minutes-4-again "$python" "${tiny[@]}" "run_dir=$out/b"
    same minutes-4-bits a b
    find "$out/a/checkpoints" -mindepth 1 -maxdepth 1 ! -name step_3 -exec rm -r {} +
    rm -rf "$out/a/final"
    short 60 minutes-5-resumed "$python" "${tiny[@]}" "run_dir=$out/a" # after update 3
    same minutes-5-bits a b
    local waits="import runpy, sys, torch; torch.cuda.set_sync_debug_mode('warn'); sys.argv[:1] = ['train.py']; runpy.run_path('train.py', run_name='__main__')"
    short 60 minutes-6-waits "$python" -W always -c "$waits" "${tiny[@]:1}" "run_dir=$out/d"
    model gptj-2 "GPT-J 6B" float32 --layers 2
    short 120 minutes-7-step "$python" benchmarks/step.py --model "$out/models/gptj-2" --comparisons 16 --micro-batch 8 --set model.compute_dtype=bfloat16 --rounds 2 --arms prlhf "prlhf pdpo" --one-at-a-time --out "$out/minutes.json"
}

LAYERS=${LAYERS:-}
arms=(prlhf "prlhf pdpo")
with_trl=(--arms "${arms[@]}")
"$python" -c "import trl, peft" 2>/dev/null && with_trl+=(trl --trl-batch 1 2 4 8)
run versions "$python" -c 'import step; print(step.device_name(), step.versions(), sep="\n")'
size=(--checkpointing --comparisons ${COMPARISONS:-32} --micro-batch 8 ${STEP:-}) rounds=(--rounds ${ROUNDS:-3})
for part in $parts; do
    case $part in
    minutes) minutes ;;
    kernels)
        run kernels "$python" -m pytest -q tests/test_logprobs.py tests/method/test_tree.py
        run logprob "$python" benchmarks/logprob.py --out "$out/logprob.json" ${LOGPROB:-}
        ;;
    lora)
        model llama Llama-3-8B bfloat16
        lora=(--model "$out/models/llama" --lora 16 --dtype bfloat16 "${size[@]}")
        run lora "$python" benchmarks/step.py "${lora[@]}" "${rounds[@]}" "${with_trl[@]}" --out "$out/lora.json"
        run lora-rows "$python" benchmarks/step.py "${lora[@]}" "${rounds[@]}" --arms "prlhf pdpo" rows "rows once" --out "$out/lora-rows.json"
        run lora-breakdown "$python" benchmarks/breakdown.py "${lora[@]}" --arms "${arms[@]}" --out "$out/lora-breakdown.json"
        ;;
    full)
        model gptj "GPT-J 6B" float32
        full=(--model "$out/models/gptj" "${size[@]}" --set model.compute_dtype=bfloat16)
        run full "$python" benchmarks/step.py "${full[@]}" "${rounds[@]}" "${with_trl[@]}" --one-at-a-time --out "$out/full.json"
        run full-breakdown "$python" benchmarks/breakdown.py "${full[@]}" --arms prlhf --out "$out/full-breakdown.json"
        ;;
    *) echo "unknown part $part; expected minutes, kernels, lora or full" >&2; exit 2 ;;
    esac
done
for log in "$out"/*.log; do
    echo "== $(basename "$log" .log)"
    tail -n 14 "$log"
done
