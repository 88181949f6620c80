#!/usr/bin/env bash
# The whole study, from prompts to report. What exists is not made again, so an interrupted run is repeated.
#
#   docs/study/run.sh TRAIN EVAL
#
# TRAIN holds math.jsonl and chat.jsonl (prompts), EVAL mt_bench.jsonl, gsm8k.jsonl and humaneval.jsonl (questions).
# Heads and recordings go to WORK (.work/study), result files to docs/results/study, the report to docs/study.
# On two cores about a day; with RUN=heads, eval, bench or report only that part.
set -euo pipefail
train=$1 questions=$2
work=${WORK:-.work/study} results=${RESULTS:-docs/results/study} run=${RUN:-all}
taps=${TAPS:-.venv/bin/taps}
answers=$work/answers heads=$work/heads

wanted() { [[ $run == all || $run == "$1" ]]; }

train_heads() { # NAME ANSWERS...: an EAGLE-2 head, and from it a HASS head, unless they are there
    local eagle=$1-eagle-2 hass=$1-hass
    shift
    [[ -f $heads/$eagle/README.md ]] ||
        "$taps" train --domain "$eagle" --epochs 2 --answers "$@" --work "$work" --out "$heads/$eagle"
    [[ -f $heads/$hass/README.md ]] ||
        "$taps" train --domain "$hass" --method hass --init "$heads/$eagle" --epochs 1 --learning-rate 3e-4 \
            --answers "$@" --work "$work" --out "$heads/$hass"
}

average() { # NAME METHOD WEIGHT: of the math head
    [[ -f $heads/$1/config.json ]] ||
        "$taps" average "$heads/math-$2" "$heads/chat-$2" --weight "$3" --out "$heads/$1"
}

if wanted heads; then
    for domain in math chat; do
        "$taps" answer --data "$train/$domain.jsonl" --out "$answers/$domain" --answer-tokens 1000000
    done
    train_heads math "$answers/math:500000"
    train_heads chat "$answers/chat:500000"
    train_heads mixed-half "$answers/math:250000" "$answers/chat:250000"
    train_heads mixed-full "$answers/math:500000" "$answers/chat:500000"
    for method in eagle-2 hass; do
        average "averaged-$method" $method 0.5
        average "averaged-0.25-$method" $method 0.25
        average "averaged-0.75-$method" $method 0.75
    done
fi

measure() { # COMMAND RESULT BENCHMARK METHOD TEMPERATURE: every head and combination, unless it was
    local command=$1 out=$results/$2 benchmark=$3 method=$4 temperature=$5 asked=80 alone
    [[ $benchmark != mt_bench ]] || asked=40
    [[ $command == eval ]] || asked=10
    alone=("$heads/mixed-half-$method" "$heads/mixed-full-$method" "$heads/averaged-$method")
    if [[ $command == eval && $temperature == 0 ]]; then
        alone+=("$heads/averaged-0.25-$method" "$heads/averaged-0.75-$method")
    fi
    [[ -f $out ]] || "$taps" "$command" --benchmark "$benchmark" --data "$questions/$benchmark.jsonl" \
        --heads "$heads/math-$method" "$heads/chat-$method" --alone "${alone[@]}" \
        --questions $asked --temperature "$temperature" --out "$out"
}

for temperature in 0 1; do
    for method in hass eagle-2; do
        for benchmark in mt_bench gsm8k humaneval; do
            ! wanted eval || measure eval eval-$benchmark-$method-t$temperature.json $benchmark $method $temperature
        done
    done
    for benchmark in mt_bench gsm8k humaneval; do
        ! wanted bench || measure bench live-$benchmark-t$temperature.json $benchmark hass $temperature
    done
done
! wanted report || "$taps" report --results "$results" --out docs/study
