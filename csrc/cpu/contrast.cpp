// NT-Xent and InfoNCE on CPU tensors: checks, allocation, and the call of the kernels.
#include "cpu/contrast.h"

#include <tuple>

#include "checks.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "cpu/tournament.h"

namespace anomem {
namespace {

using OptionalTensor = std::optional<Tensor>;

double temperature_of(const OptionalTensor& temperature, double tau) {
  return temperature.has_value() ? scalar_value(*temperature, "temperature") : tau;
}

// −(share / tau) Σ along, 0-dim, or an empty tensor where the temperature is a constant. Summed in double, in order.
Tensor temperature_gradient(const OptionalTensor& temperature, const Tensor& along, double tau, double share) {
  const ScalarType type = along.scalar_type();
  if (!temperature.has_value()) return empty({0}, type);
  Tensor result = empty({}, type);
  double sum = 0;
  const int64_t count = along.numel();
  if (type == ScalarType::Double) {
    const double* values = along.const_data_ptr<double>();
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    *result.mutable_data_ptr<double>() = -share / tau * sum;
  } else {
    const float* values = along.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    *result.mutable_data_ptr<float>() = float(-share / tau * sum);
  }
  return result;
}

void check_unit_stride(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, ": expected three axes");
  STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) <= 1 || tensor.numel() == 0, name,
                  ": expected rows of unit stride");
}

// Kernels read [R] indices without a check of their own, so a value outside would read foreign memory.
void check_index(const Tensor& index, const char* name, int64_t rows, int64_t columns) {
  check_type(index, name, ScalarType::Long);
  check_shape(index, name, {rows});
  check_contiguous(index, name);
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < columns, name, ": index out of range");
}

int64_t tiles_of(int64_t rows, int64_t groups) {
  const int64_t tile = cpu::tile_rows(rows, groups);
  return (rows + tile - 1) / tile;
}

int64_t wave_of(int64_t groups, int64_t items_per_group) {
  return cpu::groups_in_a_wave(groups, items_per_group > 0 ? items_per_group : 1, cpu::thread_count());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nt_xent_forward(const Tensor& z, const Tensor& z_pair,
                                                           const OptionalTensor& temperature, double tau) {
  check_unit_stride(z, "z");
  check_unit_stride(z_pair, "z_pair");
  const int64_t groups = z.size(0), batch = z.size(1), features = z.size(2), rows = 2 * batch;
  check_shape(z_pair, "z_pair", {groups, batch, features});
  check_type(z_pair, "z_pair", z.scalar_type());
  const cpu::Type type = type_of(z, "z");
  const ScalarType sums = accumulator(type);
  Tensor loss = empty({groups, rows}, sums), lse = empty({groups, rows}, sums);
  Tensor unit = empty({groups, rows, features}, z.scalar_type()), inv_norm = empty({groups, rows}, sums);
  const int64_t wave = wave_of(groups, tiles_of(rows, groups) / 2);
  Tensor workspace = empty({wave, cpu::nt_xent_forward_workspace(rows, features)}, sums);
  cpu::nt_xent_forward({type, groups, batch, features, temperature_of(temperature, tau),
                        {z.const_data_ptr(), z_pair.const_data_ptr()},
                        {z.stride(0), z_pair.stride(0)}, {z.stride(1), z_pair.stride(1)},
                        loss.mutable_data_ptr(), lse.mutable_data_ptr(), unit.mutable_data_ptr(),
                        inv_norm.mutable_data_ptr(), workspace.mutable_data_ptr(), wave});
  return {loss, lse, unit, inv_norm};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Tensor& dloss, const Tensor& unit, const Tensor& inv_norm,
                                                    const Tensor& lse, const OptionalTensor& temperature, double tau) {
  STD_TORCH_CHECK(unit.dim() == 3 && unit.size(1) % 2 == 0, "unit: expected [G, 2B, d]");
  const int64_t groups = unit.size(0), rows = unit.size(1), features = unit.size(2);
  const cpu::Type type = type_of(unit, "unit");
  const ScalarType sums = accumulator(type);
  check_contiguous(unit, "unit");
  const struct {
    const Tensor& tensor;
    const char* name;
  } per_row[] = {{dloss, "drows"}, {inv_norm, "inv_norm"}, {lse, "lse"}};
  for (const auto& argument : per_row) {
    check_type(argument.tensor, argument.name, sums);
    check_shape(argument.tensor, argument.name, {groups, rows});
    check_contiguous(argument.tensor, argument.name);
  }
  const double value = temperature_of(temperature, tau);
  Tensor dz = empty({groups, rows / 2, features}, unit.scalar_type());
  Tensor dz_pair = empty({groups, rows / 2, features}, unit.scalar_type());
  Tensor along = empty({groups, rows}, sums);
  const int64_t wave = wave_of(groups, tiles_of(rows, groups) / 2);
  Tensor workspace = empty({wave, cpu::nt_xent_backward_workspace(rows, features)}, sums);
  cpu::nt_xent_backward({type, groups, rows / 2, features, value, dloss.const_data_ptr(), lse.const_data_ptr(),
                         inv_norm.const_data_ptr(), unit.const_data_ptr(),
                         {dz.mutable_data_ptr(), dz_pair.mutable_data_ptr()}, along.mutable_data_ptr(),
                         workspace.mutable_data_ptr(), wave});
  // Each similarity counts in both of its rows.
  return {dz, dz_pair, temperature_gradient(temperature, along, value, 0.5)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_forward(
    const Tensor& rows, const Tensor& columns, const Tensor& positive, const OptionalTensor& exclude,
    const OptionalTensor& temperature, double tau) {
  STD_TORCH_CHECK(rows.dim() == 3 && columns.dim() == 3, "rows, columns: expected [G, R, d] and [G, C, d]");
  const int64_t groups = rows.size(0), features = rows.size(2), r = rows.size(1), c = columns.size(1);
  check_shape(columns, "columns", {groups, c, features});
  check_type(columns, "columns", rows.scalar_type());
  check_contiguous(rows, "rows");
  check_contiguous(columns, "columns");
  check_index(positive, "positive", r, c);
  if (exclude.has_value()) check_index(*exclude, "exclude", r, c);
  const cpu::Type type = type_of(rows, "rows");
  const ScalarType sums = accumulator(type);
  Tensor loss = empty({groups, r}, sums), lse = empty({groups, r}, sums);
  Tensor unit_rows = empty({groups, r, features}, rows.scalar_type());
  Tensor unit_columns = empty({groups, c, features}, rows.scalar_type());
  Tensor inv_rows = empty({groups, r}, sums), inv_columns = empty({groups, c}, sums);
  const int64_t wave = wave_of(groups, tiles_of(r, groups));
  Tensor workspace = empty({wave, cpu::info_nce_forward_workspace(r, c, features)}, sums);
  cpu::info_nce_forward({type, groups, {r, c}, features, temperature_of(temperature, tau),
                         {rows.const_data_ptr(), columns.const_data_ptr()}, positive.const_data_ptr<int64_t>(),
                         exclude.has_value() ? exclude->const_data_ptr<int64_t>() : nullptr,
                         loss.mutable_data_ptr(), lse.mutable_data_ptr(),
                         {unit_rows.mutable_data_ptr(), unit_columns.mutable_data_ptr()},
                         {inv_rows.mutable_data_ptr(), inv_columns.mutable_data_ptr()},
                         workspace.mutable_data_ptr(), wave});
  return {loss, lse, unit_rows, unit_columns, inv_rows, inv_columns};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_backward(
    const Tensor& dloss, const Tensor& unit_rows, const Tensor& unit_columns, const Tensor& inv_norm_rows,
    const Tensor& inv_norm_columns, const Tensor& lse, const Tensor& positive, const OptionalTensor& exclude,
    const OptionalTensor& temperature, double tau) {
  STD_TORCH_CHECK(unit_rows.dim() == 3 && unit_columns.dim() == 3, "unit_rows, unit_columns: expected three axes");
  const int64_t groups = unit_rows.size(0), features = unit_rows.size(2);
  const int64_t r = unit_rows.size(1), c = unit_columns.size(1);
  const cpu::Type type = type_of(unit_rows, "unit_rows");
  const ScalarType sums = accumulator(type);
  const struct {
    const Tensor& tensor;
    const char* name;
    int64_t count;
  } per_row[] = {{dloss, "dloss", r}, {lse, "lse", r}, {inv_norm_rows, "inv_norm_rows", r},
                 {inv_norm_columns, "inv_norm_columns", c}};
  for (const auto& argument : per_row) {
    check_type(argument.tensor, argument.name, sums);
    check_shape(argument.tensor, argument.name, {groups, argument.count});
    check_contiguous(argument.tensor, argument.name);
  }
  check_shape(unit_columns, "unit_columns", {groups, c, features});
  check_type(unit_columns, "unit_columns", unit_rows.scalar_type());
  check_contiguous(unit_rows, "unit_rows");
  check_contiguous(unit_columns, "unit_columns");
  check_index(positive, "positive", r, c);
  if (exclude.has_value()) check_index(*exclude, "exclude", r, c);
  const double value = temperature_of(temperature, tau);
  Tensor drows = empty({groups, r, features}, unit_rows.scalar_type());
  Tensor dcolumns = empty({groups, c, features}, unit_rows.scalar_type());
  Tensor along = empty({groups, r}, sums);
  const int64_t wave = wave_of(groups, tiles_of(r, groups));
  Tensor workspace = empty({wave, cpu::info_nce_backward_workspace(r, c, features)}, sums);
  cpu::info_nce_backward({type, groups, {r, c}, features, value, dloss.const_data_ptr(), lse.const_data_ptr(),
                          {unit_rows.const_data_ptr(), unit_columns.const_data_ptr()},
                          {inv_norm_rows.const_data_ptr(), inv_norm_columns.const_data_ptr()},
                          positive.const_data_ptr<int64_t>(),
                          exclude.has_value() ? exclude->const_data_ptr<int64_t>() : nullptr,
                          {drows.mutable_data_ptr(), dcolumns.mutable_data_ptr()}, along.mutable_data_ptr(),
                          workspace.mutable_data_ptr(), wave});
  return {drows, dcolumns, temperature_gradient(temperature, along, value, 1.0)};
}

}  // namespace

void register_contrast(torch::stable::detail::StableLibrary& library) {
  library.impl("native_nt_xent_fwd", TORCH_BOX(&nt_xent_forward));
  library.impl("native_nt_xent_bwd", TORCH_BOX(&nt_xent_backward));
  library.impl("native_info_nce_fwd", TORCH_BOX(&info_nce_forward));
  library.impl("native_info_nce_bwd", TORCH_BOX(&info_nce_backward));
}

}  // namespace anomem
