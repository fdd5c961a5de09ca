// The operations as torch operators of libtorch's stable ABI; see vllm_infllm/ops/interface.py for their contract.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "isa.h"
#include "schedule.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

infllm::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return infllm::DType::kFloat;
    case ScalarType::BFloat16:
      return infllm::DType::kBFloat16;
    case ScalarType::Half:
      return infllm::DType::kHalf;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

template <class T>
T* checked(const Tensor& tensor, ScalarType type, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == dim && tensor.is_contiguous(), name,
                  " has the wrong dtype or number of dimensions, or is not contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

infllm::Tokens tokens_of(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == 3 && tensor.stride(2) == 1, name,
                  " must be [tokens, heads, head size] in the dtype of the cache, dense in the last dimension");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

/// Paged cache [blocks, KH, B, 2D]: keys of a head, then its values.
infllm::Packed cache_of(const Tensor& cache, const infllm::Sizes& z) {
  STD_TORCH_CHECK(cache.dim() == 4 && cache.stride(3) == 1 && cache.stride(2) == 2 * z.head_size &&
                      cache.stride(1) == 2 * z.block_elements() && cache.size(3) == 2 * z.head_size,
                  "cache must be [blocks, kv heads, block size, 2 * head size], dense in a block");
  char* keys = static_cast<char*>(cache.data_ptr());
  return {keys, keys + z.block_elements() * cache.element_size(), cache.stride(0), cache.stride(1)};
}

infllm::Packed store_of(const Tensor& keys, const Tensor& values, ScalarType type, const infllm::Sizes& z) {
  void* key_data = checked<void>(keys, type, 4, "keys");
  STD_TORCH_CHECK(keys.size(1) == z.kv_heads && keys.size(2) == z.block_size && keys.size(3) == z.head_size,
                  "keys and values must be [units, kv heads, block size, head size]");
  return {key_data, checked<void>(values, type, 4, "values"), keys.stride(0), keys.stride(1)};
}

/// Sizes that the kernels run; the Python side says so to the user before a call gets here.
infllm::Sizes sizes_of(int64_t heads, int64_t kv_heads, int64_t head_size, int64_t block_size) {
  STD_TORCH_CHECK(head_size % 16 == 0 && head_size <= infllm::kMaxHeadSize && block_size % 16 == 0 &&
                      heads % kv_heads == 0,
                  "head size ", head_size, ", block size ", block_size, ", ", heads, " heads, ", kv_heads, " kv heads");
  return {heads, kv_heads, head_size, block_size};
}

infllm::Rope rope_of(const Tensor& cos_sin, bool neox, const infllm::Sizes& z) {
  const float* data = checked<const float>(cos_sin, ScalarType::Float, 2, "cos_sin");
  STD_TORCH_CHECK(cos_sin.size(1) <= z.head_size, "cos_sin has ", cos_sin.size(1), " columns");
  return {data, cos_sin.size(1), neox};
}

const infllm::Row* rows_of(const Tensor& rows, int64_t num_positions) {
  const auto* data = checked<const infllm::Row>(rows, ScalarType::Long, 2, "rows");
  STD_TORCH_CHECK(rows.size(1) * 8 == sizeof(infllm::Row), "rows has ", rows.size(1), " columns");
  for (int64_t i = 0; i < rows.size(0); ++i)
    STD_TORCH_CHECK(data[i].end <= num_positions, "the rotary table ends at ", num_positions);
  return data;
}

void write_op(Tensor cache, Tensor key, Tensor value, Tensor slots) {
  const infllm::Sizes z = sizes_of(cache.size(1), cache.size(1), key.size(2), cache.size(2));
  infllm::write(dtype_of(cache, "cache"),
                {z, tokens_of(key, cache.scalar_type(), "key"), tokens_of(value, cache.scalar_type(), "value"),
                 checked<const int64_t>(slots, ScalarType::Long, 1, "slots"), cache_of(cache, z)},
                slots.size(0));
}

infllm::SelectArgs select_args(const infllm::Sizes& z, const Tensor& query, const Tensor& cos_sin, bool neox,
                               const Tensor& rows, const Tensor& units, const Tensor& chosen, int64_t n_local,
                               int64_t init_blocks, int64_t topk) {
  return {z, rope_of(cos_sin, neox, z), n_local, init_blocks, topk, rows_of(rows, cos_sin.size(0)), rows.size(0),
          checked<const int64_t>(units, ScalarType::Long, 1, "units"), tokens_of(query, query.scalar_type(), "query"),
          static_cast<int64_t*>(chosen.data_ptr()), chosen.size(1)};
}

Tensor select_op(Tensor query, Tensor representatives, Tensor cos_sin, bool neox, Tensor rows, Tensor units,
              int64_t num_chosen, int64_t n_local, int64_t init_blocks, int64_t topk) {
  const infllm::Sizes z = sizes_of(query.size(1), query.size(1), query.size(2), 16);
  Tensor chosen = torch::stable::new_empty(rows, {rows.size(0), num_chosen});
  infllm::select(dtype_of(query, "query"),
                 {select_args(z, query, cos_sin, neox, rows, units, chosen, n_local, init_blocks, topk),
                  checked<const void>(representatives, query.scalar_type(), 3, "representatives")});
  return chosen;
}

Tensor select_peak_op(Tensor query, Tensor keys, Tensor cos_sin, bool neox, Tensor rows, Tensor units,
                      int64_t num_chosen, int64_t n_local, int64_t init_blocks, int64_t topk, int64_t last,
                      double scale) {
  const infllm::Sizes z = sizes_of(query.size(1), keys.size(1), query.size(2), keys.size(2));
  STD_TORCH_CHECK(scale > 0, "scale must be positive, not ", scale);
  const infllm::Packed store = store_of(keys, keys, query.scalar_type(), z);
  Tensor chosen = torch::stable::new_empty(rows, {rows.size(0), num_chosen});
  infllm::select_peak(dtype_of(query, "query"),
                      {select_args(z, query, cos_sin, neox, rows, units, chosen, n_local, init_blocks, topk),
                       store.keys, store.block_stride, store.head_stride, last, static_cast<float>(scale)});
  return chosen;
}

/// slots: [rows, num_chosen] blocks of the cache to read instead of the units `chosen` of the store.
void attend_op(Tensor output, Tensor query, Tensor cache, Tensor keys, Tensor values, Tensor received, Tensor cos_sin,
            bool neox, Tensor rows, Tensor block_table, Tensor chosen, std::optional<Tensor> slots,
            std::optional<Tensor> mass, int64_t n_local, double scale) {
  const infllm::Sizes z = sizes_of(query.size(1), cache.size(1), query.size(2), cache.size(2));
  const ScalarType type = cache.scalar_type();
  STD_TORCH_CHECK(scale > 0, "scale must be positive, not ", scale);
  STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int && block_table.stride(1) == 1,
                  "block_table must be [requests, blocks] int32");
  const infllm::Packed paged = cache_of(cache, z);
  infllm::attend(
      dtype_of(cache, "cache"),
      {z, rope_of(cos_sin, neox, z), n_local, static_cast<float>(scale), rows_of(rows, cos_sin.size(0)), rows.size(0),
       static_cast<const int32_t*>(block_table.data_ptr()), block_table.stride(0),
       checked<const int64_t>(slots ? *slots : chosen, ScalarType::Long, 2, "chosen or slots"), chosen.size(1),
       tokens_of(query, type, "query"), tokens_of(output, type, "output"), paged,
       slots ? paged : store_of(keys, values, type, z), checked<float>(received, ScalarType::Float, 3, "received"),
       mass ? checked<float>(*mass, ScalarType::Float, 2, "mass") : nullptr});
}

void seal_op(Tensor cache, Tensor received, Tensor keys, Tensor values, Tensor representatives, Tensor cos_sin, bool neox,
          Tensor leaving, int64_t repr_topk) {
  const ScalarType type = cache.scalar_type();
  const infllm::Sizes z = sizes_of(representatives.size(1), cache.size(1), keys.size(3), cache.size(2));
  const auto* data = checked<const infllm::Leaving>(leaving, ScalarType::Long, 2, "leaving");
  STD_TORCH_CHECK(leaving.size(1) * 8 == sizeof(infllm::Leaving), "leaving has ", leaving.size(1), " columns");
  for (int64_t i = 0; i < leaving.size(0); ++i)
    STD_TORCH_CHECK((data[i].block + 1) * z.block_size <= cos_sin.size(0), "the rotary table ends at ", cos_sin.size(0));
  infllm::seal(dtype_of(cache, "cache"),
               {z, rope_of(cos_sin, neox, z), repr_topk, data, leaving.size(0), cache_of(cache, z),
                store_of(keys, values, type, z), checked<const float>(received, ScalarType::Float, 3, "received"),
                checked<void>(representatives, type, 3, "representatives")});
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_infllm, m) {
  m.def("write(Tensor(a!) cache, Tensor key, Tensor value, Tensor slots) -> ()");
  m.def(
      "select(Tensor query, Tensor representatives, Tensor cos_sin, bool neox, Tensor rows, Tensor units, "
      "int num_chosen, int n_local, int init_blocks, int topk) -> Tensor");
  m.def(
      "select_peak(Tensor query, Tensor keys, Tensor cos_sin, bool neox, Tensor rows, Tensor units, int num_chosen, "
      "int n_local, int init_blocks, int topk, int last, float scale) -> Tensor");
  m.def(
      "attend(Tensor(a!) output, Tensor query, Tensor cache, Tensor keys, Tensor values, Tensor(b!) received, "
      "Tensor cos_sin, bool neox, Tensor rows, Tensor block_table, Tensor chosen, Tensor? slots, Tensor(c!)? mass, "
      "int n_local, float scale) -> ()");
  m.def(
      "seal(Tensor cache, Tensor received, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) representatives, "
      "Tensor cos_sin, bool neox, Tensor leaving, int repr_topk) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_infllm, CPU, m) {
  m.impl("write", TORCH_BOX(&write_op));
  m.impl("select", TORCH_BOX(&select_op));
  m.impl("select_peak", TORCH_BOX(&select_peak_op));
  m.impl("attend", TORCH_BOX(&attend_op));
  m.impl("seal", TORCH_BOX(&seal_op));
}

namespace {

PyObject* version(PyObject*, PyObject*) { return PyUnicode_FromString(INFLLM_VERSION); }

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const std::string& name : infllm::supported_isas()) {
    PyObject* item = PyUnicode_FromString(name.c_str());
    PyList_Append(names, item);
    Py_DECREF(item);
  }
  return names;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(infllm::current_isa().c_str()); }

PyObject* use_isa(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (!text) return nullptr;
  if (!infllm::use_isa(text)) return PyErr_Format(PyExc_ValueError, "this machine cannot run %s", text);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"version", version, METH_NOARGS, "Version of vllm-infllm that this extension was built for."},
    {"isas", isas, METH_NOARGS, "Instruction sets that this machine can run, the best one last."},
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"use_isa", use_isa, METH_O, "Use an instruction set of isas()."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
