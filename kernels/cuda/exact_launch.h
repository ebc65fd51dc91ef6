// Launchers of the exact kernels (kernels/gpu/exact_kernels.cuh) on a stream.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/gpu/exact_args.h"

namespace kvlapse {

// Whether this build has kernels for the current device.
bool has_exact_kernels();

void launch_exact(cudaStream_t stream, const exact::EmbedArgs& args);
void launch_exact(cudaStream_t stream, const exact::NormArgs& args);
void launch_exact(cudaStream_t stream, const exact::MatmulArgs& args);
void launch_exact(cudaStream_t stream, const exact::FinishQkvArgs& args);
void launch_exact(cudaStream_t stream, const exact::StoreArgs& args);
void launch_exact(cudaStream_t stream, const exact::LogitsArgs& args);
void launch_exact(cudaStream_t stream, const exact::SoftmaxArgs& args);
void launch_exact(cudaStream_t stream, const exact::ValuesArgs& args);
void launch_exact(cudaStream_t stream, const exact::SumChunksArgs& args);
void launch_exact(cudaStream_t stream, const exact::SiluArgs& args);
void launch_exact(cudaStream_t stream, const exact::ChooseArgs& args);
void launch_exact(cudaStream_t stream, const exact::VictimArgs& args);
void launch_exact(cudaStream_t stream, const exact::GatherArgs& args);
void launch_exact(cudaStream_t stream, const exact::UnitKeysArgs& args);
void launch_exact(cudaStream_t stream, const exact::MeanKeyArgs& args);
void launch_exact(cudaStream_t stream, const exact::SimilarKeyArgs& args);

}  // namespace kvlapse
