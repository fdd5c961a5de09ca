// The instruction set that the kernels run on.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace infllm {

/// Names of the sets that this machine can run, the best one last.
std::vector<std::string> supported_isas();
/// Use the set `name`; false if this machine cannot run it. Without a call the best one is used.
bool use_isa(const std::string& name);
/// The set in use.
const std::string& current_isa();
const Kernels& kernels(DType dtype);

}  // namespace infllm
