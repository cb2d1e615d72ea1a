#!/usr/bin/env bash
# Measures what docs/serve-report.md reports, on any machine with Python:
#   docs/serve-report.sh SECONDWIND CHECKPOINT OUT_DIR
# CHECKPOINT is model/builtin/checkpoint. Ratios are of runs one after the other, each the median of ROUNDS.
set -euo pipefail
binary=$1 checkpoint=$2 out=$3
rounds=${ROUNDS:-5}
mkdir -p "$out"
pids=()
trap 'kill "${pids[@]}" 2> /dev/null || true' EXIT

serve() { "$binary" bench serve --json "$@"; }
# The value of a Python expression over $1, a report; `level` is its last level.
of() { python3 -c 'import json, sys; it = json.load(open(sys.argv[1])); level = it.get("levels", [0])[-1]; print(eval(sys.argv[2]))' "$@"; }
median() { python3 -c 'import statistics, sys; print(f"{statistics.median(map(float, sys.argv[1:])):.3f}  of", *sys.argv[1:])' "$@"; }
ratio() { python3 -c 'import sys; print(f"{float(sys.argv[1]) / float(sys.argv[2]):.3f}")' "$@"; }
told() { echo "$*" | tee -a "$out/ratios.txt"; }
: > "$out/ratios.txt"

# The embedded model as anybody runs it.
"$binary" bench serve --seed 1 --requests 256 --slo-ttft-ms 250 --slo-itl-ms 20 --svg "$out/serve-report.svg" > "$out/sweep.txt"

# 32 streams against bare decoding steps of 32 rows.
found=()
for _ in $(seq "$rounds"); do
    "$binary" bench model --model builtin --device cpu --kv-dtype f32 --batch 32,32,32 --prompt 16 --json \
        > "$out/model.json"
    serve --api grpc --workers 1 --threads "$(nproc)" --concurrency 32 --requests 64 \
        --prompt-tokens fixed:64 --output-tokens fixed:192 > "$out/streams.json"
    found+=("$(ratio "$(of "$out/streams.json" 'level["output_tokens_per_second"]')" \
        "$(of "$out/model.json" 'sorted(row["tokens_per_second"] for row in it["decoding"])[1]')")")
done
told "throughput of 32 streams over that of bare steps: $(median "${found[@]}")"

# 1,000 streams that decode together, over each API.
for api in openai grpc; do
    serve --api $api --workers 1 --threads "$(nproc)" --concurrency 1000 --requests 2000 --max-sequences 1000 \
        --max-step-tokens 1024 --max-context-tokens 128 --prompt-tokens uniform:8..32 --output-tokens uniform:32..64 \
        > "$out/thousand-$api.json"
    told "1,000 streams, $api: $(of "$out/thousand-$api.json" 'f"""{level["done"]} done, {level["failed"]} failed"""')"
done

# A context of 8,192 tokens, so that prompts can be long; what is said there does not matter.
long=$out/long-context
rm -rf "$long"
cp -r "$checkpoint" "$long"
sed -i 's/"max_position_embeddings": 512/"max_position_embeddings": 8192/' "$long/config.json"
# A coordinator with these flags, and a worker.
start() {
    kill "${pids[@]}" 2> /dev/null || true
    wait "${pids[@]}" 2> /dev/null || true
    "$binary" coordinator --model "$long" --world-size 1 --max-context-tokens 8192 --max-sequences 64 \
        --listen 127.0.0.1:17700 --cluster-listen 127.0.0.1:17701 "$@" > "$out/coordinator.log" 2>&1 &
    coordinator=$!
    "$binary" worker --model "$long" --coordinator 127.0.0.1:17701 --threads "$(nproc)" > "$out/worker.log" 2>&1 &
    pids=("$coordinator" $!)
    until curl --silent --fail 127.0.0.1:17700/ready > /dev/null; do sleep 0.2; done
}
there() { serve --url http://127.0.0.1:17700 "$@"; }

# Four streams alone, and while prompts of 4,000 tokens come one after the other.
for prefill in 24 4; do
    start --max-prefill-tokens $prefill
    p99s=() p50s=()
    for _ in $(seq "$rounds"); do
        few=(--api grpc --concurrency 4 --requests 8 --prompt-tokens fixed:16 --output-tokens uniform:50..150)
        there "${few[@]}" > "$out/alone-$prefill.json"
        # Not through a function, whose shell would be killed instead.
        "$binary" bench serve --url http://127.0.0.1:17700 --api grpc --concurrency 1 --warm-up 0 \
            --prompt-tokens fixed:4000 --output-tokens fixed:1 --duration 120 > "$out/prompts.txt" &
        prompts=$!
        sleep 0.5
        there "${few[@]}" > "$out/beside-$prefill.json"
        kill $prompts
        wait $prompts 2> /dev/null || true
        p99='level["itl_ms"]["p99"]' p50='level["itl_ms"]["p50"]'
        p99s+=("$(ratio "$(of "$out/beside-$prefill.json" "$p99")" "$(of "$out/alone-$prefill.json" "$p99")")")
        p50s+=("$(ratio "$(of "$out/beside-$prefill.json" "$p50")" "$(of "$out/alone-$prefill.json" "$p50")")")
    done
    told "p99 between tokens beside prompts of 4,000 over alone, $prefill prompt tokens a step: $(median "${p99s[@]}")"
    told "p50 likewise: $(median "${p50s[@]}")"
done
start

# A prefix of 2,000 tokens that is cached, and one that is not.
found=()
for _ in $(seq "$rounds"); do
    one=(--concurrency 1 --requests 8 --warm-up 1 --output-tokens fixed:1)
    there "${one[@]}" --shared-prefix 2000 --prompt-tokens fixed:16 > "$out/cached.json"
    there "${one[@]}" --prompt-tokens fixed:2016 > "$out/computed.json"
    p50='level["ttft_ms"]["p50"]'
    found+=("$(ratio "$(of "$out/cached.json" "$p50")" "$(of "$out/computed.json" "$p50")")")
done
told "first token after a cached prefix of 2,000 tokens over a computed one: $(median "${found[@]}")"

# What a coordinator takes of a processor for each token, at 64 streams: user and system time of its process.
ticks() { cut -d ' ' -f 14,15 "/proc/$coordinator/stat"; }
for api in openai grpc; do
    found=()
    for _ in $(seq "$rounds"); do
        before=$(ticks)
        there --api $api --concurrency 64 --requests 256 --warm-up 0 --prompt-tokens fixed:16 \
            --output-tokens fixed:128 > "$out/sixty-four.json"
        found+=("$(python3 -c 'import os, sys; a, b, c, d = map(int, sys.argv[1:]); print(round(1e6 * (c + d - a - b) / os.sysconf("SC_CLK_TCK") / (256 * 128), 1))' \
            $before $(ticks))")
        [ "$(of "$out/sixty-four.json" 'level["done"]')" = 256 ]
    done
    told "us of coordinator per token at 64 streams, $api: $(median "${found[@]}")"
done
