#!/usr/bin/env bash
# How the shipped heads were made, from prompts. What exists is not made again, so an interrupted run is repeated.
#
#   specialists/train.sh TRAIN
#
# TRAIN holds math.jsonl, chat.jsonl and code.jsonl. Answers and heads go to WORK (.work/specialists). The answers the
# shipped heads learned from were recorded in several goes, with limits of 128 to 320 tokens; the EAGLE-2 head that math
# started from had random input weights where this one has fitted ones.
# On two cores about half a day, most of it for the answers.
set -euo pipefail
train=$1
work=${WORK:-.work/specialists}
taps=${TAPS:-.venv/bin/taps}
answers=$work/answers heads=$work/heads

answer() { # NAME TOKENS MOST: so many of them, each answer at most so long
    "$taps" answer --data "$train/$1.jsonl" --out "$answers/$1" --answer-tokens "$2" --max-new-tokens "$3"
}

train_head() { # NAME OPTION...: one head, unless it is there
    local name=$1
    shift
    [[ -f $heads/$name/README.md ]] ||
        "$taps" train --domain "$name" --work "$work" --out "$heads/$name" "$@"
}

mkdir -p "$work"
[[ -f $work/code-complete.jsonl ]] || .venv/bin/python specialists/code/prompts.py "$train/code.jsonl" > "$work/code-complete.jsonl"
answer math 1000000 320
answer chat 1135000 320
answer code 75000 160
"$taps" answer --data "$work/code-complete.jsonl" --out "$answers/code-complete" --answer-tokens 289000 --max-new-tokens 160
code=("$answers/code-complete:289000" "$answers/code:75000")

# One head learns from everything; the specialists of broad domains go on from it.
train_head base --epochs 1 --learning-rate 1.5e-3 --answers "$answers/math" "$answers/chat" "${code[@]}"
train_head chat --method hass --init "$heads/base" --epochs 1 --learning-rate 3e-4 --answers "$answers/chat"
train_head code --method hass --init "$heads/base" --epochs 2 --learning-rate 3e-4 --answers "${code[@]}"

# Mathematics has enough answers of its own for a head that starts from nothing.
train_head math-eagle-2 --epochs 3 --learning-rate 2e-3 --answers "$answers/math"
train_head math --method hass --init "$heads/math-eagle-2" --epochs 1 --learning-rate 3e-4 --answers "$answers/math"
