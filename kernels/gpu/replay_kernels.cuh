// The kernels of a replay on a device, one function a kernel that every thread of a block runs; contract:
// replay_args.h. Written in the operations of kernels/cuda/device_ops.cuh, so that the tests' emulator
// compiles the same text: include these (or the emulator) first. Compiled without contraction of products and
// sums: fused multiply-adds are written where they are meant, so that victims are those of the CPU's replay.
#pragma once

#include "kernels/gpu/replay_decide.cuh"
#include "kernels/gpu/replay_logits.cuh"
#include "kernels/gpu/replay_measures.cuh"
#include "kernels/gpu/replay_outputs.cuh"
