#!/usr/bin/env bash
# What only a GPU can show: the rows of docs/performance.md and docs/scaling.md that say "not measured".
#
#     benchmarks/gpu.sh OUT [kernels] [lora] [full]      all three by default; PYTHON=python3 names another Python
#
# kernels  the log-prob kernels and packed rows compiled, by their tests; then their cost beside the bare products
# lora     Llama-3-8B's shape, LoRA of rank 16 on bfloat16: a step, its memory beside the dry run's, where its time goes
# full     GPT-J 6B's shape, full fine-tuning in mixed precision: the same (needs some 110 GB on one GPU)
#
# Weights are random (benchmarks/random_model.py) and lie in OUT/models. TRL takes part where it and peft are installed. A
# part that fails does not stop the next: every log is in OUT, and the last lines of each are printed at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?expected a folder for logs and tables}
shift
parts=${*:-kernels lora full}
python=${PYTHON:-python}
export PYTHONPATH=$PWD
mkdir -p "$out/models"

run() { # NAME COMMAND...
    local name=$1
    shift
    "$@" >"$out/$name.log" 2>&1 || echo "FAILED with status $?: $*" >>"$out/$name.log"
}

model() { # FOLDER SHAPE TYPE
    [ -f "$out/models/$1/config.json" ] || run "$1-weights" "$python" benchmarks/random_model.py "$2" --out "$out/models/$1" --dtype "$3" $LAYERS
}

LAYERS=${LAYERS:-} # "--layers 2", to try the script where there is no such memory
arms=(prlhf "prlhf pdpo")
"$python" -c "import trl, peft" 2>/dev/null && with_trl=(--arms "${arms[@]}" trl --trl-batch 4 8) || with_trl=(--arms "${arms[@]}")
for part in $parts; do
    case $part in
    kernels)
        run kernels "$python" -m pytest -q tests/test_logprobs.py tests/test_tree.py
        run logprob "$python" benchmarks/logprob.py --out "$out/logprob.json" ${LOGPROB:-}
        ;;
    lora)
        model llama Llama-3-8B bfloat16
        lora=(--model "$out/models/llama" --lora 16 --dtype bfloat16 --checkpointing --comparisons ${COMPARISONS:-32} --micro-batch 8)
        run lora "$python" benchmarks/step.py "${lora[@]}" --rounds 3 "${with_trl[@]}" --out "$out/lora.json"
        run lora-breakdown "$python" benchmarks/breakdown.py "${lora[@]}" --arms "${arms[@]}"
        ;;
    full)
        model gptj "GPT-J 6B" float32
        full=(--model "$out/models/gptj" --checkpointing --comparisons ${COMPARISONS:-32} --micro-batch 8 --set model.compute_dtype=bfloat16)
        for arm in "${arms[@]}"; do # one at a time: there is room for one
            run "full-${arm// /-}" "$python" benchmarks/step.py "${full[@]}" --rounds 3 --arms "$arm" --out "$out/full-${arm// /-}.json"
        done
        run full-breakdown "$python" benchmarks/breakdown.py "${full[@]}" --arms prlhf
        ;;
    *) echo "unknown part $part; expected kernels, lora or full" >&2; exit 2 ;;
    esac
done
for log in "$out"/*.log; do
    echo "== $(basename "$log" .log)"
    tail -n 12 "$log"
done
