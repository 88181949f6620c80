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

hass() { # NAME INIT ANSWERS...: a HASS head from another head, unless it is there
    local name=$1 init=$2
    shift 2
    [[ -f $heads/$name/README.md ]] ||
        "$taps" train --domain "$name" --method hass --init "$heads/$init" --epochs 1 --learning-rate 3e-4 \
            --answers "$@" --work "$work" --out "$heads/$name"
}

train_heads() { # NAME ANSWERS...: an EAGLE-2 head, and from it a HASS head, unless they are there
    local eagle=$1-eagle-2 hass=$1-hass
    shift
    [[ -f $heads/$eagle/README.md ]] ||
        "$taps" train --domain "$eagle" --epochs 2 --answers "$@" --work "$work" --out "$heads/$eagle"
    hass "$hass" "$eagle" "$@"
}

average() { # NAME METHOD WEIGHT: of the math head
    [[ -f $heads/$1/config.json ]] ||
        "$taps" average "$heads/math-$2" "$heads/chat-$2" --weight "$3" --out "$heads/$1"
}

if wanted heads; then
    for domain in math chat; do
        "$taps" answer --data "$train/$domain.jsonl" --out "$answers/$domain" --answer-tokens 500000
    done
    train_heads math "$answers/math:500000"
    train_heads chat "$answers/chat:500000"
    train_heads mixed-half "$answers/math:250000" "$answers/chat:250000"
    train_heads mixed-full "$answers/math:500000" "$answers/chat:500000"
    # Specialists that begin where the mixed head begins its HASS: as much data, but split by domain.
    hass math-adapted mixed-full-eagle-2 "$answers/math:500000"
    hass chat-adapted mixed-full-eagle-2 "$answers/chat:500000"
    for method in eagle-2 hass; do
        average "averaged-$method" $method 0.5
        average "averaged-0.25-$method" $method 0.25
        average "averaged-0.75-$method" $method 0.75
    done
fi

measure() { # COMMAND RESULT BENCHMARK RECIPE TEMPERATURE: every head and combination, unless it was
    local command=$1 out=$results/$2 benchmark=$3 recipe=$4 temperature=$5 asked=80 alone
    [[ $benchmark != mt_bench ]] || asked=40
    [[ $command == eval ]] || asked=$((10 - 4 * temperature)) # sampled, twice as many ways are timed
    if [[ $recipe == adapted ]]; then
        alone=("$heads/mixed-full-hass")
    else
        alone=("$heads/mixed-half-$recipe" "$heads/mixed-full-$recipe" "$heads/averaged-$recipe")
        if [[ $command == eval && $temperature == 0 ]]; then
            alone+=("$heads/averaged-0.25-$recipe" "$heads/averaged-0.75-$recipe")
        fi
    fi
    [[ -f $out ]] || "$taps" "$command" --benchmark "$benchmark" --data "$questions/$benchmark.jsonl" \
        --heads "$heads/math-$recipe" "$heads/chat-$recipe" --alone "${alone[@]}" \
        --questions $asked --temperature "$temperature" --out "$out"
}

for temperature in 0 1; do
    for recipe in hass adapted eagle-2; do
        for benchmark in mt_bench gsm8k humaneval; do
            ! wanted eval || measure eval eval-$benchmark-$recipe-t$temperature.json $benchmark $recipe $temperature
        done
    done
    for benchmark in mt_bench gsm8k humaneval; do # of EAGLE-2 heads the cost is that of HASS heads
        ! wanted bench || measure bench live-$benchmark-t$temperature.json $benchmark hass $temperature
    done
done
for benchmark in mt_bench gsm8k humaneval; do
    ! wanted bench || measure bench live-$benchmark-adapted-t0.json $benchmark adapted 0
done
! wanted report || "$taps" report --results "$results" --out docs/study
