#!/usr/bin/env bash
# Measures what docs/gpu-report.md reports, on a machine with a GPU or two:
#   docs/gpu-report.sh SECONDWIND KERNEL_PACK OUT_DIR
# The pack needs sm_61 and sm_75. NCCL and cuBLAS are found by the linker, where they are to be used.
set -uo pipefail
binary=$1 pack=$2 out=$3
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv > "$out/card.csv"
cards=$(nvidia-smi --list-gpus | wc -l)

# The driver compiles an architecture's PTX once and keeps it; here so that no measurement waits for it.
for arch in sm_61 sm_75; do
    "$binary" bench model --kernel-pack "$pack" --arch-override $arch --shape qwen2.5-0.5b --batch 1 --prompt 16 > /dev/null &
done
wait

for arch in sm_61 sm_75; do
    "$binary" bench kernels --device cuda:0 --kernel-pack "$pack" --arch-override $arch \
        --svg "$out/roofline-$arch.svg" > "$out/kernels-$arch.txt"
done
model() { "$binary" bench model --kernel-pack "$pack" --arch-override "$@"; }
profile() { "$binary" profile --kernel-pack "$pack" --arch-override sm_75 --prompt 2048 "$@"; }
model sm_61 --shape qwen2.5-7b > "$out/7b-sm_61.txt"
for shape in 7b 14b 32b; do
    model sm_75 --shape qwen2.5-$shape > "$out/$shape-sm_75.txt"
done
model sm_75 --shape qwen2.5-7b --lm-head int8 > "$out/7b-int8-sm_75.txt"
model sm_75 --shape qwen2.5-7b --kv-dtype int8 > "$out/7b-kv-int8-sm_75.txt"
for shape in 7b 14b; do
    profile --shape qwen2.5-$shape > "$out/profile-$shape.txt"
done

if [ "$cards" -gt 1 ]; then
    pair() {
        model sm_75 --shape qwen2.5-32b --device cuda:0,cuda:1 > "$out/32b-pair-$1.txt"
        profile --shape qwen2.5-32b --device cuda:0,cuda:1 > "$out/profile-32b-pair-$1.txt"
    }
    pair p2p
    NCCL_P2P_DISABLE=1 pair shm
    NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo pair sockets
fi
