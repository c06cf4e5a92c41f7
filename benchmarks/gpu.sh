#!/usr/bin/env bash
# The measurements that need a GPU: the rows of docs/performance.md and docs/scaling.md that say "not measured".
#
#     benchmarks/gpu.sh OUT [kernels] [lora] [full]      all three by default; PYTHON=python3 names another Python
#
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
parts=${*:-kernels lora full}
python=${PYTHON:-python}
export PYTHONPATH=$PWD:$PWD/benchmarks
mkdir -p "$out/models"

run() { # NAME COMMAND...
    local name=$1
    shift
    "$@" >"$out/$name.log" 2>&1 || echo "FAILED with status $?: $*" >>"$out/$name.log"
}

model() { # FOLDER SHAPE TYPE
    [ -f "$out/models/$1/config.json" ] || run "$1-weights" "$python" benchmarks/random_model.py "$2" --out "$out/models/$1" --dtype "$3" $LAYERS
}

LAYERS=${LAYERS:-}
arms=(prlhf "prlhf pdpo")
with_trl=(--arms "${arms[@]}")
"$python" -c "import trl, peft" 2>/dev/null && with_trl+=(trl --trl-batch 1 2 4 8)
run versions "$python" -c 'import step; print(step.device_name(), step.versions(), sep="\n")'
size=(--checkpointing --comparisons ${COMPARISONS:-32} --micro-batch 8 ${STEP:-}) rounds=(--rounds ${ROUNDS:-3})
for part in $parts; do
    case $part in
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
    *) echo "unknown part $part; expected kernels, lora or full" >&2; exit 2 ;;
    esac
done
for log in "$out"/*.log; do
    echo "== $(basename "$log" .log)"
    tail -n 14 "$log"
done
