// The CUDA operators, of libtorch's stable ABI; see vllm_infllm/ops/interface.py for their contract.
//
// They start kernels on the current stream and wait for nothing; every grid follows from shapes alone.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "gather.cuh"
#include "residency.cuh"
#include "topk.cuh"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef CUDA_ON_CPU
#define DISPATCH_KEY CPU
#else
#define DISPATCH_KEY CUDA
// Weak, so that a torch without CUDA can load this library, if not run it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace {

#ifdef CUDA_ON_CPU
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream = nullptr;
  void check_launch() const {}
};
#else
/// While this lives, kernels go to the device of a tensor, on its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(index_of(tensor)) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_of(tensor), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  void check_launch() const {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA cannot launch a kernel of vllm-infllm: ", cudaGetErrorString(error));
  }
  cudaStream_t stream;

 private:
  static int32_t index_of(const Tensor& tensor) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && tensor.is_cuda(),
                    "the CUDA operators of vllm-infllm need a torch with CUDA, and tensors on a GPU");
    return tensor.get_device_index();
  }
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

template <class... Tensors>
void same_device(const Tensor& first, const Tensors&... others) {
  STD_TORCH_CHECK(((others.get_device() == first.get_device()) && ...), "the tensors are not on one device");
}

template <class T>
T* checked(const Tensor& tensor, ScalarType type, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == dim && tensor.is_contiguous(), name,
                  " has the wrong dtype or number of dimensions, or is not contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

/// [first, second], dense in the second dimension; the first has any stride.
template <class T>
T* matrix(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == 2 && tensor.stride(1) == 1, name,
                  " has the wrong dtype or number of dimensions, or is not dense in the last");
  return static_cast<T*>(tensor.data_ptr());
}

void same_shape(const Tensor& one, const Tensor& other, const char* names) {
  bool same = one.dim() == other.dim();
  for (int64_t i = 0; same && i < one.dim(); ++i) same = one.size(i) == other.size(i);
  STD_TORCH_CHECK(same, names, " differ in shape");
}

const infllm::Row* rows_of(const Tensor& rows, const Tensor& chosen) {
  STD_TORCH_CHECK(rows.size(1) * 8 == sizeof(infllm::Row), "rows has ", rows.size(1), " columns");
  STD_TORCH_CHECK(chosen.size(0) == rows.size(0), "chosen has ", chosen.size(0), " rows, not ", rows.size(0));
  return checked<const infllm::Row>(rows, ScalarType::Long, 2, "rows");
}

void topk_op(Tensor chosen, Tensor scores, Tensor rows, Tensor units, int64_t init_blocks, int64_t topk) {
  same_device(chosen, scores, rows, units);
  const infllm::TopkArgs args{matrix<const float>(scores, ScalarType::Float, "scores"),
                              scores.stride(0),
                              rows_of(rows, chosen),
                              checked<const int64_t>(units, ScalarType::Long, 1, "units"),
                              checked<int64_t>(chosen, ScalarType::Long, 2, "chosen"),
                              chosen.size(1),
                              init_blocks,
                              topk};
  const OnDevice device(chosen);
  if (rows.size(0)) LAUNCH(infllm::topk_kernel, rows.size(0), infllm::kTopkThreads, device.stream, args);
  device.check_launch();
}

void resolve_op(Tensor slots, Tensor missing, Tensor unit, Tensor arrived, Tensor used, Tensor mass, Tensor clock,
                Tensor counts, Tensor chosen, Tensor rows, Tensor block_table, int64_t init_blocks, int64_t strategy) {
  same_device(slots, missing, unit, arrived, used, mass, clock, counts, chosen, rows, block_table);
  same_shape(slots, chosen, "slots and chosen");
  same_shape(missing, chosen, "missing and chosen");
  const int64_t num_chosen = chosen.size(1), num_slots = unit.size(1), stride = unit.stride(0);
  STD_TORCH_CHECK(num_chosen - init_blocks <= num_slots && num_chosen <= infllm::kPlaces, num_chosen - init_blocks,
                  " units chosen, and a request has ", num_slots, " slots");
  STD_TORCH_CHECK(arrived.stride(0) == stride && used.stride(0) == stride && mass.stride(0) == stride,
                  "the tensors of the residency cache have different strides");
  STD_TORCH_CHECK(strategy >= infllm::kLru && strategy <= infllm::kLruS, "strategy ", strategy);
  const infllm::Slots caches{matrix<int64_t>(unit, ScalarType::Long, "unit"),
                             matrix<int64_t>(arrived, ScalarType::Long, "arrived"),
                             matrix<int64_t>(used, ScalarType::Long, "used"),
                             matrix<float>(mass, ScalarType::Float, "mass")};
  const infllm::ResolveArgs args{caches,
                                 matrix<int64_t>(clock, ScalarType::Long, "clock"),
                                 matrix<int64_t>(counts, ScalarType::Long, "counts"),
                                 num_slots,
                                 stride,
                                 clock.stride(0),
                                 counts.stride(0),
                                 static_cast<infllm::Strategy>(strategy),
                                 rows_of(rows, chosen),
                                 matrix<const int32_t>(block_table, ScalarType::Int, "block_table"),
                                 block_table.stride(0),
                                 init_blocks,
                                 checked<const int64_t>(chosen, ScalarType::Long, 2, "chosen"),
                                 checked<int64_t>(slots, ScalarType::Long, 2, "slots"),
                                 checked<int64_t>(missing, ScalarType::Long, 2, "missing"),
                                 num_chosen};
  const OnDevice device(chosen);
  if (rows.size(0)) LAUNCH(infllm::resolve_kernel, rows.size(0), infllm::kWarp, device.stream, args);
  device.check_launch();
}

void attended_op(Tensor kept, Tensor unit, Tensor rows, Tensor chosen, Tensor mass, int64_t init_blocks,
                 double decay) {
  same_device(kept, unit, rows, chosen, mass);
  same_shape(mass, chosen, "mass and chosen");
  STD_TORCH_CHECK(kept.stride(0) == unit.stride(0), "the tensors of the residency cache have different strides");
  const infllm::AttendedArgs args{matrix<const int64_t>(unit, ScalarType::Long, "unit"),
                                  matrix<float>(kept, ScalarType::Float, "kept"),
                                  unit.size(1),
                                  unit.stride(0),
                                  static_cast<float>(decay),
                                  rows_of(rows, chosen),
                                  init_blocks,
                                  checked<const int64_t>(chosen, ScalarType::Long, 2, "chosen"),
                                  checked<const float>(mass, ScalarType::Float, 2, "mass"),
                                  chosen.size(1)};
  const OnDevice device(chosen);
  if (rows.size(0)) LAUNCH(infllm::attended_kernel, rows.size(0), infllm::kWarp, device.stream, args);
  device.check_launch();
}

constexpr int64_t kVectorBytes = sizeof(uint4);

/// Ids in any shape if dense, else in one dimension.
const int64_t* ids_of(const Tensor& ids, const char* name) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && (ids.is_contiguous() || ids.dim() == 1), name,
                  " must be int64, and dense if it has several dimensions");
  return static_cast<const int64_t*>(ids.data_ptr());
}

int64_t step_of(const Tensor& ids) { return ids.is_contiguous() ? 1 : ids.stride(0); }

/// The data of cache, keys or values as vectors; `step` bytes lie between what stands at multiples of it.
uint4* vectors_of(const Tensor& tensor, int64_t step, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes == 0 && step % kVectorBytes == 0, name,
                  " does not stand at multiples of ", kVectorBytes, " bytes");
  return static_cast<uint4*>(tensor.data_ptr());
}

/// keys, values [units, KH, B, D] on the host; cache [blocks, KH, B, 2D], of each head the keys, then the values.
void gather_op(Tensor cache, Tensor keys, Tensor values, Tensor missing, Tensor blocks) {
  same_device(cache, missing, blocks);
  same_shape(missing, blocks, "missing and slots");
  same_shape(keys, values, "keys and values");
  checked<void>(keys, cache.scalar_type(), 4, "keys");
  checked<void>(values, cache.scalar_type(), 4, "values");
  const int64_t kv_heads = keys.size(1), half = keys.size(2) * keys.size(3), bytes = cache.element_size();
  STD_TORCH_CHECK(cache.dim() == 4 && cache.size(1) == kv_heads && cache.size(2) == keys.size(2) &&
                      cache.size(3) == 2 * keys.size(3) && cache.stride(1) == 2 * half &&
                      cache.stride(2) == 2 * keys.size(3) && cache.stride(3) == 1,
                  "cache must be [blocks, kv heads, block size, 2 * head size], dense in a block");
  const infllm::GatherArgs args{vectors_of(keys, half * bytes, "keys"),
                                vectors_of(values, half * bytes, "values"),
                                vectors_of(cache, cache.stride(0) * bytes, "cache"),
                                cache.stride(0) * bytes / kVectorBytes,
                                half * bytes / kVectorBytes,
                                kv_heads,
                                ids_of(missing, "missing"),
                                ids_of(blocks, "slots"),
                                step_of(missing),
                                step_of(blocks),
                                missing.numel()};
  const dim3 grid(std::min(2 * kv_heads, infllm::kUnitBlocks), std::min(args.num_places, infllm::kPlacesAtOnce));
  const OnDevice device(cache);
  if (args.num_places) LAUNCH(infllm::gather_kernel, grid, infllm::kGatherThreads, device.stream, args);
  device.check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_infllm_cuda, m) {
  m.def("topk(Tensor(a!) chosen, Tensor scores, Tensor rows, Tensor units, int init_blocks, int topk) -> ()");
  m.def(
      "resolve(Tensor(a!) slots, Tensor(b!) missing, Tensor(c!) unit, Tensor(d!) arrived, Tensor(e!) used, "
      "Tensor(f!) mass, Tensor(g!) clock, Tensor(h!) counts, Tensor chosen, Tensor rows, Tensor block_table, "
      "int init_blocks, int strategy) -> ()");
  m.def(
      "attended(Tensor(a!) kept, Tensor unit, Tensor rows, Tensor chosen, Tensor mass, int init_blocks, float decay) "
      "-> ()");
  m.def("gather(Tensor(a!) cache, Tensor keys, Tensor values, Tensor missing, Tensor slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_infllm_cuda, DISPATCH_KEY, m) {
  m.impl("topk", TORCH_BOX(&topk_op));
  m.impl("resolve", TORCH_BOX(&resolve_op));
  m.impl("attended", TORCH_BOX(&attended_op));
  m.impl("gather", TORCH_BOX(&gather_op));
}

namespace {

PyObject* version(PyObject*, PyObject*) { return PyUnicode_FromString(INFLLM_VERSION); }

PyMethodDef methods[] = {
    {"version", version, METH_NOARGS, "Version of vllm-infllm that this extension was built for."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
