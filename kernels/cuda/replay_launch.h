// Launchers of the kernels of a replay (kernels/gpu/replay_kernels.cuh) on a stream.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/gpu/replay_args.h"

namespace kvlapse {

inline constexpr int kReplayDecideThreads = 512;

void launch_replay(cudaStream_t stream, const gpu_replay::LogitsArgs& args);
void launch_replay(cudaStream_t stream, const gpu_replay::ValuesArgs& args);
void launch_replay(cudaStream_t stream, const gpu_replay::DecideArgs& args, bool large);
void launch_replay(cudaStream_t stream, const gpu_replay::RowsArgs& args);
void launch_replay(cudaStream_t stream, const gpu_replay::MassesArgs& args);
void launch_replay(cudaStream_t stream, const gpu_replay::OutputsArgs& args);
void launch_replay(cudaStream_t stream, const gpu_replay::RepairsArgs& args);
void launch_replay(cudaStream_t stream, const gpu_replay::FutureArgs& args);
void launch_replay(cudaStream_t stream, const gpu_replay::SumFutureArgs& args);
void launch_replay(cudaStream_t stream, const gpu_replay::CloseArgs& args);

}  // namespace kvlapse
