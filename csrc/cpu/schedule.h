// The operations on whole batches: cut into the work of kernels.h and handed to threads. Shapes in problem.h.
#pragma once
#include "problem.h"

namespace infllm {

void write(DType dtype, const WriteArgs& args, int64_t num_tokens);
void select(DType dtype, const SelectMeanArgs& args);
void select_peak(DType dtype, const SelectPeakArgs& args);
void attend(DType dtype, const AttendArgs& args);
void seal(DType dtype, const SealArgs& args);

}  // namespace infllm
